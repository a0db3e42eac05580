"""metrics.csv of a run that was stopped and continued: every step and unit, each once."""

import csv
from pathlib import Path
from typing import Any

import pytest

from recon.callbacks.checkpoints import StepCheckpoint
from recon.callbacks.tracking import RunCSVLogger, UnitTracking
from recon.engine.checkpoints import written
from recon.methods.s2q_vdit import S2QVDiT
from recon.models.cogvideox import CogVideoX
from tests.engine.test_resume import Stop
from tests.engine.tiny_run import Interruption, fit


def run(root: Path, teacher: Path, samples: Path, *stop: Stop) -> None:
    module = S2QVDiT(adapter=CogVideoX(str(teacher)), epochs=1, threads=1, compile=False)
    found = written(root)
    fit(
        root, module, samples, *stop, UnitTracking(), every=3,
        ckpt_path=str(found[0]) if found else None,
        logger=[RunCSVLogger(root / "metrics.csv")], log_every_n_steps=1,
    )  # fmt: skip


def rows(root: Path) -> list[dict[str, str]]:
    with (root / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(root: Path, name: str) -> list[tuple[int, str]]:
    found = [(int(row["step"]), row[name]) for row in rows(root) if row[name]]
    return sorted(found)


@pytest.mark.parametrize("stop", [("on_train_epoch_start", 4), ("on_train_batch_start", 7)])
def test_no_row_is_lost_or_doubled(
    stop: tuple[str, int], teacher: Path, samples: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run(whole, teacher, samples)
    # As a kill does: what the logger has not put on disk is gone.
    with monkeypatch.context() as killed:
        killed.setattr(RunCSVLogger, "finalize", lambda self, status: None)
        killed.setattr(StepCheckpoint, "on_exception", lambda *arguments: None)
        with pytest.raises(Interruption):
            run(resumed, teacher, samples, Stop(*stop))
    run(resumed, teacher, samples)
    for name in ("recon/loss", "unit/index", "unit/error_after", "unit/loss_first"):
        assert column(resumed, name) == column(whole, name)
    assert [step for step, _ in column(whole, "recon/loss")] == list(range(12))
    assert [step for step, _ in column(whole, "unit/index")] == [4, 8, 12]
