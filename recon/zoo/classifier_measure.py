"""Measuring the world's classifier: its answers, and the distances of its features."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from recon.zoo.classifier_network import Classifier, load
from recon.zoo.classifier_training import faulty
from recon.zoo.image_scenes import CLASSES, pictures, scenes_of

_FAULTS = ("noise", "blur", "blocks")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what only this model's measurement can be told."""
    parser.add_argument("--rounds", type=int, default=40, help="pictures of each of the 24 classes")
    parser.add_argument("--share", type=float, default=0.5, help="of each fault, in [0, 1]")


@torch.no_grad()
def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Accuracy, and Fréchet distance from drawn pictures, of clean and of faulty pictures.

    Args:
        folder: Of the classifier's file.
        given: The options of `add_options`, and `seed`.
    """
    classifier = load(folder)
    labels = torch.arange(len(CLASSES)).repeat(given.rounds)
    reference, images = (
        pictures(scenes_of(labels.tolist(), seed)) / 2 + 0.5
        for seed in (given.seed, given.seed + 1)
    )
    sets = {"clean": images}
    generator = torch.Generator().manual_seed(given.seed)
    for index, name in enumerate(_FAULTS):
        shares = torch.zeros(len(images), len(_FAULTS))
        shares[:, index] = given.share
        sets[name] = faulty(images, shares, generator)
    return {
        **{key: getattr(given, key) for key in ("rounds", "share", "seed")},
        "accuracy": {name: round(_accuracy(classifier, x, labels), 4) for name, x in sets.items()},
        "fid": {name: round(_distance(classifier, x, reference), 3) for name, x in sets.items()},
    }


def _accuracy(classifier: Classifier, images: Tensor, labels: Tensor) -> float:
    logits, _ = classifier.answers(images)
    return float((logits.argmax(dim=1) == labels).double().mean())  # over classes, pictures


def _distance(classifier: nn.Module, images: Tensor, reference: Tensor) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=classifier, normalize=True)
    metric.update(reference, real=True)
    metric.update(images, real=False)
    return float(metric.compute())
