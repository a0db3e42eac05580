"""The procedural world: one coloured shape that moves over a soft grey backdrop.

Every embedded teacher learns this world, and its exact oracle turns their task metric into a
measurement: no second network judges the first. A scene is colour x shape x motion plus nuisances
(position, size, speed, backdrop); `draw` renders it, `write_prompt` words it, `judge` measures it.

Lengths are pixels, speeds pixels per frame, the vertical axis points down, colours lie in [0, 1].
"""

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol

import torch
from torch import Tensor

FRAMES = 9
HEIGHT = 56
WIDTH = 64
"""Default clip. Height and width differ on purpose: code that swaps them fails at once."""

COLOURS: Mapping[str, tuple[float, float, float]] = MappingProxyType(
    {
        "red": (0.90, 0.15, 0.15),
        "yellow": (0.90, 0.85, 0.15),
        "green": (0.15, 0.75, 0.20),
        "cyan": (0.15, 0.80, 0.85),
        "blue": (0.20, 0.30, 0.95),
        "magenta": (0.85, 0.20, 0.85),
    }
)
SHAPES = ("circle", "ring", "bar", "pillar")
"""Coarse on purpose: a small network sees cells of 4 x 4 pixels, in which a square and a circle of
the same area hardly differ."""
MOTIONS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
)
"""Motion name -> unit step (horizontal, vertical)."""

RADIUS = (9.0, 11.0)
"""Pixels; the radius of the circle of the same area, so that size does not give the shape away."""
SPEED = (1.6, 2.1)
BACKDROP = (0.15, 0.35)
SLOPE = (0.0, 0.12)
EXTENT: Mapping[str, float] = MappingProxyType(
    {"circle": 1.0, "ring": 1.25, "bar": 1.41, "pillar": 1.41}
)
"""Farthest a shape reaches from its centroid along an axis, in radii."""

Split = Literal["train", "evaluation"]
_DIRECTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "left": ("left", "to the left"),
        "right": ("right", "to the right"),
        "up": ("up", "to the top"),
        "down": ("down", "to the bottom"),
        "still": ("still",),
    }
)
_FORMS: Mapping[Split, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        # Each entry: the wording of a moving scene, the wording of a still one.
        "train": (
            ("a {} {} moving {}", "a {} {} standing {}"),
            ("a {} {} moves {}", "a {} {} stays {}"),
            ("the {} {} drifts {}", "the {} {} rests {}"),
            ("the {} {} is moving {}", "the {} {} is standing {}"),
            ("{} {} going {}", "{} {} standing {}"),
            ("there is a {} {} moving {}", "there is a {} {} standing {}"),
        ),
        # Known words in orders that training has never shown.
        "evaluation": (
            ("the {} {} moves {}", "the {} {} stays {}"),
            ("a {} {} drifts {}", "a {} {} rests {}"),
            ("there is a {} {} going {}", "there is the {} {} standing {}"),
        ),
    }
)
_MOTION_WORDS = MappingProxyType(
    {phrase.split()[-1]: motion for motion, phrases in _DIRECTIONS.items() for phrase in phrases}
)


@dataclass(frozen=True)
class Attributes:
    """What a prompt says of a scene, and what the oracle checks."""

    colour: str
    shape: str
    motion: str

    def __post_init__(self) -> None:
        """Refuse a name that this world does not have."""
        for field, known in (("colour", COLOURS), ("shape", SHAPES), ("motion", MOTIONS)):
            value = getattr(self, field)
            if value not in known:
                message = (
                    f"Attributes.{field} is {value!r}, which this world does not have. "
                    f"Choose one of {', '.join(known)}."
                )
                raise ValueError(message)


