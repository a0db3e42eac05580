"""Measuring the video teacher, on prompts worded as training never worded them."""

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXPipeline
from PIL import Image
from torch import Tensor

from recon.zoo import oracle, world
from recon.zoo.video_autoencoder import clips
from recon.zoo.video_teacher import (
    DEFAULT_GUIDANCE,
    DEFAULT_STEPS,
    load,
    sampling_arguments,
)


def sample(
    pipeline: CogVideoXPipeline,
    prompts: Sequence[str],
    *,
    seed: int,
    steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
    batch: int = 16,
) -> Tensor:
    """Videos of the prompts, [prompts, frames, 3, height, width] in [0, 1].

    Each video has its own generator, seeded by `seed` plus its index, so that the batch size
    changes nothing.
    """
    parts = []
    for begin in range(0, len(prompts), batch):
        chunk = list(prompts[begin : begin + batch])
        generators = [torch.Generator().manual_seed(seed + begin + i) for i in range(len(chunk))]
        arguments = sampling_arguments(steps=steps, guidance=guidance)
        parts.append(pipeline(chunk, generator=generators, output_type="pt", **arguments).frames)
    return torch.cat(parts)


def accuracy(videos: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Share of videos right in colour, shape, motion, and all three, each in [0, 1]."""
    answers = [oracle.judge(v, p) for v, p in zip(videos, prompts, strict=True)]
    shares = {key: sum(a[key] for a in answers) / len(answers) for key in answers[0]}
    return shares | {"all": sum(all(a.values()) for a in answers) / len(answers)}


@torch.no_grad()
def reconstruction(pipeline: CogVideoXPipeline, *, seed: int, count: int = 64) -> dict[str, float]:
    """What the autoencoder alone keeps of fresh scenes: PSNR in dB, and accuracies in [0, 1]."""
    scenes = world.random_scenes(seed, count)
    video = clips(scenes)
    decoded = pipeline.vae.decode(pipeline.vae.encode(video).latent_dist.mode()).sample
    video, decoded = (v.clamp(-1, 1).transpose(1, 2) / 2 + 0.5 for v in (video, decoded))
    error = (video - decoded).square().mean(dim=(1, 2, 3, 4))  # per clip
    texts = [world.write_prompt(s.attributes, random.Random(0)) for s in scenes]
    shares = {f"vae_{key}": share for key, share in accuracy(decoded, texts).items()}
    return {"vae_psnr": float(-10 * error.log10().mean())} | shares


def contact_sheet(videos: Tensor, file: Path) -> None:
    """Write one row of frames per video, enlarged twice."""
    rows = videos.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # rows, columns, colours
    picture = Image.fromarray((rows * 255).round().byte().numpy())
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(file)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what only this teacher's measurement can be told."""
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--guidance", type=float, default=DEFAULT_GUIDANCE)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--split", choices=("train", "evaluation"), default="evaluation")
    parser.add_argument("--contact-sheet", type=Path, help="PNG of the first sixteen videos")


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Settings and numbers of a teacher folder.

    Args:
        folder: Pipeline folder.
        given: The options of `add_options`, and `seed`.
    """
    pipeline = load(folder)
    prompts = world.prompts(given.seed, given.prompts, given.split)
    begin = time.monotonic()
    videos = sample(pipeline, prompts, seed=given.seed, steps=given.steps, guidance=given.guidance)
    seconds = (time.monotonic() - begin) / len(prompts)
    if given.contact_sheet is not None:
        contact_sheet(videos[:16], given.contact_sheet)
    return {
        **{key: getattr(given, key) for key in ("steps", "guidance", "prompts", "seed", "split")},
        **{key: round(value, 4) for key, value in accuracy(videos, prompts).items()},
        **{k: round(v, 4) for k, v in reconstruction(pipeline, seed=given.seed).items()},
        "seconds_per_video": round(seconds, 3),
    }
