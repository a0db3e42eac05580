"""Killed at random moments and continued, from the shell: the same bytes."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.command import (
    codes,
    finished,
    fit_arguments,
    process,
    with_calibration,
)

pytestmark = pytest.mark.slow

LONG = ("--model.epochs", "12", "--step_checkpoint.every_n_steps", "7")
DISK = ("--model.memory", "{device: 0, ram: 0}")
GLOO = ("--trainer.devices", "2", "--model.batch_size", "2")


@pytest.fixture(scope="module")
def whole(pipeline: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = with_calibration(tmp_path_factory.mktemp("whole") / "run", finished_run)
    assert finished(fit_arguments(root, pipeline, *LONG), root.parent / "log") == 0
    return root


def wait_until(condition: Callable[[], bool], timeout: float) -> None:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout
        time.sleep(0.01)


def there(file: Path, running: subprocess.Popen[bytes]) -> None:
    """Waits until a run has written `file`, or ended."""
    wait_until(lambda: file.exists() or running.poll() is not None, 120)


def alive(group: int) -> bool:
    """Whether a process of the group is there."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def killed(arguments: list[str], root: Path, after: float) -> None:
    """Starts a run and kills all of it `after` seconds past the moment its fit begins."""
    running = process(arguments, root.parent / "log")
    there(root / "config.yaml", running)
    time.sleep(after)
    if running.poll() is None:
        os.killpg(running.pid, signal.SIGKILL)
    running.wait(60)


def seconds(root: Path) -> float:
    return float(json.loads((root / "summary.json").read_text())["seconds"]["reconstruction"])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("memory", [(), DISK], ids=["memory", "disk"])
def test_kill_9_at_a_random_moment(
    seed: int, memory: tuple[str, ...], whole: Path, pipeline: Path, finished_run: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    root = with_calibration(tmp_path / "run", finished_run)
    arguments = [*fit_arguments(root, pipeline, *LONG, *memory), "--ckpt_path", "last"]
    draw = random.Random(f"{seed}{memory}")
    killed(arguments, root, draw.uniform(0, 1.2 * seconds(whole)))
    assert finished(arguments, tmp_path / "log") == 0
    assert codes(root) == codes(whole)
    assert not list((root / "checkpoints").glob(".*"))
    errors = [json.loads((r / "summary.json").read_text())["error"] for r in (root, whole)]
    assert errors[0] == errors[1]


def test_sigterm_saves_a_checkpoint_inside_the_unit_and_the_run_goes_on(
    whole: Path, pipeline: Path, finished_run: Path, tmp_path: Path
) -> None:
    root = with_calibration(tmp_path / "run", finished_run)
    arguments = fit_arguments(root, pipeline, *LONG, "--step_checkpoint.every_n_steps", "100000")
    running = process(arguments, tmp_path / "log")
    there(root / "checkpoints" / "unit=001.ckpt", running)
    time.sleep(0.3)
    running.send_signal(signal.SIGTERM)
    assert running.wait(60) == 143
    assert "Continue with --ckpt_path last" in (tmp_path / "log").read_text()
    assert (root / "checkpoints" / "step.ckpt").exists()
    assert not (root / "summary.json").exists()
    assert finished([*arguments, "--ckpt_path", "last"], tmp_path / "log") == 0
    assert codes(root) == codes(whole)


@pytest.mark.distributed
@pytest.mark.parametrize("whole_group", [False, True], ids=["first process", "all processes"])
def test_sigterm_of_two_processes_stops_both_behind_the_same_step(
    whole_group: bool, pipeline: Path, finished_run: Path, tmp_path: Path
) -> None:
    alone = with_calibration(tmp_path / "alone" / "run", finished_run)
    more = (*LONG, "--model.batch_size", "2")
    assert finished(fit_arguments(alone, pipeline, *more), tmp_path / "alone" / "log") == 0
    root = with_calibration(tmp_path / "two" / "run", finished_run)
    never = ("--step_checkpoint.every_n_steps", "100000")
    arguments = fit_arguments(root, pipeline, *LONG, *GLOO, *never)
    running = process(arguments, root.parent / "log")
    there(root / "checkpoints" / "unit=001.ckpt", running)
    time.sleep(0.3)
    (os.killpg if whole_group else os.kill)(running.pid, signal.SIGTERM)
    assert running.wait(60) == 143
    wait_until(lambda: not alive(running.pid), 20)  # nobody is left behind
    assert (root / "checkpoints" / "step.ckpt").exists()
    assert finished([*arguments, "--ckpt_path", "last"], root.parent / "log") == 0
    assert codes(root) == codes(alone)


@pytest.mark.distributed
@pytest.mark.parametrize("memory", [(), DISK], ids=["memory", "disk"])
def test_kill_9_of_two_processes(
    memory: tuple[str, ...], pipeline: Path, finished_run: Path, tmp_path: Path
) -> None:
    alone = with_calibration(tmp_path / "alone" / "run", finished_run)
    more = (*LONG, "--model.batch_size", "2")
    assert finished(fit_arguments(alone, pipeline, *more), tmp_path / "alone" / "log") == 0
    root = with_calibration(tmp_path / "two" / "run", finished_run)
    arguments = [
        *fit_arguments(root, pipeline, *LONG, *GLOO, *memory), "--ckpt_path", "last"
    ]  # fmt: skip
    killed(arguments, root, random.Random(str(memory)).uniform(0.5, 1.0) * seconds(alone))
    assert finished(arguments, root.parent / "log") == 0
    assert codes(root) == codes(alone)
