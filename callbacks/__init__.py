"""What watches a run: checkpoints, progress, tracking, summaries, videos and their metrics."""

if __name__ != "recon.callbacks":  # a second copy of every class would break isinstance
    raise ImportError("This folder is the package recon.callbacks; import it by that name.")
