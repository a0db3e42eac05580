"""The numbers of the video teacher's training."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Round:
    """One round of the denoiser's training; it starts from the average of the round before it."""

    steps: int
    batch: int
    side: int | None = None
    """Side of a window around the shape, latent cells; None for the whole picture."""
    picture: bool = False
    """Whether one latent frame is drawn from each clip, as CogVideoX itself mixes pictures in: the
    look of a shape is learned there at a tenth of the cost."""
    decay: bool = False
    """Whether the learning rate falls to zero, as it should in the last round only: what a round
    learns at a tiny rate, the full rate of the next one would undo."""


@dataclass(frozen=True)
class Recipe:
    """One training run from nothing; the defaults made the shipped folder."""

    seed: int = 0
    crop_steps: int = 700
    """Decoder steps on 32 x 32 crops: convolutions learn the same there at a third of the cost."""
    full_steps: int = 100
    """Decoder steps on whole clips, for which the group norms' statistics differ."""
    decoder_batch: int = 4
    decoder_rate: float = 3e-3
    latent_noise: float = 0.05
    """Standard deviation of the noise on the latents that the decoder learns from."""
    scenes: int = 8000
    """Scenes rendered and encoded once."""
    picture_steps: int = 700
    """Denoiser steps on single latent frames, four times `batch` at once."""
    near_steps: int = 1000
    """Denoiser steps on windows of clips around the shape, at half the cost of whole clips."""
    steps: int = 1300
    """Denoiser steps on whole clips."""
    batch: int = 16
    rate: float = 1.5e-3
    warmup: int = 100
    average: float = 0.995
    """Decay per step of the running average of the weights, which is what is kept."""
    uniform_timesteps: float = 0.25
    """Share of timesteps drawn uniformly, the others are logit-normal."""
    timestep_shift: float = -0.3
    """Mean of the logit of the others; negative: towards less noise."""
    empty_prompts: float = 0.1
    """Share of prompts left empty, for classifier-free guidance."""
    save_every: int = 100
    """Denoiser steps between two writings of the folder."""

    def rounds(self) -> tuple[Round, ...]:
        """The denoiser's rounds, from the cheapest to the real thing."""
        return (
            Round(self.picture_steps, 4 * self.batch, side=10, picture=True),
            Round(self.near_steps, self.batch, side=12),
            Round(self.steps, self.batch, decay=True),
        )


def constant(step: int, warmup: int) -> float:
    """Learning rate factor in [0, 1]: linear warm-up, then 1."""
    return min(1.0, (step + 1) / warmup)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning rate factor in [0, 1]: linear warm-up, then a cosine down to zero."""
    if step < warmup:
        return constant(step, warmup)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
