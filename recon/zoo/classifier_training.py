"""The training of the world's classifier, from nothing to its file."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from recon.zoo.classifier_network import Classifier, save
from recon.zoo.image_autoencoder import SPATIAL_FACTOR
from recon.zoo.image_scenes import SIDE, label_of, pictures, random_scenes
from recon.zoo.video_recipe import cosine
from recon.zoo.world import BACKDROP, RADIUS, Scene

logger = logging.getLogger(__name__)

NOISE, BLOCKS = 0.08, 0.6
"""Standard deviation of the noise, and weight of the cell means, at a share of 1."""
CLEAN = 1 / 3
"""Probability that a picture is spared one of the faults."""


@dataclass(frozen=True)
class Recipe:
    """One training run from nothing; the defaults made the shipped file."""

    seed: int = 0
    scenes: int = 6000
    """Scenes rendered once; the faults are drawn anew at every step."""
    steps: int = 600
    batch: int = 64
    rate: float = 3e-3
    warmup: int = 50


def faulty(images: Tensor, shares: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures with the faults that quantised networks and decoders bring.

    Args:
        images: [batch, 3, height, width] in [0, 1]; sides are multiples of 4.
        shares: Of noise, blur and blocks, [batch, 3] in [0, 1].
        generator: Draws the noise.
    """
    noise, blur, blocks = (share.view(-1, 1, 1, 1) for share in shares.unbind(dim=1))
    cells = functional.avg_pool2d(images, SPATIAL_FACTOR)
    coarse = functional.interpolate(cells, scale_factor=float(SPATIAL_FACTOR))
    images = images.lerp(coarse, BLOCKS * blocks)
    soft = functional.pad(images, (2, 2, 2, 2), mode="replicate")
    for _ in range(2):
        soft = functional.avg_pool2d(soft, 3, stride=1)
    images = images.lerp(soft, blur)
    images = images + NOISE * noise * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 1)


def facts(scenes: Sequence[Scene]) -> Tensor:
    """Position, radius and backdrop of scenes, [scenes, 4], each in about [-1, 1]."""

    def centred(value: float, low: float, high: float) -> float:
        return 2 * (value - low) / (high - low) - 1

    rows = [
        [
            centred(scene.x, 0, SIDE),
            centred(scene.y, 0, SIDE),
            centred(scene.radius, *RADIUS),
            centred(scene.backdrop, *BACKDROP),
        ]
        for scene in scenes
    ]
    return torch.tensor(rows)


def train(recipe: Recipe, out: Path) -> None:
    """Train the classifier and write its file.

    Args:
        recipe: The numbers of the run.
        out: Folder of the file.
    """
    begin = time.monotonic()
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    scenes = random_scenes(recipe.seed + 1, recipe.scenes)
    everything = pictures(scenes) / 2 + 0.5
    labels, known = torch.tensor([label_of(scene) for scene in scenes]), facts(scenes)
    classifier = Classifier().train()
    optimizer = torch.optim.AdamW(classifier.parameters(), recipe.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, recipe.steps, min(recipe.warmup, recipe.steps))
    )
    for step in range(recipe.steps):
        chosen = torch.randint(len(scenes), (recipe.batch,), generator=generator)
        drawn = torch.rand(recipe.batch, 3, generator=generator)
        shares = ((drawn - CLEAN) / (1 - CLEAN)).clamp_min(0)
        logits, estimates = classifier.answers(faulty(everything[chosen], shares, generator))
        wanted = torch.cat([known[chosen], shares], dim=1)
        errors = functional.cross_entropy(logits, labels[chosen]), (estimates - wanted).square()
        loss = errors[0] + errors[1].sum(dim=1).mean()  # over estimates, then pictures
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            spread = errors[1].mean(dim=0).sqrt().tolist()
            logger.info(
                "classifier %d/%d classes %.3f estimates %s, %.0f s",
                *(step + 1, recipe.steps, errors[0].item()),
                " ".join(f"{error:.2f}" for error in spread),
                time.monotonic() - begin,
            )
    save(classifier.eval(), out)
    logger.info("%s written after %.0f s", out, time.monotonic() - begin)
