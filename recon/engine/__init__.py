"""The engine: one `Trainer.fit` walks a network unit by unit."""

from recon.engine.reconstruction import Reconstruction
from recon.engine.strategy import ReconStrategy

__all__ = ["ReconStrategy", "Reconstruction"]
