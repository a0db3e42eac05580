"""Reproduce an embedded model: `python -m recon.zoo.train video --seed 0 --out FOLDER`."""

import argparse
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from recon.zoo import (
    classifier_training,
    image_recipe,
    image_training,
    video_recipe,
    video_training,
    vlm_recipe,
    vlm_training,
)

_TRAININGS: Mapping[str, tuple[type[Any], Callable[[Any, Path], None]]] = MappingProxyType(
    {
        "video": (video_recipe.Recipe, video_training.train),
        "image": (image_recipe.Recipe, image_training.train),
        "vlm": (vlm_recipe.Recipe, vlm_training.train),
        "classifier": (classifier_training.Recipe, classifier_training.train),
    }
)
"""Model -> its recipe, every field of which is an option, and what it trains with."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the model that the command line names and write its folder."""
    given = vars(_parser().parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    teacher, out, threads = (given.pop(name) for name in ("teacher", "out", "threads"))
    if threads is not None:
        torch.set_num_threads(threads)
    recipe, train = _TRAININGS[teacher]
    train(recipe(**given), out or Path(__file__).parent / teacher)


def _parser() -> argparse.ArgumentParser:
    """Command line with one subcommand per model."""
    parser = argparse.ArgumentParser(prog="python -m recon.zoo.train", description=__doc__)
    teachers = parser.add_subparsers(dest="teacher", required=True)
    for name, (recipe, _) in _TRAININGS.items():
        options = teachers.add_parser(name, help=f"the embedded {name} model")
        options.add_argument("--out", type=Path, help="default: the shipped folder, replaced")
        options.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
        for field in fields(recipe):
            option = f"--{field.name.replace('_', '-')}"
            options.add_argument(
                option,
                type=type(field.default),
                default=field.default,
                help=f"default: {field.default}",
            )
    return parser


if __name__ == "__main__":
    main()
