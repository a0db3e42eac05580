"""What the image teacher sees of the procedural world: square pictures of 24 classes at rest."""

import random
from collections.abc import Iterable

import torch
from torch import Tensor

from recon.zoo.world import COLOURS, SHAPES, Attributes, Scene, draw_frame, random_scene

SIDE = 64
"""Height and width of a picture, pixels."""
CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""Class names, such as "red circle"; a name's place is its class label."""


def attributes_of(label: int) -> Attributes:
    """Attributes of a class label in 0 to 23; a picture has no motion.

    Raises:
        ValueError: There is no such class.
    """
    if not 0 <= label < len(CLASSES):
        message = (
            f"The class label is {label}, but the image teacher has the classes 0 to "
            f"{len(CLASSES) - 1}. Take labels from the pipeline's get_label_ids."
        )
        raise ValueError(message)
    colour, shape = CLASSES[label].split()
    return Attributes(colour, shape, "still")


def label_of(scene: Scene) -> int:
    """Class label of a scene, whatever its motion."""
    return CLASSES.index(f"{scene.attributes.colour} {scene.attributes.shape}")


def random_scenes(seed: int, count: int) -> list[Scene]:
    """`count` scenes that go through all classes in shuffled rounds."""
    rng = random.Random(seed)
    drawn: list[Scene] = []
    while len(drawn) < count:
        labels = rng.sample(range(len(CLASSES)), len(CLASSES))
        drawn += [
            random_scene(attributes_of(label), rng, frames=1, height=SIDE, width=SIDE)
            for label in labels[: count - len(drawn)]
        ]
    return drawn


def scenes_of(labels: Iterable[int], seed: int) -> list[Scene]:
    """A scene of each class label, in order."""
    rng = random.Random(seed)
    return [
        random_scene(attributes_of(label), rng, frames=1, height=SIDE, width=SIDE)
        for label in labels
    ]


def pictures(scenes: Iterable[Scene]) -> Tensor:
    """Rendered scenes for the autoencoder, [batch, 3, 64, 64] in [-1, 1]."""
    return torch.stack([draw_frame(scene, height=SIDE, width=SIDE) for scene in scenes]) * 2 - 1
