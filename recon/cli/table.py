"""`recon table`: methods against baselines on the same seeds, as the README prints them.

Every row is a whole `recon fit` and `recon test` in its own process; runs of one seed share their
calibration set where they select alike, and all runs what the teacher and round-to-nearest sample.
Rows that are already in the folder are not run again.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from rich.console import Console

from recon.errors import ReconError

Method = tuple[tuple[str, ...], tuple[str, ...]]
"""Configurations under `configs`, the later ones over the earlier, and extra arguments."""

NO_SDS = ("--data.sds.metric", "random")
NO_STD = ("--model.std.lambda_min", "1.0")
NO_BALANCE = ("--model.balance", "none")
NO_RECONSTRUCTION = ("--model.reconstruct", "false")
ON_IMAGES = "models/image_teacher"
AS_LONG_AS_PTQ4DIT = ("--model.steps", "300", "--model.lr", "4e-2")


@dataclass(frozen=True)
class Teacher:
    """What the table runs on one of the embedded teachers, and where it keeps it."""

    methods: dict[str, Method]
    """Of each row. Round-to-nearest is measured beside every row."""
    selection: str
    """How configurations choose their calibration samples; a name for sets that are shared."""
    bits: tuple[str, ...]
    """Weight and activation bits where none are given."""
    folder: Path
    """Run folders where none is given."""


TEACHERS: dict[str, Teacher] = {
    "video": Teacher(
        {
            "smoothquant": (("smoothquant",), ()),
            "gptq": (("gptq",), ()),
            "adaround": (("adaround",), ()),
            "s2q_vdit": (("s2q_vdit",), ()),
            "s2q_base": (("s2q_vdit",), (*NO_SDS, *NO_STD)),
            "s2q_sds": (("s2q_vdit",), NO_STD),
            "s2q_std": (("s2q_vdit",), NO_SDS),
        },
        selection="salient",
        bits=("4:6", "4:4"),
        folder=Path("runs/table"),
    ),
    "image": Teacher(
        {
            "smoothquant": (("smoothquant", ON_IMAGES), ()),
            "gptq": (("gptq", ON_IMAGES), ()),
            "adaround": (("adaround", ON_IMAGES), AS_LONG_AS_PTQ4DIT),
            "ptq4dit": (("ptq4dit",), ()),
            "ptq4dit_faithful": (("ptq4dit_faithful",), ()),
            "ptq4dit_reconstruction": (("ptq4dit",), NO_BALANCE),
            "ptq4dit_from_weight": (("ptq4dit",), ("--model.rounding_start", "weight")),
            "ptq4dit_balancing": (("ptq4dit",), NO_RECONSTRUCTION),
            "ptq4dit_neither": (("ptq4dit",), (*NO_BALANCE, *NO_RECONSTRUCTION)),
            "ptq4dit_mean": (("ptq4dit",), ("--model.salience", "mean")),
            "ptq4dit_max": (("ptq4dit",), ("--model.salience", "max")),
            "ptq4dit_midpoint": (("ptq4dit",), ("--model.salience", "midpoint")),
        },
        selection="stratified",
        bits=("8:8", "4:8", "4:4"),
        folder=Path("runs/table_image"),
    ),
}

_LOCKS: defaultdict[Path, Lock] = defaultdict(Lock)


@dataclass(frozen=True)
class Row:
    """One run of the table."""

    method: str
    weight: int
    activation: int
    seed: int

    @property
    def name(self) -> str:
        """Of the run folder."""
        return f"{self.method}-w{self.weight}a{self.activation}-seed{self.seed}"


def table(arguments: Sequence[str]) -> None:
    """Runs what is missing and prints mean ± standard deviation over the seeds.

    Raises:
        ReconError: A run failed; names its log.
    """
    options = _options(arguments)
    bits = [tuple(int(part) for part in pair.split(":")) for pair in options.bits]
    # Seeds innermost: jobs side by side then make different calibration sets.
    rows = [Row(m, w, a, s) for m in options.methods for w, a in bits for s in options.seeds]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda row: _run(row, options), rows))
    lines = markdown(options.folder, options.methods, bits, options.seeds)
    Console().print("\n".join(lines), highlight=False, soft_wrap=True)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, with what follows from the teacher filled in."""
    parser = argparse.ArgumentParser("recon table", description=__doc__)
    parser.add_argument("--teacher", default="video", choices=list(TEACHERS))
    parser.add_argument("--folder", type=Path, help="runs/table or runs/table_image if not given.")
    parser.add_argument("--configs", type=Path, default=Path("configs"))
    named = "; ".join(f"{name}: {' '.join(t.methods)}" for name, t in TEACHERS.items())
    parser.add_argument("--methods", nargs="+", help=f"All if not given. {named}.")
    parser.add_argument("--bits", nargs="+", help="weight:activation")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="Runs at a time.")
    parser.add_argument("--extra", nargs="*", default=[], help="key=value for every fit and test.")
    options = parser.parse_args(arguments)
    teacher = TEACHERS[options.teacher]
    options.folder = options.folder or teacher.folder
    options.bits = options.bits or teacher.bits
    options.methods = options.methods or list(teacher.methods)
    unknown = [name for name in options.methods if name not in teacher.methods]
    if unknown:
        parser.error(
            f"--methods {unknown[0]} is none of {', '.join(teacher.methods)}, which the table has "
            f"for --teacher {options.teacher}"
        )
    return options


