"""The numbers of the image teacher's training."""

from dataclasses import dataclass

from recon.zoo.video_recipe import constant, cosine


@dataclass(frozen=True)
class Recipe:
    """One training run from nothing."""

    seed: int = 0
    crop_steps: int = 1000
    """Decoder steps on 32 x 32 crops: convolutions learn the same there at a quarter of the
    cost."""
    full_steps: int = 100
    """Decoder steps on whole pictures, for which the group norms' statistics differ."""
    decoder_batch: int = 16
    decoder_rate: float = 3e-3
    latent_noise: float = 0.03
    """Standard deviation of the noise on the unscaled latents that the decoder learns from."""
    scenes: int = 12000
    """Scenes rendered and encoded once."""
    steps: int = 1100
    """Transformer steps."""
    batch: int = 48
    rate: float = 1.5e-3
    warmup: int = 100
    decay_steps: int = 450
    """Last transformer steps, over which the learning rate falls to zero."""
    average: float = 0.995
    """Decay per step of the running average of the weights, which is what is kept."""
    uniform_timesteps: float = 0.4
    """Share of timesteps drawn uniformly, the others are logit-normal."""
    timestep_shift: float = 0.0
    """Mean of the logit of the others. Outlines take form about the middle of the chain: a shape
    covers twenty cells, several standard deviations from the backdrop."""
    empty_labels: float = 0.1
    """Share of labels replaced by the null class, for classifier-free guidance."""
    save_every: int = 200
    """Transformer steps between two writings of the folder."""


def factor(step: int, recipe: Recipe) -> float:
    """Learning rate factor of the transformer in [0, 1]: warm-up, 1, then a cosine to zero."""
    decay = min(recipe.decay_steps, recipe.steps)
    begin = recipe.steps - decay
    if step < begin:
        return constant(step, recipe.warmup)
    return constant(begin, recipe.warmup) * cosine(step - begin, decay, 0)
