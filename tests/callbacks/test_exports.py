"""Export at the end of a fit: which commands run, when, and what a failure leaves."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from lightning.pytorch import Trainer

from recon.callbacks.exports import ExportAtEnd, FormatName
from recon.errors import ExportError
from recon.export.exporting import FORMATS
from recon.methods.rtn import RoundToNearest
from recon.models.cogvideox import CogVideoX
from tests.engine.tiny_run import FixedData, trainer_for, write_samples
from tests.models.tiny import write_tiny_cogvideox


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that were run; those with torchao in them fail."""
    ran: list[list[str]] = []

    def run(command: list[str], check: bool) -> Any:
        ran.append(command)
        return SimpleNamespace(returncode=2 if "torchao" in command else 0)

    monkeypatch.setattr(subprocess, "run", run)
    return ran


def ended(root: Path, callback: ExportAtEnd) -> None:
    callback.on_fit_end(Trainer(default_root_dir=root, logger=False), RoundToNearest(None))  # type: ignore[arg-type]


def test_the_names_are_those_of_the_formats() -> None:
    assert set(get_args(FormatName)) == set(FORMATS)


def test_each_format_is_exported_once_the_run_is_summarised(
    tmp_path: Path, commands: list[list[str]]
) -> None:
    teacher = write_tiny_cogvideox(tmp_path / "teacher", layers=1)
    data = write_samples(tmp_path / "data", teacher, samples=1, held_out=1)
    root = tmp_path / "run"
    module = RoundToNearest(CogVideoX(str(teacher)))
    seen: list[bool] = []

    class Watching(ExportAtEnd):
        def _written(self, root: Path, name: str) -> bool:
            seen.append((root / "quantized" / "manifest.json").is_file())
            return super()._written(root, name)

    trainer_for(root, Watching(["bf16", "native"])).fit(module, FixedData(str(data)))
    assert seen == [True, True]
    start = [sys.executable, "-m", "recon", "export", "--run", str(root), "--format"]
    assert commands == [[*start, "bf16"], [*start, "native"]]


def test_a_run_that_was_stopped_is_not_exported(tmp_path: Path, commands: list[list[str]]) -> None:
    ended(tmp_path, ExportAtEnd(["bf16"]))
    assert commands == []


def test_what_fails_is_named_after_the_others_were_tried_and_what_is_there_is_left(
    tmp_path: Path, commands: list[list[str]]
) -> None:
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "exports" / "native").mkdir(parents=True)
    with pytest.raises(ExportError, match=r"is finished and complete, but not exported as torchao"):
        ended(tmp_path, ExportAtEnd(["torchao", "native", "bf16"]))
    assert [command[-1] for command in commands] == ["torchao", "bf16"]


def test_nothing_is_exported_by_default(tmp_path: Path, commands: list[list[str]]) -> None:
    (tmp_path / "summary.json").write_text("{}")
    ended(tmp_path, ExportAtEnd())
    assert commands == []
