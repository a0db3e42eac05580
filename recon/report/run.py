"""What a run folder says about itself, finished or not; any part of it may be missing."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from recon.calibration.artefact import CalibrationSet
from recon.engine.native import Native, read_native
from recon.errors import CheckpointMismatch, ConfigError

TIMES = frozenset({"seconds", "step"})
"""Entries of a closed unit that are no findings: one differs from run to run, one is a position."""


@dataclass(frozen=True)
class ClosedUnit:
    """A unit that learned, and what came of it."""

    name: str
    """Empty while the run is unfinished: only its manifest has the names."""
    blocks: tuple[str, ...]
    first: int
    """Optimizer steps of the run before the unit."""
    last: int
    """Optimizer steps of the run when it was closed."""
    results: dict[str, float]
    """`error_before` (round to nearest) and `error_after`, losses, what its stages found."""

    @property
    def label(self) -> str:
        """Short, `layers.0–2` for three blocks of a longer name; empty as `name` is."""
        if not self.blocks:
            return self.name
        first, last = (block.split(".") for block in (self.blocks[0], self.blocks[-1]))
        until = f"–{last[-1]}" if len(self.blocks) > 1 else ""
        return ".".join(first[-2:]) + until


@dataclass(frozen=True)
class Missing:
    """Why there is nothing to show, and the command that would make it."""

    reason: str
    command: str = ""


@dataclass(frozen=True)
class Run:
    """A run folder.

    Args:
        root: The folder, as it was given: commands in the page name it so.
        name: Distinguishes it from the page's other runs.
    """

    root: Path
    name: str

    @cached_property
    def native(self) -> Native | None:
        """Its result; None where the run has not ended.

        Raises:
            CheckpointMismatch: The result is damaged, or of another format version.
        """
        if not (self.root / "quantized" / "manifest.json").is_file():
            return None
        return read_native(self.root)

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Of the result; empty where the run has not ended."""
        return self.native.manifest if self.native else {}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json, written last; empty where the run has not ended."""
        return self.json("summary.json")

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """test.json, or validate.json where there is no test; empty without either."""
        return self.json(f"{self.evaluated}.json")

    @property
    def evaluated(self) -> str:
        """The command that made `evaluation`."""
        return "test" if (self.root / "test.json").is_file() else "validate"

    @cached_property
    def config_text(self) -> str:
        """config.yaml as it stands; empty without one."""
        path = self.root / "config.yaml"
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.yaml; empty without one."""
        return yaml.safe_load(self.config_text) or {}

    @cached_property
    def typed(self) -> str:
        """The command line that started the run; empty where it was not kept."""
        path = self.root / "command.txt"
        return path.read_text(encoding="utf-8").strip() if path.is_file() else ""

    @property
    def finished(self) -> bool:
        """Whether the run wrote all it writes."""
        return bool(self.native and self.summary)

    @property
    def method(self) -> str:
        """Name of the method's class."""
        configured = self.config.get("model", {}).get("class_path", "")
        return str(self.manifest.get("method") or configured.rpartition(".")[2])

    def command(self, verb: str, *more: str) -> str:
        """A command line about this run."""
        return " ".join(["recon", verb, "--run", str(self.root), *more])

    def json(self, name: str) -> dict[str, Any]:
        """A json file of the folder; empty where it is not there."""
        path = self.root / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    # What learned -------------------------------------------------------------------------------

    @cached_property
    def steps(self) -> list[dict[str, float]]:
        """Rows of metrics.csv in the order of their steps, the newest of a step written twice."""
        path = self.root / "metrics.csv"
        if not path.is_file():
            return []
        found: dict[tuple[int, bool], dict[str, float]] = {}
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                # A line cut short by a kill has fewer fields.
                if row.get("step") and None not in row.values():
                    numbers = {name: float(value) for name, value in row.items() if value}
                    found[int(row["step"]), "unit/index" in numbers] = numbers
        return [found[key] for key in sorted(found)]

    @cached_property
    def units(self) -> list[ClosedUnit]:
        """The closed units in order: of the manifest, or of metrics.csv while there is none."""
        history = self.manifest.get("unit_errors")
        if history is None:
            history = [
                {key.removeprefix("unit/"): v for key, v in row.items() if key.startswith("unit/")}
                | {"step": row["step"]}
                for row in self.steps
                if "unit/index" in row
            ]
        names: Sequence[tuple[str, Sequence[str]]] = list(self.manifest.get("units", {}).items())
        units, first = [], 0
        for place, entry in enumerate(history):
            name, blocks = names[place] if names else ("", ())
            last = int(entry["step"])
            results = {k: v for k, v in entry.items() if k not in TIMES and k != "index"}
            units.append(ClosedUnit(name, tuple(blocks), first, last, results))
            first = last
        return units

    # What it learned from -----------------------------------------------------------------------

    @cached_property
    def calibration(self) -> CalibrationSet | None:
        """Its own calibration set, or the shared one that its configuration names.

        Raises:
            CalibrationError: The set is unfinished or damaged.
            CheckpointMismatch: The result was made with another set.
        """
        folder = self.root / "calibration"
        shared = self.config.get("data", {}).get("init_args", {}).get("folder")
        if not folder.is_dir() and shared:
            folder = Path(shared)
        if not folder.is_dir():
            return None
        found = CalibrationSet.load(folder)
        used = self.manifest.get("fingerprint", {}).get("calibration", found.fingerprint)
        if used != found.fingerprint:
            raise CheckpointMismatch(
                f"The result in {self.root} was made with the calibration set {used!r}, but "
                f"{folder} is {found.fingerprint!r}. Put back the set the run was made with, or "
                "fit again."
            )
        return found


def open_runs(roots: Sequence[Path]) -> list[Run]:
    """The run folders, each under a name of its own.

    Raises:
        ConfigError: A folder is given twice, or is no run folder.
    """
    if len({root.resolve() for root in roots}) < len(roots):
        raise ConfigError(
            f"--run names the same folder twice: {', '.join(map(str, roots))}. A page has one "
            "column per run; give each folder once."
        )
    for root in roots:
        if not ((root / "config.yaml").is_file() or (root / "quantized").is_dir()):
            raise ConfigError(
                f"{root} is no run folder: it has neither config.yaml nor quantized. Give the "
                "trainer.default_root_dir of a run that `recon fit` has started."
            )
    short = [root.resolve().name for root in roots]
    unique = len(set(short)) == len(short)
    return [
        Run(root, name if unique else str(root)) for root, name in zip(roots, short, strict=True)
    ]
