"""Frames, height and width of what CogVideoX samples."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recon.errors import ConfigError
from recon.models.folder import read_json

LARGEST_OF_1_5 = (300, 300)
"""sample_height and sample_width that CogVideoX 1.5 was published with: how far its rotary table
reaches, and no size that it was trained to sample."""
PIXELS_OF_DIFFUSERS = 8
"""CogVideoXPipeline takes multiples of it, whatever the VAE."""


@dataclass(frozen=True)
class VideoSize:
    """Frames, and the pixels of each."""

    frames: int
    height: int
    width: int


def spatial_factor(folder: Path, owner: str) -> int:
    """Pixels of a frame in one of the latents, to each side; 8 where there is no VAE.

    Args:
        folder: Of the pipeline.
        owner: Class whose `folder` it is, for the message.

    Raises:
        ConfigError: The VAE's config.json is not JSON.

    Source: diffusers 0.42, CogVideoXPipeline.__init__.
    """
    file = folder / "vae" / "config.json"
    blocks = read_json(file, owner).get("block_out_channels") if file.is_file() else None
    return 8 if blocks is None else int(2 ** (len(blocks) - 1))


def video_size(config: Any, factor: int, given: Mapping[str, int]) -> VideoSize:
    """What is sampled: the given numbers, for others those of the network's config.

    Args:
        config: Of a CogVideoXTransformer3DModel, with its defaults.
        factor: Pixels of a frame in one of the latents, to each side.
        given: `frames`, `height`, `width`, or some of them.

    Raises:
        ConfigError: VAE and patches do not divide a given number, the network has no positions for
            it, or none is given for a network whose config holds no size to sample.
    """
    own = VideoSize(
        config.sample_frames, factor * config.sample_height, factor * config.sample_width
    )
    _refuse_largest(config, own, given)
    for name, value in given.items():
        if config.use_learned_positional_embeddings:
            _refuse_unlearned(name, value, getattr(own, name))
        elif name == "frames":
            _refuse_frames(value, config.temporal_compression_ratio)
        else:
            # The rotary table of patches over frames is cut out of one of the configured size.
            most = getattr(own, name) if config.patch_size_t else None
            _refuse_pixels(name, value, factor * config.patch_size, most)
    return replace(own, **given)


def _refuse_largest(config: Any, own: VideoSize, given: Mapping[str, int]) -> None:
    published = (config.sample_height, config.sample_width) == LARGEST_OF_1_5
    if config.patch_size_t and published and not {"height", "width"} <= given.keys():
        raise ConfigError(
            f"CogVideoX.height and width are not both given, and config.json holds {own.height}x"
            f"{own.width} pixels: how far the rotary table of CogVideoX 1.5 reaches, not what it "
            "samples. Set frames: 81, height: 768 and width: 1360, its published size."
        )


def _refuse_unlearned(name: str, value: int, own: int) -> None:
    if value != own:
        raise ConfigError(
            f"CogVideoX.{name} is {value}, but the network has learned a position for every token "
            f"of config.json's {own}, and has none for others. Use {own}, or null."
        )


def _refuse_frames(value: int, ratio: int) -> None:
    if value < 1 or (value - 1) % ratio:
        nearest = 1 + ratio * max(round((value - 1) / ratio), 0)
        raise ConfigError(
            f"CogVideoX.frames is {value}; the VAE takes the first frame by itself and the others "
            f"by {ratio}, so it must be {ratio} n + 1. The nearest is {nearest}."
        )


def _refuse_pixels(name: str, value: int, patch: int, most: int | None) -> None:
    unit = math.lcm(patch, PIXELS_OF_DIFFUSERS)
    largest = math.inf if most is None else most // unit * unit
    if value >= 1 and value % unit == 0 and value <= largest:
        return
    nearest = min(max(round(value / unit), 1) * unit, largest)
    reach = "" if most is None else f", and at most {largest}, where the rotary table ends"
    raise ConfigError(
        f"CogVideoX.{name} is {value}; VAE and patches divide frames into squares of {unit} "
        f"pixels, so it must be a multiple of {unit}{reach}. The nearest is {nearest}."
    )
