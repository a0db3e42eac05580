"""Reproduce an embedded teacher: `python -m recon.zoo.train video --seed 0 --out FOLDER`."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from recon.zoo import TEACHERS
from recon.zoo.video_recipe import Recipe
from recon.zoo.video_training import train


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the teacher that the command line names and write its folder."""
    parser = argparse.ArgumentParser(prog="python -m recon.zoo.train", description=__doc__)
    parser.add_argument("teacher", choices=TEACHERS)
    parser.add_argument("--out", type=Path, help="default: the shipped folder, replaced")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    for field in fields(Recipe):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    given = vars(parser.parse_args(arguments))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    out = given.pop("out") or Path(__file__).parent / given["teacher"]
    threads = given.pop("threads")
    if threads is not None:
        torch.set_num_threads(threads)
    del given["teacher"]
    train(Recipe(**given), out)


if __name__ == "__main__":
    main()
