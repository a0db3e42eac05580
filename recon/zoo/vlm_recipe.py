"""The numbers of the vision-language teacher's training."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """One training run from nothing; the defaults made the shipped folder."""

    seed: int = 0
    pictures: int = 8000
    """Pictures rendered once."""
    rate: float = 4e-3
    warmup: int = 20
    average: float = 0.99
    """Decay per step of the running average of the weights, which is what is kept."""
    sight_steps: int = 500
    """Steps of the vision tower alone, which reads pictures at a tenth of the whole's cost."""
    sight_batch: int = 64
    """Pictures of such a step, and of a caption step."""
    caption_steps: int = 400
    """Steps on captions with a decoder of two layers, in which looking up what an object is takes
    a tenth of the time that it takes in one of eight."""
    caption_batch: int = 16
    captions: int = 3
    """Captions of each picture in a step."""
    short_steps: int = 800
    """Steps of the whole decoder on questions for short answers."""
    steps: int = 1500
    """Steps on all questions, the learning rate falling to zero."""
    batch: int = 8
    questions: int = 8
    """Questions about each picture in a step."""
    choices: float = 0.6
    """Share of questions with choices, once there are some."""
    save_every: int = 250
    """Steps on all questions between two writings of the folder."""
