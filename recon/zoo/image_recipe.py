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
    steps: int = 4000
    """Transformer steps of the first round."""
    more_steps: int = 2500
    """Of the second one, which starts from what the first one wrote."""
    first_round: int = 0
    """Round to begin with; 1 goes on from the folder that the first one wrote."""
    batch: int = 24
    rate: float = 1e-3
    warmup: int = 100
    decay_steps: int = 1600
    """Last steps of each round, over which the learning rate falls to zero."""
    average: float = 0.998
    """Decay per step of the running average of the weights, which is what is kept."""
    uniform_timesteps: float = 0.25
    """Share of timesteps drawn uniformly, the others are logit-normal."""
    timestep_shift: float = 0.0
    """Mean of the logit of the others. Outlines take form about the middle of the chain: a shape
    covers twenty cells, several standard deviations from the backdrop."""
    empty_labels: float = 0.1
    """Share of labels replaced by the null class, for classifier-free guidance."""
    save_every: int = 400
    """Transformer steps between two writings of the folder."""

    def rounds(self) -> tuple[int, ...]:
        """Transformer steps of each round."""
        return (self.steps, self.more_steps)


def factor(step: int, steps: int, recipe: Recipe) -> float:
    """Learning rate factor in [0, 1] in a round of `steps`: warm-up, 1, then a cosine to zero."""
    decay = min(recipe.decay_steps, steps)
    begin = steps - decay
    if step < begin:
        return constant(step, recipe.warmup)
    return constant(begin, recipe.warmup) * cosine(step - begin, decay, 0)
