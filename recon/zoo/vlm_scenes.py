"""What the vision-language teacher sees of the procedural world: several shapes at rest.

A picture holds two to five objects, no two alike in both colour and shape, none touching another.
Pictures of the two splits are disjoint by construction, whatever their seeds: a checksum of the
names of a picture's objects says to which split it belongs.
"""

import math
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType

import torch
from PIL import Image
from torch import Tensor

from recon.zoo.world import BACKDROP, COLOURS, SHAPES, SLOPE, Split, coverage, shade

SIDE = 48
"""Height and width of a picture, pixels."""
OBJECTS = (2, 5)
"""Fewest and most objects of a picture."""
SIZES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"small": (3.4, 4.0), "large": (5.6, 6.2)}
)
"""Size name -> range of the radius of the circle of the same area, pixels."""
QUADRANTS = ("northwest", "northeast", "southwest", "southeast")
"""Quarters of a picture: a word each, as colours and shapes have."""
APART = 12.5
"""Least distance of two centres along at least one axis, pixels: more than the side of a patch, so
that no patch holds two centres."""

_GAP = 1.0
"""Least distance between the bounding boxes of two objects, pixels."""
_EVALUATION_SHARE = 4
"""One in so many sets of objects belongs to the evaluation split."""
_ATTEMPTS = 100
"""Places tried for an object before all are placed anew."""


@dataclass(frozen=True)
class Object:
    """A shape at its place; lengths are pixels and the vertical axis points down."""

    colour: str
    shape: str
    size: str
    x: float
    """Horizontal centre."""
    y: float
    """Vertical centre."""
    radius: float
    """Of the circle of the same area."""

    @property
    def name(self) -> str:
        """Colour and shape, which no other object of the picture shares."""
        return f"{self.colour} {self.shape}"

    @property
    def quadrant(self) -> str:
        """The quarter of the picture that holds the centre."""
        return QUADRANTS[2 * (self.y >= SIDE / 2) + (self.x >= SIDE / 2)]

    def reach(self) -> tuple[float, float]:
        """Half the width and half the height of the bounding box."""
        if self.shape == "circle":
            return self.radius, self.radius
        if self.shape == "ring":
            return 1.25 * self.radius, 1.25 * self.radius
        long, short = (self.radius * math.sqrt(math.pi * side) / 2 for side in (2.5, 1 / 2.5))
        return (long, short) if self.shape == "bar" else (short, long)


@dataclass(frozen=True)
class Arrangement:
    """A picture in full: drawing it is deterministic."""

    objects: tuple[Object, ...]
    backdrop: float
    """Mean grey level."""
    slope: float
    """Change of the grey level over one picture width."""
    angle: float
    """Direction in which the backdrop brightens, radians."""


def split_of(names: Sequence[str]) -> Split:
    """The split to which pictures of the objects of these names belong, in whatever order."""
    checksum = zlib.crc32(",".join(sorted(names)).encode())
    return "train" if checksum % _EVALUATION_SHARE else "evaluation"


def random_arrangement(rng: random.Random, split: Split) -> Arrangement:
    """A random picture of the split."""
    names: list[tuple[str, str]] = []
    while not names or split_of([" ".join(name) for name in names]) != split:
        names = _random_names(rng)
    placed = None
    while placed is None:
        placed = _place(names, rng)
    return Arrangement(
        objects=placed,
        backdrop=rng.uniform(*BACKDROP),
        slope=rng.uniform(*SLOPE),
        angle=rng.uniform(0, 2 * math.pi),
    )


def random_arrangements(seed: int, count: int, split: Split) -> list[Arrangement]:
    """`count` random pictures of the split."""
    rng = random.Random(f"{split} {seed}")
    return [random_arrangement(rng, split) for _ in range(count)]


def _random_names(rng: random.Random) -> list[tuple[str, str]]:
    """Colours and shapes of a picture's objects: few of each, so that some occur repeatedly."""
    colours = rng.sample(list(COLOURS), rng.randint(2, 4))
    shapes = rng.sample(SHAPES, rng.randint(2, 4))
    combinations = list(product(colours, shapes))
    return rng.sample(combinations, min(rng.randint(*OBJECTS), len(combinations)))


def _place(names: Sequence[tuple[str, str]], rng: random.Random) -> tuple[Object, ...] | None:
    """The objects at random free places, or None where one finds none."""
    placed: list[Object] = []
    for colour, shape in names:
        size = rng.choice(list(SIZES))
        radius = rng.uniform(*SIZES[size])
        for _ in range(_ATTEMPTS):
            x, y = rng.uniform(0, SIDE), rng.uniform(0, SIDE)
            candidate = Object(colour, shape, size, x, y, radius)
            if _is_inside(candidate) and not any(_collide(candidate, other) for other in placed):
                placed.append(candidate)
                break
        else:
            return None
    return tuple(placed)


def _is_inside(one: Object) -> bool:
    """Whether the object lies inside the picture."""
    return all(
        reach + _GAP <= centre <= SIDE - reach - _GAP
        for centre, reach in zip((one.x, one.y), one.reach(), strict=True)
    )


def _collide(one: Object, other: Object) -> bool:
    """Whether two objects are too close to one another."""
    across, down = abs(one.x - other.x), abs(one.y - other.y)
    width, height = (a + b + _GAP for a, b in zip(one.reach(), other.reach(), strict=True))
    return (across < width and down < height) or max(across, down) < APART


def draw(arrangement: Arrangement) -> Tensor:
    """The picture, [3, 48, 48] in [0, 1], anti-aliased."""
    picture = shade(arrangement, SIDE, SIDE).expand(3, SIDE, SIDE)
    for each in arrangement.objects:
        x, y, radius = (torch.tensor([value]) for value in (each.x, each.y, each.radius))
        cover = coverage(each.shape, x, y, radius, SIDE, SIDE)
        colour = torch.tensor(COLOURS[each.colour])[:, None, None]
        picture = cover * colour + (1 - cover) * picture
    return picture.clamp(0, 1)


def pixels(arrangement: Arrangement) -> Tensor:
    """The picture as an image file would hold it, [3, 48, 48], whole numbers in [0, 255]."""
    return (draw(arrangement) * 255).round().byte()


def photograph(arrangement: Arrangement) -> Image.Image:
    """The picture for an image processor."""
    return Image.fromarray(pixels(arrangement).permute(1, 2, 0).contiguous().numpy())
