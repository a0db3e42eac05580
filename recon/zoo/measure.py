"""Measure an embedded model with the world's oracle: `python -m recon.zoo.measure video`.

Teachers are sampled through the stock pipeline, one seed per sample, or asked questions; JSON goes
to the standard output. The model cards' numbers come from here.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from recon.zoo import classifier_measure, folder, image_measure, video_measure, vlm_measure

_MEASUREMENTS: Mapping[
    str,
    tuple[
        Callable[[argparse.ArgumentParser], None],
        Callable[[Path, argparse.Namespace], dict[str, Any]],
    ],
] = MappingProxyType(
    {
        "video": (video_measure.add_options, video_measure.measure),
        "image": (image_measure.add_options, image_measure.measure),
        "vlm": (vlm_measure.add_options, vlm_measure.measure),
        "classifier": (classifier_measure.add_options, classifier_measure.measure),
    }
)
"""Model -> what adds its options, and what measures a folder with them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the model that the command line names and write the numbers as JSON."""
    parser = argparse.ArgumentParser(prog="python -m recon.zoo.measure", description=__doc__)
    teachers = parser.add_subparsers(dest="teacher", required=True)
    for name, (add_options, _) in _MEASUREMENTS.items():
        options = teachers.add_parser(name, help=f"the embedded {name} model")
        options.add_argument("--folder", type=Path, help="default: the shipped folder")
        options.add_argument("--seed", type=int, default=1000)
        add_options(options)
    given = parser.parse_args(arguments)
    _, measure = _MEASUREMENTS[given.teacher]
    numbers = measure(given.folder or folder(given.teacher), given)
    sys.stdout.write(json.dumps({"teacher": given.teacher, **numbers}, indent=2) + "\n")


if __name__ == "__main__":
    main()
