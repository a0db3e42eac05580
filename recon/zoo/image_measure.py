"""Measuring the image teacher, on all classes alike."""

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline
from PIL import Image
from torch import Tensor

from recon.zoo import oracle
from recon.zoo.image_salience import recorded_maxima, salience, weight_maxima
from recon.zoo.image_scenes import CLASSES, attributes_of, label_of, pictures, random_scenes
from recon.zoo.image_teacher import (
    DEFAULT_GUIDANCE,
    DEFAULT_STEPS,
    load,
    sampling_arguments,
)
from recon.zoo.world import COLOURS, SHAPES


def sample(
    pipeline: DiTPipeline,
    labels: Sequence[int],
    *,
    seed: int,
    steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    batch: int = 48,
) -> Tensor:
    """Pictures of the class labels, [labels, 3, 64, 64] in [0, 1].

    Each picture has its own generator, seeded by `seed` plus its index, so that the batch size
    changes nothing.
    """
    parts = []
    for begin in range(0, len(labels), batch):
        chunk = list(labels[begin : begin + batch])
        generators = [torch.Generator().manual_seed(seed + begin + i) for i in range(len(chunk))]
        arguments = sampling_arguments(steps=steps, guidance=guidance)
        parts.append(pipeline(chunk, generator=generators, output_type="pt", **arguments).images)
    return torch.cat(parts)


def answers(images: Tensor, labels: Sequence[int]) -> list[dict[str, bool]]:
    """For each picture [pictures, 3, height, width], whether colour and shape are its label's."""
    wanted = [attributes_of(label) for label in labels]
    return [
        oracle.judge_picture(image, one.colour, one.shape)
        for image, one in zip(images, wanted, strict=True)
    ]


def accuracy(images: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Share of pictures right in colour, shape, and both, each in [0, 1]."""
    judged = answers(images, labels)
    shares = {key: sum(each[key] for each in judged) / len(judged) for key in judged[0]}
    return shares | {"both": sum(all(each.values()) for each in judged) / len(judged)}


def failures(images: Tensor, labels: Sequence[int]) -> dict[str, int]:
    """Number of pictures wrong in colour or shape, of each class that has some."""
    judged = zip(answers(images, labels), labels, strict=True)
    return dict(Counter(CLASSES[label] for each, label in judged if not all(each.values())))


@torch.no_grad()
def reconstruction(pipeline: DiTPipeline, *, seed: int, count: int = 96) -> dict[str, float]:
    """What the autoencoder alone keeps of fresh scenes: PSNR in dB, and accuracies in [0, 1]."""
    scenes = random_scenes(seed, count)
    images = pictures(scenes)
    decoded = pipeline.vae.decode(pipeline.vae.encode(images).latent_dist.mode()).sample
    images, decoded = (each.clamp(-1, 1) / 2 + 0.5 for each in (images, decoded))
    error = (images - decoded).square().mean(dim=(1, 2, 3))  # per picture
    shares = accuracy(decoded, [label_of(scene) for scene in scenes])
    return {"vae_psnr": float(-10 * error.log10().mean())} | {
        f"vae_{key}": share for key, share in shares.items()
    }


def contact_sheet(images: Tensor, file: Path) -> None:
    """Write one round of pictures, a row per colour and a column per shape, enlarged twice."""
    rows = (
        images.unflatten(0, (len(COLOURS), len(SHAPES)))
        .permute(0, 3, 1, 4, 2)
        .flatten(0, 1)
        .flatten(1, 2)
    )
    picture = Image.fromarray((rows * 255).round().byte().numpy())
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(file)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what only this teacher's measurement can be told."""
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--guidance", type=float, default=DEFAULT_GUIDANCE)
    parser.add_argument("--rounds", type=int, default=8, help="pictures of each of the 24 classes")
    parser.add_argument("--contact-sheet", type=Path, help="PNG of the first round")


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Settings and numbers of a teacher folder.

    Args:
        folder: Pipeline folder.
        given: The options of `add_options`, and `seed`.
    """
    pipeline = load(folder)
    labels = list(range(len(CLASSES))) * given.rounds
    begin = time.monotonic()
    with recorded_maxima(pipeline.transformer) as activations:
        images = sample(
            pipeline, labels, seed=given.seed, steps=given.steps, guidance=given.guidance
        )
    seconds = (time.monotonic() - begin) / len(labels)
    if given.contact_sheet is not None:
        contact_sheet(images[: len(CLASSES)], given.contact_sheet)
    return {
        **{key: getattr(given, key) for key in ("steps", "guidance", "rounds", "seed")},
        **{key: round(value, 4) for key, value in accuracy(images, labels).items()},
        "failures": failures(images, labels),
        **{k: round(v, 4) for k, v in reconstruction(pipeline, seed=given.seed).items()},
        "salience": {
            "activations": salience(activations),
            "weights": salience(weight_maxima(pipeline.transformer)),
        },
        "seconds_per_picture": round(seconds, 3),
    }
