"""One paper, one file, and the baselines everything is compared with."""
