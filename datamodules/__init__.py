"""What a run is fed: prompts, calibration sets and evaluation requests, as LightningDataModules."""

if __name__ != "recon.datamodules":  # a second copy of every class would break isinstance
    raise ImportError("This folder is the package recon.datamodules; import it by that name.")