@dataclass(frozen=True)
class Scene:
    """One scene in full: drawing it is deterministic."""

    attributes: Attributes
    x: float
    """Horizontal centre at mid-clip, pixels."""
    y: float
    """Vertical centre at mid-clip, pixels."""
    radius: float
    speed: float
    """Pixels per frame; a still scene ignores it."""
    backdrop: float
    """Mean grey level."""
    slope: float
    """Change of the grey level over one frame width."""
    angle: float
    """Direction in which the backdrop brightens, radians."""


def every_attributes() -> list[Attributes]:
    """All combinations of colour, shape and motion, in a fixed order."""
    return [Attributes(c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS]


def random_scene(
    attributes: Attributes,
    rng: random.Random,
    *,
    frames: int = FRAMES,
    height: int = HEIGHT,
    width: int = WIDTH,
) -> Scene:
    """A scene of the given attributes with random nuisances that never leaves the picture.

    Raises:
        ValueError: The picture is too small for the longest path of the largest shape.
    """
    radius, speed = rng.uniform(*RADIUS), rng.uniform(*SPEED)
    step_x, step_y = MOTIONS[attributes.motion]
    half_path = speed * (frames - 1) / 2
    centre = []
    for size, step in ((width, step_x), (height, step_y)):
        margin = 1 + EXTENT[attributes.shape] * radius + abs(step) * half_path
        if 2 * margin > size:
            message = (
                f"A picture side of {size} pixels cannot hold a path of {frames} frames, which "
                f"needs {2 * margin:.0f}. Enlarge the picture or draw fewer frames."
            )
            raise ValueError(message)
        centre.append(rng.uniform(margin, size - margin))
    return Scene(
        attributes=attributes,
        x=centre[0],
        y=centre[1],
        radius=radius,
        speed=speed,
        backdrop=rng.uniform(*BACKDROP),
        slope=rng.uniform(*SLOPE),
        angle=rng.uniform(0, 2 * math.pi),
    )


def random_scenes(seed: int, count: int) -> list[Scene]:
    """`count` scenes that go through all attribute combinations in shuffled rounds."""
    rng = random.Random(seed)
    drawn: list[Scene] = []
    while len(drawn) < count:
        combinations = every_attributes()
        rng.shuffle(combinations)
        drawn += [random_scene(a, rng) for a in combinations[: count - len(drawn)]]
    return drawn


def draw(scene: Scene, *, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """Video of the scene, shape [frames, 3, height, width], anti-aliased, in [0, 1]."""
    step_x, step_y = MOTIONS[scene.attributes.motion]
    travelled = scene.speed * (torch.arange(frames) - (frames - 1) / 2)
    return _paint(scene, scene.x + step_x * travelled, scene.y + step_y * travelled, height, width)


def draw_frame(scene: Scene, *, height: int = HEIGHT, width: int = WIDTH) -> Tensor:
    """Picture of the scene at mid-clip, shape [3, height, width], in [0, 1]."""
    return _paint(scene, torch.tensor([scene.x]), torch.tensor([scene.y]), height, width)[0]


def _paint(scene: Scene, x: Tensor, y: Tensor, height: int, width: int) -> Tensor:
    """Shape over backdrop for centres `x`, `y` [frames]; [frames, 3, height, width]."""
    backdrop = shade(scene, height, width)
    radius = torch.full_like(x, scene.radius)
    cover = coverage(scene.attributes.shape, x, y, radius, height, width)[:, None]
    colour = torch.tensor(COLOURS[scene.attributes.colour]).view(1, 3, 1, 1)
    return (cover * colour + (1 - cover) * backdrop).clamp(0, 1)


class Backdrop(Protocol):
    """What the grey behind the shapes depends on."""

    @property
    def backdrop(self) -> float:
        """Mean grey level."""

    @property
    def slope(self) -> float:
        """Change of the grey level over one frame width."""

    @property
    def angle(self) -> float:
        """Direction in which the backdrop brightens, radians."""


def shade(scene: Backdrop, height: int, width: int) -> Tensor:
    """Grey levels of the backdrop, [height, width]."""
    rows, columns = _pixel_grid(height, width)
    along = math.cos(scene.angle) * (columns - width / 2) + math.sin(scene.angle) * (
        rows - height / 2
    )
    return scene.backdrop + scene.slope * along / width


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor, height: int, width: int) -> Tensor:
    """Share of each pixel that the shape covers, [frames, height, width].

    Centroids `x`, `y` and the radius of the circle of the same area are [frames], in pixels.
    """
    rows, columns = _pixel_grid(height, width)
    dx = columns - x.view(-1, 1, 1)
    dy = rows - y.view(-1, 1, 1)
    return (0.5 - _distance(shape, dx, dy, radius.view(-1, 1, 1))).clamp(0, 1)


def _distance(shape: str, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Signed distance to the outline, negative inside; every shape has the area pi radius^2."""
    from_centre = (dx.square() + dy.square()).sqrt()
    if shape == "circle":
        return from_centre - radius
    if shape == "ring":
        return torch.maximum(from_centre - 1.25 * radius, 0.75 * radius - from_centre)
    long, short = (radius * math.sqrt(math.pi * ratio) / 2 for ratio in (2.5, 1 / 2.5))
    if shape == "bar":
        return torch.maximum(dx.abs() - long, dy.abs() - short)
    return torch.maximum(dx.abs() - short, dy.abs() - long)  # pillar


def _pixel_grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Pixel centres: rows [height, 1] and columns [1, width]."""
    return torch.arange(height)[:, None] + 0.5, torch.arange(width)[None, :] + 0.5


def write_prompt(attributes: Attributes, rng: random.Random, split: Split = "train") -> str:
    """One of the split's wordings of the attributes."""
    moving, resting = rng.choice(_FORMS[split])
    form = resting if attributes.motion == "still" else moving
    direction = rng.choice(_DIRECTIONS[attributes.motion])
    return form.format(attributes.colour, attributes.shape, direction)


def every_prompt(split: Split) -> list[str]:
    """All prompts of a split, sorted. No prompt belongs to both splits."""
    return sorted(
        {
            (resting if a.motion == "still" else moving).format(a.colour, a.shape, direction)
            for a in every_attributes()
            for moving, resting in _FORMS[split]
            for direction in _DIRECTIONS[a.motion]
        }
    )


def prompts(seed: int, count: int, split: Split = "evaluation") -> list[str]:
    """`count` prompts whose attribute combinations go round in shuffled order.

    Evaluation prompts are worded as training and calibration never word them, about the same
    attribute combinations: disjoint in text, alike in meaning.
    """
    rng = random.Random(seed)
    written: list[str] = []
    while len(written) < count:
        combinations = every_attributes()
        rng.shuffle(combinations)
        written += [write_prompt(a, rng, split) for a in combinations[: count - len(written)]]
    return written


def train_prompts(seed: int, count: int) -> list[str]:
    """`count` prompts in the wordings meant for training and calibration."""
    return prompts(seed, count, split="train")


def shared_prompts(one: Iterable[str], other: Iterable[str]) -> set[str]:
    """Prompts that two sets have in common, empty for prompts of the two splits."""
    return set(one) & set(other)


def vocabulary() -> list[str]:
    """All words of all prompts, sorted."""
    texts = [text for split in _FORMS for text in every_prompt(split)]
    return sorted({word for text in texts for word in text.split()})


def parse_prompt(prompt: str) -> Attributes | None:
    """What the prompt asks for, or None where it does not name one of each, and nothing else."""
    words = prompt.lower().split()
    colours = {word for word in words if word in COLOURS}
    shapes = {word for word in words if word in SHAPES}
    motions = {_MOTION_WORDS[word] for word in words if word in _MOTION_WORDS}
    known = all(word in _VOCABULARY for word in words)
    if not known or not len(colours) == len(shapes) == len(motions) == 1:
        return None
    return Attributes(colours.pop(), shapes.pop(), motions.pop())


_VOCABULARY = frozenset(vocabulary())
