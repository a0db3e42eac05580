"""Q-VLM stopped in each kind of stage continues bit for bit; two processes give what one gives."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recon.engine.checkpoints import written
from recon.errors import CheckpointMismatch
from recon.methods.q_vlm import QVLM
from tests.engine.test_resume import Stop, unit_results
from tests.engine.tiny_run import Interruption, Soft, assert_same, quantized_bytes
from tests.methods.q_vlm_run import fit, method
from tests.models.tiny_pictures import write_tiny_pictures

# Two units, [2, 2]: 3 pairs of neighbours, then 6 candidates and 4 steps of learning each.
CUT = {"partition_by": "fixed", "largest": 2}
STEPS = 3 + 2 * (6 + 4)


@dataclass(frozen=True)
class Whole:
    soft: dict[int, dict[str, Tensor]]
    quantized: bytes
    module: QVLM


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    root, soft, module = tmp_path_factory.mktemp("whole"), Soft(), method(pictures, **CUT)
    fit(root, module, soft)
    assert max(soft.after) == STEPS
    return Whole(soft.after, quantized_bytes(root), module)


def stopped_and_continued(
    root: Path, pictures: Path, whole: Whole, stop: Stop, every: int, **changed: Any
) -> list[int]:
    """The steps that the second process took, all of them compared with those of one process."""
    with pytest.raises(Interruption):
        fit(root, method(pictures, **CUT, **changed), stop, every=every)
    found, soft, module = written(root), Soft(), method(pictures, **CUT, **changed)
    checkpoint = str(found[0]) if found else None
    fit(root, module, soft, ckpt_path=checkpoint, every=every)
    for step, state in soft.after.items():
        assert_same(state, whole.soft[step])
    assert quantized_bytes(root) == whole.quantized
    assert module.findings == whole.module.findings
    assert unit_results(module.history) == unit_results(whole.module.history)
    assert module.final_error == whole.module.final_error
    assert module.forwards == whole.module.forwards
    return sorted(soft.after)


@pytest.mark.parametrize(
    ("hook", "step", "first"),
    [
        pytest.param("on_before_optimizer_step", 8, 9, id="learning"),
        pytest.param("on_train_batch_end", 6, 7, id="searching"),
        pytest.param("on_train_batch_end", 2, 3, id="surveying"),
    ],
)
def test_a_run_stopped_inside_a_stage_continues_bit_for_bit(
    hook: str, step: int, first: int, pictures: Path, tmp_path: Path, whole: Whole
) -> None:
    step += 3 if hook == "on_before_optimizer_step" else 0
    steps = stopped_and_continued(tmp_path, pictures, whole, Stop(hook, step), every=100)
    assert steps == list(range(step + 1, STEPS + 1))
    assert steps[0] == first + (3 if hook == "on_before_optimizer_step" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS))
@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_every_step_may_be_the_last(
    hook: str, step: int, every: int, pictures: Path, tmp_path: Path, whole: Whole
) -> None:
    stopped_and_continued(tmp_path, pictures, whole, Stop(hook, step), every)


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 5, 11, 15, 18])
def test_streams_on_disk_give_the_same(
    step: int, pictures: Path, tmp_path: Path, whole: Whole
) -> None:
    from recon.calibration.memory import MemoryBudget

    disk = MemoryBudget(device=0, ram=0)
    stopped_and_continued(
        tmp_path, pictures, whole, Stop("on_train_batch_end", step), 100, memory=disk
    )
    assert not (tmp_path / "streams" / "rank=0-of-1").exists()


def test_units_cut_during_the_run_are_those_of_the_checkpoint(
    pictures: Path, tmp_path: Path
) -> None:
    # The entropy decides here, so a new process does not know the units before it has read them.
    with pytest.raises(Interruption):
        fit(tmp_path, method(pictures), Stop("on_train_batch_end", 6), every=100)
    checkpoint = torch.load(written(tmp_path)[0], weights_only=True)
    assert checkpoint["recon"]["units"]
    module = method(pictures)
    assert not module.units
    fit(tmp_path, module, ckpt_path=str(written(tmp_path)[0]))
    names = [[unit.name, list(unit.blocks)] for unit in module.units]
    assert names == checkpoint["recon"]["units"]


def test_a_search_is_not_continued_with_other_candidates(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        fit(tmp_path, method(pictures, **CUT), Stop("on_train_batch_end", 5), every=100)
    other = method(pictures, **CUT, shrinks=(1.0, 0.5))
    with pytest.raises(CheckpointMismatch, match=r"model\.shrinks: saved \[1\.0, 0\.7\]"):
        fit(tmp_path, other, ckpt_path=str(written(tmp_path)[0]))


def run(teacher: Path, root: Path, devices: int) -> bytes:
    command = [sys.executable, "-m", "tests.methods.q_vlm_run", str(teacher), str(root)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, str(devices)], check=True, timeout=240, env=environment, capture_output=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    return quantized_bytes(root)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_leave_the_bytes_of_one(pictures: Path, tmp_path: Path) -> None:
    one = run(pictures, tmp_path / "one", 1)
    assert run(pictures, tmp_path / "two", 2) == one
