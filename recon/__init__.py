"""recon: post-training quantisation of diffusion transformers and vision-language models."""

__version__ = "0.1.0"
