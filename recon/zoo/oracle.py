"""The exact oracle of the procedural world: what a clip or picture shows, by image measurement.

The backdrop is grey and the shape is not, so saturation (largest minus smallest channel) tells them
apart. Colour is the hue under the mask, shape the best of four templates of the measured position
and area, motion the track of the mask's centroid. All thresholds lie far from what the world draws,
so that a slight blur from a decoder changes no answer, and a clip without a clear shape gets none.

A picture is measured as a clip of one frame, without motion.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from recon.zoo.world import (
    COLOURS,
    MOTIONS,
    RADIUS,
    SHAPES,
    SPEED,
    Attributes,
    coverage,
    parse_prompt,
)

MIN_SATURATION = 0.30
"""Largest minus smallest channel inside a shape: the palest colour of the world has 0.6."""
MAX_HUE_ERROR = 28.0
"""Degrees; neighbouring colours lie at least 50 apart."""
MIN_OVERLAP = 0.62
"""Intersection over union with the best template. Another shape's template stays below 0.58, so
nothing passes for what it is not; the right one has 0.97 and more on drawn scenes, and after the
video decoder, which blurs the thin ring most, 0.65 and more."""
RADII = (0.6 * RADIUS[0], 1.5 * RADIUS[1])
"""Pixels; the area of a shape is that of a circle with a radius between these. Without the upper
one, a picture all of one colour would come close to a circle."""
BLURS = (1, 3)
"""Widths of the box filters under which templates are tried, odd numbers of pixels."""
MIN_AREA_SHARE = 0.5
"""Smallest frame's mask area over the median one: below, the shape vanishes on the way."""
MAX_TRACK_ERROR = 1.5
"""Pixels, root mean square distance of the centroids from a straight, even track."""


def judge(video: Tensor, prompt: str) -> dict[str, bool]:
    """Whether the video shows what the prompt asks for.

    Args:
        video: [frames, 3, height, width] in [0, 1].
        prompt: A prompt of this world.

    Returns:
        One answer each for "colour", "shape" and "motion".

    Raises:
        ValueError: The prompt does not word exactly one scene of this world, or the video is not
            a clip of at least two colour frames.
    """
    wanted = parse_prompt(prompt)
    if wanted is None:
        message = (
            f"The prompt {prompt!r} does not name exactly one colour, one shape and one motion in "
            "the words of this world. Take prompts from recon.zoo.world.prompts."
        )
        raise ValueError(message)
    seen = describe(video)
    return {key: seen[key] == getattr(wanted, key) for key in ("colour", "shape", "motion")}


def describe(video: Tensor) -> dict[str, str | None]:
    """Measured colour, shape and motion of a video; None where there is no clear answer.

    Args:
        video: [frames, 3, height, width] in [0, 1].

    Raises:
        ValueError: The video is not a clip of at least two colour frames.
    """
    if video.ndim != 4 or video.shape[1] != 3 or video.shape[0] < 2:
        message = (
            f"The video has shape {list(video.shape)}; the oracle needs [frames, 3, height, width] "
            "with at least 2 frames. Permute or stack the frames first."
        )
        raise ValueError(message)
    video = _clean(video)
    mask = _segment(video)
    if mask is None:
        return {"colour": None, "shape": None, "motion": None}
    x, y, area = _track(mask)
    return {
        "colour": _colour(video, mask),
        "shape": _shape(mask, x, y, area),
        "motion": _motion(x, y, area),
    }


def judge_picture(picture: Tensor, colour: str, shape: str) -> dict[str, bool]:
    """Whether the picture shows the shape in the colour.

    Args:
        picture: [3, height, width] in [0, 1].
        colour: A colour of this world.
        shape: A shape of this world.

    Returns:
        One answer each for "colour" and "shape".

    Raises:
        ValueError: This world has no such colour or shape, or the picture is not one.
    """
    wanted = Attributes(colour, shape, "still")
    seen = describe_picture(picture)
    return {key: seen[key] == getattr(wanted, key) for key in ("colour", "shape")}


def describe_picture(picture: Tensor) -> dict[str, str | None]:
    """Measured colour and shape of a picture; None where there is no clear answer.

    Args:
        picture: [3, height, width] in [0, 1].

    Raises:
        ValueError: The tensor is not one colour picture.
    """
    if picture.ndim != 3 or picture.shape[0] != 3:
        message = (
            f"The picture has shape {list(picture.shape)}; the oracle needs [3, height, width]. "
            "Permute it, or judge the pictures of a batch one by one."
        )
        raise ValueError(message)
    frames = _clean(picture[None])
    mask = _segment(frames)
    if mask is None:
        return {"colour": None, "shape": None}
    return {"colour": _colour(frames, mask), "shape": _shape(mask, *_track(mask))}


