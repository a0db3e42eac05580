"""Distances between a quantised unit and its full-precision teacher."""

from recon.losses.reconstruction import (
    error_and_power,
    relative_error,
    token_weighted_error,
    token_weights,
)

__all__ = ["error_and_power", "relative_error", "token_weighted_error", "token_weights"]
