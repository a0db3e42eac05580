"""Distances between a quantised unit and its full-precision teacher."""

from recon.losses.reconstruction import relative_error, token_weighted_error, token_weights

__all__ = ["relative_error", "token_weighted_error", "token_weights"]
