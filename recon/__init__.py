"""recon: post-training quantisation of diffusion transformers and vision-language models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recon.engine.native import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`recon.load`, imported when it is first used: torch and Lightning take seconds."""
    if name == "load":
        from recon.engine.native import load

        return load
    raise AttributeError(f"module 'recon' has no attribute {name!r}")
