"""One self-contained page about runs: what was quantised, how well, and how to repeat it."""