def _run(row: Row, options: argparse.Namespace) -> None:
    root = options.folder / row.name
    if (root / "test.json").is_file():
        return
    root.mkdir(parents=True, exist_ok=True)
    teacher = TEACHERS[options.teacher]
    configs, extra = teacher.methods[row.method]
    chosen = "random" if "random" in extra else teacher.selection
    calibration = options.folder / f"calibration-{chosen}-seed{row.seed}"
    shared = [
        *("--wandb", "false", "--media.after_fit", "0"),
        *(part for pair in options.extra for part in (f"--{pair}",)),
    ]
    fit = [
        "fit",
        *(part for name in configs for part in ("--config", str(options.configs / f"{name}.yaml"))),
        *extra,
        *("--model.weight.num_bits", str(row.weight)),
        *("--model.activation.num_bits", str(row.activation)),
        *("--model.seed", str(row.seed), "--data.seed", str(row.seed)),
        *("--data.folder", str(calibration)),
        *("--data.baselines", str(options.folder / "baselines")),
        *("--trainer.default_root_dir", str(root), "--ckpt_path", "last", *shared),
    ]
    if not (root / "summary.json").is_file():
        # The first run of a set makes it; two at once would get in each other's way.
        with _LOCKS[calibration] if not calibration.exists() else nullcontext():
            _call(fit, root)
    _call(["test", "--run", str(root), *shared], root)


def _call(arguments: list[str], root: Path) -> None:
    log = root / f"{arguments[0]}.log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "recon", *arguments]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise ReconError(f"`recon {arguments[0]}` of {root.name} failed. Read {log}.")


def markdown(
    folder: Path, methods: Sequence[str], bits: Sequence[tuple[int, ...]], seeds: Sequence[int]
) -> list[str]:
    """The table's lines from the json files under `folder`."""
    lines = [
        "| bits | method | output error / RTN's | paired PSNR, dB | SSIM | oracle, all right |",
        "|---|---|---|---|---|---|",
    ]
    for weight, activation in bits:
        label = f"W{weight}A{activation}"
        runs = {m: [folder / Row(m, weight, activation, s).name for s in seeds] for m in methods}
        tests = {m: [_read(run / "test.json") for run in found] for m, found in runs.items()}
        anyone = next(iter(tests.values()))
        teacher = _mean([test["full_precision"]["all"] for test in anyone], "{:.3f}")
        lines.append(f"| – | full precision | 0 | ∞ | 1 | {teacher} |")
        paired = [test["paired_round_to_nearest"] for test in anyone]
        oracle = [test["round_to_nearest"]["all"] for test in anyone]
        lines.append(_line(label, "round to nearest", [1.0] * len(seeds), paired, oracle))
        for method in methods:
            errors = [_read(run / "summary.json")["error"] for run in runs[method]]
            ratios = [error["reconstructed"] / error["round_to_nearest"] for error in errors]
            paired = [test["paired"] for test in tests[method]]
            oracle = [test["quantized"]["all"] for test in tests[method]]
            lines.append(_line(label, method, ratios, paired, oracle))
    return lines


def _line(
    label: str,
    method: str,
    ratios: list[float],
    paired: list[dict[str, float]],
    oracle: list[float],
) -> str:
    cells = [
        _mean(ratios, "{:.3f}"),
        _mean([row["psnr"] for row in paired], "{:.2f}"),
        _mean([row["ssim"] for row in paired], "{:.4f}"),
        _mean(oracle, "{:.3f}"),
    ]
    return f"| {label} | {method} | " + " | ".join(cells) + " |"


def _mean(values: list[float], form: str) -> str:
    mean = form.format(statistics.mean(values))
    return mean if len(values) < 2 else f"{mean} ± {form.format(statistics.stdev(values))}"


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content
