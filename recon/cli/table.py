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

from recon.cli.table_rows import OF_SAMPLES, TEACHERS, Column, Results
from recon.errors import ReconError

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
    columns = TEACHERS[options.teacher].columns
    lines = markdown(options.folder, options.methods, bits, options.seeds, columns)
    Console().print("\n".join(lines), highlight=False, soft_wrap=True)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line, with what follows from the teacher filled in."""
    parser = argparse.ArgumentParser("recon table", description=__doc__)
    parser.add_argument("--teacher", default="video", choices=list(TEACHERS))
    folders = ", ".join(str(teacher.folder) for teacher in TEACHERS.values())
    parser.add_argument("--folder", type=Path, help=f"One of {folders} if not given.")
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
        *_activation(row.activation),
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


def _activation(bits: int) -> tuple[str, str]:
    """16 bits are the network's own: activations are left alone."""
    if bits == 16:
        return "--model.activation", "null"
    return "--model.activation.num_bits", str(bits)


def _call(arguments: list[str], root: Path) -> None:
    log = root / f"{arguments[0]}.log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "recon", *arguments]
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise ReconError(f"`recon {arguments[0]}` of {root.name} failed. Read {log}.")


def markdown(
    folder: Path,
    methods: Sequence[str],
    bits: Sequence[tuple[int, ...]],
    seeds: Sequence[int],
    columns: Sequence[Column] = OF_SAMPLES,
) -> list[str]:
    """The table's lines from the json files under `folder`."""
    titles = ["bits", "method", "output error / RTN's", *(column.title for column in columns)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for weight, activation in bits:
        label = f"W{weight}A{activation}"
        runs = {m: [folder / Row(m, weight, activation, s).name for s in seeds] for m in methods}
        tests = {m: [_read(run / "test.json") for run in found] for m, found in runs.items()}
        anyone = next(iter(tests.values()))
        # No seed reaches the network itself.
        lines.append(_line("–", "full precision", [0.0], anyone[:1], "full_precision", columns))
        ones = [1.0] * len(seeds)
        lines.append(_line(label, "round to nearest", ones, anyone, "round_to_nearest", columns))
        for method in methods:
            errors = [_read(run / "summary.json")["error"] for run in runs[method]]
            ratios = [error["reconstructed"] / error["round_to_nearest"] for error in errors]
            lines.append(_line(label, method, ratios, tests[method], "quantized", columns))
    return lines


def _line(
    label: str,
    method: str,
    ratios: list[float],
    tests: Sequence[Results],
    model: str,
    columns: Sequence[Column],
) -> str:
    """One method's line: means over its tests."""
    cells = [
        _mean(ratios, "{:.3f}"),
        *(_mean([column.of(test, model) for test in tests], column.form) for column in columns),
    ]
    return f"| {label} | {method} | {' | '.join(cells)} |"


def _mean(values: list[float], form: str) -> str:
    mean = form.format(statistics.mean(values)).replace("inf", "∞")
    return mean if len(values) < 2 else f"{mean} ± {form.format(statistics.stdev(values))}"


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content
