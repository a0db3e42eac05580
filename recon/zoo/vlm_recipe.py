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
    dense_steps: int = 600
    """Steps of the decoder on descriptions and notes, in which nearly every word is learned from;
    questions alone take many times longer to teach it where to look."""
    dense_batch: int = 12
    """Pictures of such a step."""
    dense_pairs: int = 2
    """Descriptions of a picture in a step, and as many sets of notes."""
    notes: int = 8
    """Facts in a set of notes."""
    dense_rate: float = 4e-3
    steps: int = 1000
    """Steps of the decoder on questions."""
    batch: int = 12
    questions: int = 10
    """Questions about each picture in a step."""
    choices: float = 0.6
    """Share of questions with choices."""
    rate: float = 2e-3
    warmup: int = 20
    average: float = 0.99
    """Decay per step of the running average of the weights, which is what is kept."""
    save_every: int = 250
    """Steps on questions between two writings of the folder."""