def _clean(video: Tensor) -> Tensor:
    """The video in single precision on the CPU, in [0, 1], without NaN."""
    return video.detach().float().cpu().nan_to_num().clamp(0, 1)


def _segment(video: Tensor) -> Tensor | None:
    """Soft mask [frames, height, width] of what is not grey, None where a frame has nothing."""
    saturation = video.amax(dim=1) - video.amin(dim=1)  # over colour channels
    # The shape covers 6 to 11 % of the picture, so the top 4 % of the pixels are inside it.
    inside = float(torch.quantile(saturation.flatten(1), 0.96, dim=1).median())
    if inside < MIN_SATURATION:
        return None
    mask = _steepen(saturation / inside)
    return mask if float(mask.sum(dim=(1, 2)).min()) >= 1.0 else None


def _steepen(cover: Tensor) -> Tensor:
    """Steeper edges, symmetric about one half: keeps the area and drops faint haze."""
    return ((cover - 0.2) / 0.6).clamp(0, 1)


def _track(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids x, y and areas of the masks, each [frames], pixels and square pixels."""
    _, height, width = mask.shape
    area = mask.sum(dim=(1, 2))
    x = (mask.sum(dim=1) * (torch.arange(width) + 0.5)).sum(dim=1) / area
    y = (mask.sum(dim=2) * (torch.arange(height) + 0.5)).sum(dim=1) / area
    return x, y, area


def _hue(rgb: Tensor) -> float:
    """Hue of a colour [3], degrees in [0, 360), by the hexagon projection."""
    red, green, blue = rgb.tolist()
    return math.degrees(math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360


def _colour(video: Tensor, mask: Tensor) -> str | None:
    weight = mask.square()[:, None]  # the square discounts the mixed pixels of the edge
    mean = (video * weight).sum(dim=(0, 2, 3)) / weight.sum()
    if float(mean.max() - mean.min()) < MIN_SATURATION:
        return None  # coloured pixels of many hues, such as noise
    hue = _hue(mean)
    distance = {
        name: abs((hue - _hue(torch.tensor(rgb)) + 180) % 360 - 180)
        for name, rgb in COLOURS.items()
    }
    best = min(distance, key=distance.__getitem__)
    return best if distance[best] <= MAX_HUE_ERROR else None


def _shape(mask: Tensor, x: Tensor, y: Tensor, area: Tensor) -> str | None:
    radius = (area / math.pi).sqrt()
    if not RADII[0] <= float(radius.median()) <= RADII[1]:
        return None
    overlap = dict.fromkeys(SHAPES, 0.0)
    for shape in SHAPES:
        sharp = coverage(shape, x, y, radius, *mask.shape[1:])
        # A decoder rounds corners off: a blurred square must meet a blurred square, or it would
        # look more like a circle.
        for width in BLURS:
            template = _steepen(_blur(sharp, width))
            shared = torch.minimum(mask, template).sum(dim=(1, 2))
            either = torch.maximum(mask, template).sum(dim=(1, 2))
            overlap[shape] = max(overlap[shape], float((shared / either).mean()))  # over frames
    best = max(overlap, key=overlap.__getitem__)
    return best if overlap[best] >= MIN_OVERLAP else None


def _blur(cover: Tensor, width: int) -> Tensor:
    """Two box filters of `width` pixels over [frames, height, width]; 1 changes nothing."""
    for _ in range(2):
        cover = functional.avg_pool2d(cover, width, stride=1, padding=width // 2)
    return cover


def _motion(x: Tensor, y: Tensor, area: Tensor) -> str | None:
    frames = len(x)
    time = torch.arange(frames) - (frames - 1) / 2
    track = torch.stack([x, y])  # [2, frames]
    speed = (track * time).sum(dim=1) / time.square().sum()  # least squares, pixels per frame
    ideal = track.mean(dim=1, keepdim=True) + speed[:, None] * time
    error = float((track - ideal).square().sum(dim=0).mean().sqrt())
    if error > MAX_TRACK_ERROR or area.min() < MIN_AREA_SHARE * area.median():
        return None
    for motion, step in MOTIONS.items():
        direction = torch.tensor(step, dtype=torch.float32)
        along = float((speed * direction).sum())
        across = float((speed - along * direction).norm())
        # Half the slowest drawn speed counts as moving; a fifth of it still counts as rest.
        if motion == "still":
            if across < 0.2 * SPEED[0]:
                return motion
        elif along > 0.5 * SPEED[0] and across < 0.35 * along:
            return motion
    return None
