"""Factors of a learning rate, by the progress of its stage from 0 to 1."""

import math


def constant(progress: float) -> float:
    """Always 1."""
    return 1.0


def linear(progress: float) -> float:
    """From 1 to 0, evenly."""
    return 1 - progress


def cosine(progress: float) -> float:
    """From 1 to 0, slowly at both ends."""
    return (1 + math.cos(math.pi * progress)) / 2
