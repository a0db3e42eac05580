"""The numbers of the vision-language teacher's training."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """One training run from nothing; the defaults made the shipped folder."""

    seed: int = 0
    pictures: int = 8000
    """Pictures rendered once."""
    sight_steps: int = 800
    """Steps of the vision tower alone, at a tenth of the whole network's cost."""
    sight_batch: int = 64
    sight_rate: float = 4e-3
    short_steps: int = 1200
    """Steps of the decoder on questions for short answers, at a constant rate. Letters of choices
    can only be learned once answers are; before, they are noise that holds all learning up."""
    steps: int = 6000
    """Steps on questions of both forms, the rate falling to zero."""
    batch: int = 12
    """Pictures of such a step."""
    questions: int = 8
    """Questions about each picture in a step."""
    choices: float = 0.5
    """Share of questions with choices."""
    rate: float = 4e-3
    warmup: int = 20
    average: float = 0.99
    """Decay per step of the running average of the weights, which is what is kept."""
    save_every: int = 500
    """Steps on questions between two writings of the folder."""
