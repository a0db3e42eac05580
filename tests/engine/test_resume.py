"""A run that was stopped and continued equals one that was not, bit for bit.

Compared are soft values after every step, not only codes: rounding hides differences.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from recon.calibration.frontier import Frontier
from recon.calibration.memory import MemoryBudget
from recon.callbacks import summary
from recon.engine import Reconstruction, walk
from recon.engine.checkpoints import examined, written
from recon.errors import CheckpointMismatch, NumericsError
from recon.methods.adaround import AdaRound
from recon.methods.ptq4dit import PTQ4DiT
from recon.methods.rtn import RoundToNearest
from recon.methods.s2q_vdit import S2QVDiT
from recon.models.cogvideox import CogVideoX
from recon.quantizers.spec import QuantSpec
from tests.engine.tiny_run import Interruption, Soft, assert_same, fit, quantized_bytes
from tests.models.tiny import write_tiny_cogvideox

DISK = MemoryBudget(device=0, ram=0)
STEPS = 4

Make = Callable[..., Reconstruction]


def s2q(teacher: Path, **changed: Any) -> Reconstruction:
    return S2QVDiT(adapter=CogVideoX(str(teacher)), epochs=1, threads=1, compile=False, **changed)


def adaround(teacher: Path, **changed: Any) -> Reconstruction:
    return AdaRound(
        adapter=CogVideoX(str(teacher)), steps=STEPS, threads=1, compile=False, inputs="mix",
        lr=0.1, batch_size=2, **changed,
    )  # fmt: skip


def ptq4dit(teacher: Path, **changed: Any) -> Reconstruction:
    return PTQ4DiT(
        adapter=CogVideoX(str(teacher)), steps=STEPS, threads=1, compile=False, lr=0.1,
        batch_size=4, micro_batch=2, step_lr=0.05,
        activation=QuantSpec(num_bits=6, strategy="tensor", symmetric=False), **changed,
    )  # fmt: skip


@dataclass(frozen=True)
class Whole:
    """What a run that was not stopped left behind."""

    soft: dict[int, dict[str, Tensor]]
    quantized: bytes
    error: dict[str, float]
    history: list[dict[str, float]]
    layer_errors: dict[str, dict[str, float]]


METHODS: dict[str, Make] = {"s2q": s2q, "adaround": adaround, "ptq4dit": ptq4dit}


@pytest.fixture(scope="module")
def whole(
    teacher: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Whole]:
    made: dict[str, Whole] = {}

    def run(name: str) -> Whole:
        if name not in made:
            root, soft, module = tmp_path_factory.mktemp(name), Soft(), METHODS[name](teacher)
            fit(root, module, samples, soft)
            made[name] = Whole(
                soft.after, quantized_bytes(root), module.final_error, module.history,
                module.layer_errors,
            )  # fmt: skip
        return made[name]

    return run


class Stop(Callback):
    """Stops the run at a step, in one of Lightning's hooks."""

    def __init__(self, hook: str, step: int) -> None:
        self._step = step
        setattr(self, hook, self._stop)

    def _stop(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self._step:
            raise Interruption


def unit_results(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def continued(
    root: Path, module: Reconstruction, samples: Path, expected: Whole, every: int = 2
) -> list[int]:
    """Continues the newest checkpoint, or anew; the steps it took, all of them compared."""
    found, soft = written(root), Soft()
    checkpoint = str(found[0]) if found else None
    fit(root, module, samples, soft, ckpt_path=checkpoint, every=every)
    for step, state in soft.after.items():
        assert_same(state, expected.soft[step])
    assert max(soft.after) == max(expected.soft)
    assert quantized_bytes(root) == expected.quantized
    assert module.final_error == expected.error
    assert unit_results(module.history) == unit_results(expected.history)
    assert module.layer_errors == expected.layer_errors
    assert module.layer_errors
    return sorted(soft.after)


STOPS = [
    ("on_before_optimizer_step", 7),
    ("on_train_batch_end", 3),
    ("on_train_epoch_start", 4),  # right behind a boundary
]
MORE_STOPS = [
    ("on_train_batch_start", 1),
    ("on_train_batch_start", 6),
    ("on_train_batch_end", 6),
    ("on_train_epoch_end", 8),  # all steps done, unit not yet closed
    ("on_train_epoch_start", 8),
]


def slow(*values: Any, **named: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow, **named)


@pytest.mark.parametrize(("hook", "step"), [*STOPS, *(slow(*stop) for stop in MORE_STOPS)])
def test_a_run_stopped_anywhere_continues_bit_for_bit(
    hook: str, step: int, teacher: Path, samples: Path, tmp_path: Path, whole: Any
) -> None:
    with pytest.raises(Interruption):
        fit(tmp_path, s2q(teacher), samples, Stop(hook, step))
    steps = continued(tmp_path, s2q(teacher), samples, whole("s2q"))
    # At most the checkpoints' cadence is repeated.
    assert len(steps) <= 3 * STEPS - step + 4
    assert steps == list(range(steps[0], 3 * STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"]
)
@pytest.mark.parametrize("step", range(1, 3 * STEPS))
@pytest.mark.parametrize("every", [1, 100])
def test_every_step_of_a_run_may_be_its_last(
    hook: str, step: int, every: int, teacher: Path, samples: Path, tmp_path: Path, whole: Any
) -> None:
    with pytest.raises(Interruption):
        fit(tmp_path, adaround(teacher), samples, Stop(hook, step), every=every)
    continued(tmp_path, adaround(teacher), samples, whole("adaround"), every)


@pytest.mark.parametrize(("hook", "step"), [("on_before_optimizer_step", 6)])
def test_learned_rounding_on_mixed_inputs_continues_bit_for_bit(
    hook: str, step: int, teacher: Path, samples: Path, tmp_path: Path, whole: Any
) -> None:
    with pytest.raises(Interruption):
        fit(tmp_path, adaround(teacher), samples, Stop(hook, step))
    assert continued(tmp_path, adaround(teacher), samples, whole("adaround"))[0] == 7


@pytest.mark.parametrize("step", [3, 6])
def test_fixed_ranges_and_their_learned_steps_continue_bit_for_bit(
    step: int, teacher: Path, samples: Path, tmp_path: Path, whole: Any
) -> None:
    with pytest.raises(Interruption):
        fit(tmp_path, ptq4dit(teacher), samples, Stop("on_before_optimizer_step", step))
    continued(tmp_path, ptq4dit(teacher), samples, whole("ptq4dit"))


@pytest.fixture
def fails_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[object, str, int], None]:
    def install(owner: object, name: str, call: int) -> None:
        original, calls = getattr(owner, name), [0]

        def failing(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                raise Interruption
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, failing)

    return install


@pytest.mark.parametrize(
    ("owner", "name", "call", "memory"),
    [
        pytest.param(Frontier, "record", 2, DISK, id="recording, disk"),
        pytest.param(Frontier, "advance", 2, MemoryBudget(), id="advancing, memory"),
        slow(Frontier, "record", 2, MemoryBudget(), id="recording, memory"),
        slow(Frontier, "advance", 2, DISK, id="advancing, disk"),
        *(
            slow(owner, name, call, memory, id=f"{name}, {where}")
            for memory, where in ((MemoryBudget(), "memory"), (DISK, "disk"))
            for owner, name, call in (
                (Frontier, "_put", 33),  # in the middle of writing a stream
                (walk, "close_unit", 2),
                (walk, "open_unit", 3),
            )
        ),
    ],
)
def test_a_stop_between_units_is_made_good(
    owner: object, name: str, call: int, memory: MemoryBudget,
    teacher: Path, samples: Path, tmp_path: Path, whole: Any, fails_at: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    fails_at(owner, name, call)
    with pytest.raises(Interruption):
        fit(tmp_path, s2q(teacher, memory=memory), samples)
    monkeypatch.undo()
    continued(tmp_path, s2q(teacher, memory=memory), samples, whole("s2q"))
    assert not any((tmp_path / "streams").glob("*/boundary=*"))


def test_streams_on_disk_give_the_same_bytes_and_are_not_replayed(
    teacher: Path, samples: Path, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole("s2q")
    with pytest.raises(Interruption):
        fit(tmp_path, s2q(teacher, memory=DISK), samples, Stop("on_train_batch_end", 10))
    folders = sorted(p.name for p in (tmp_path / "streams" / "rank=0-of-1").iterdir())
    assert folders == ["boundary=001", "boundary=002", "boundary=003"]
    starts: list[int] = []
    start = Frontier.start

    def noted(self: Frontier, boundary: int = 0) -> bool:
        result = start(self, boundary)
        starts.append(self.boundary)
        return result

    monkeypatch.setattr(Frontier, "start", noted)
    module = s2q(teacher, memory=DISK)
    continued(tmp_path, module, samples, expected)
    assert starts == [2]
    # Unit 2's teacher ran once more: what it records is not part of a checkpoint.
    assert module.frontier.forwards.student == 3 * 6


def test_damaged_streams_are_replayed_and_end_the_same(
    teacher: Path, samples: Path, tmp_path: Path, whole: Any
) -> None:
    with pytest.raises(Interruption):
        fit(tmp_path, s2q(teacher, memory=DISK), samples, Stop("on_train_batch_end", 10))
    place = tmp_path / "streams" / "rank=0-of-1" / "boundary=002" / "student"
    shard = place / "00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    continued(tmp_path, s2q(teacher, memory=DISK), samples, whole("s2q"))


@pytest.mark.slow
def test_where_streams_live_may_change_between_stop_and_resume(
    teacher: Path, samples: Path, tmp_path: Path, whole: Any
) -> None:
    with pytest.raises(Interruption):
        fit(tmp_path, s2q(teacher), samples, Stop("on_train_batch_end", 7))
    continued(tmp_path, s2q(teacher, memory=DISK), samples, whole("s2q"))


@pytest.mark.slow
def test_stopped_twice_in_the_same_unit(
    teacher: Path, samples: Path, tmp_path: Path, whole: Any
) -> None:
    for step in (5, 7):
        found = written(tmp_path)
        with pytest.raises(Interruption):
            fit(
                tmp_path, s2q(teacher), samples, Stop("on_train_batch_end", step),
                ckpt_path=str(found[0]) if found else None, every=100,
            )  # fmt: skip
    assert continued(tmp_path, s2q(teacher), samples, whole("s2q"), every=100)[0] == 8


# A finished run


def test_a_finished_run_continued_does_nothing(
    teacher: Path, samples: Path, tmp_path: Path, whole: Any
) -> None:
    fit(tmp_path, s2q(teacher), samples)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    soft, module = Soft(), s2q(teacher)
    fit(tmp_path, module, samples, soft, ckpt_path=str(written(tmp_path)[0]))
    assert soft.after == {}
    assert module.final_error == whole("s2q").error
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_run_killed_before_its_results_were_written_writes_them_when_continued(
    teacher: Path, samples: Path, tmp_path: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*args: Any) -> None:
        raise Interruption

    monkeypatch.setattr(summary, "write_native", dies)
    with pytest.raises(Interruption):
        fit(tmp_path, s2q(teacher), samples)
    monkeypatch.undo()
    assert not (tmp_path / "quantized").exists()
    soft = Soft()
    fit(tmp_path, s2q(teacher), samples, soft, ckpt_path=str(written(tmp_path)[0]))
    assert soft.after == {}
    assert quantized_bytes(tmp_path) == whole("s2q").quantized
    text = (tmp_path / "summary.json").read_text()
    assert '"block_forwards_per_sample": 6.0' in text


# Checkpoints that must not be continued


@pytest.fixture(scope="module")
def stopped(teacher: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with two checkpoints: a boundary's, and a newer one inside a unit."""
    root = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Interruption):
        fit(root, s2q(teacher), samples, Stop("on_train_batch_end", 6))
    return root


def test_a_checkpoint_holds_what_is_learned_and_nothing_to_unpickle(stopped: Path) -> None:
    newest, older = written(stopped)
    assert (newest.name, older.name) == ("step.ckpt", "unit=001.ckpt")
    content = torch.load(newest, weights_only=True)
    assert content["recon"]["index"] == 1
    assert content["global_step"] == 6
    assert "hyper_parameters" not in content
    keys = content["state_dict"].keys()
    assert all(key.startswith("quantizers.transformer_blocks/") for key in keys)
    closed = {key for key in keys if key.startswith("quantizers.transformer_blocks/0/")}
    assert {key.rsplit(".", 1)[-1] for key in closed} == {
        "codes", "scale", "activation_clip", "channel_scale", "left", "right"
    }  # fmt: skip
    assert newest.stat().st_size < 600_000
    assert not [p for p in newest.parent.iterdir() if p.suffix != ".ckpt"]


def test_the_farthest_checkpoint_counts_whatever_the_time_of_its_file(
    stopped: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for seconds, path in enumerate(written(stopped)):  # as a copy may leave them
        (folder / path.name).write_bytes(path.read_bytes())
        os.utime(folder / path.name, times=(seconds, seconds))
    assert [path.name for path in written(tmp_path)] == ["step.ckpt", "unit=001.ckpt"]
    (folder / "unit=001.ckpt").write_bytes(b"")  # is refused by name, not passed over
    assert written(tmp_path)[0].name == "unit=001.ckpt"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_checkpoint_cut_short_names_the_next_older_one(
    stopped: Path, tmp_path: Path, share: float
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for path in reversed(written(stopped)):
        (folder / path.name).write_bytes(path.read_bytes())
        os.utime(folder / path.name, ns=(path.stat().st_mtime_ns,) * 2)
    newest = folder / "step.ckpt"
    content = newest.read_bytes()
    newest.write_bytes(content[: int(share * len(content))])
    with pytest.raises(
        CheckpointMismatch, match=r"damaged or cut short.*next older one is .*unit=001\.ckpt"
    ):
        examined(newest)


def test_a_checkpoint_that_is_not_there_or_not_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match=r"no checkpoint .*nowhere\.ckpt\. Check"):
        examined(tmp_path / "checkpoints" / "nowhere.ckpt")
    foreign = tmp_path / "checkpoints" / "foreign.ckpt"
    foreign.parent.mkdir()
    torch.save({"state_dict": {}}, foreign)
    with pytest.raises(CheckpointMismatch, match="was not written by recon"):
        examined(foreign)


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"seed": 1}, "model.seed: saved 0, now 1"),
        ({"alpha": 0.3}, "model.alpha: saved 0.5, now 0.3"),
        ({"adaln": "fp"}, "model.adaln: saved 'w4a', now 'fp'"),
    ],
)
def test_a_checkpoint_of_another_configuration_names_the_fields(
    stopped: Path, teacher: Path, samples: Path, changed: dict[str, Any], field: str
) -> None:
    checkpoint = str(written(stopped)[0])
    with pytest.raises(CheckpointMismatch, match=field):
        fit(stopped, s2q(teacher, **changed), samples, ckpt_path=checkpoint)
    with pytest.raises(CheckpointMismatch, match=field):
        s2q(teacher, **changed).check_checkpoint(examined(Path(checkpoint)))


def test_a_checkpoint_of_another_method_teacher_or_calibration_is_refused(
    stopped: Path, teacher: Path, samples: Path, tmp_path: Path
) -> None:
    checkpoint = str(written(stopped)[0])
    other = write_tiny_cogvideox(tmp_path / "teacher", layers=3, seed=5)
    with pytest.raises(CheckpointMismatch, match=r"teacher\.weights: saved"):
        fit(stopped, s2q(other), samples, ckpt_path=checkpoint)
    nearest = RoundToNearest(adapter=CogVideoX(str(teacher)), threads=1, compile=False)
    with pytest.raises(CheckpointMismatch, match=r"method: saved 'recon\.methods\.s2q_vdit"):
        fit(stopped, nearest, samples, ckpt_path=checkpoint)
    from tests.engine.tiny_run import write_samples

    foreign = write_samples(tmp_path / "calibration", teacher, seed=3)
    with pytest.raises(CheckpointMismatch, match="calibration: saved"):
        fit(stopped, s2q(teacher), foreign, ckpt_path=checkpoint)


class Joined(S2QVDiT):
    def partition(self) -> Any:
        from recon.engine.unit import Unit

        return [Unit("all", self.adapter.block_names)]


def test_a_checkpoint_cut_into_other_units_says_so(
    stopped: Path, teacher: Path, samples: Path
) -> None:
    module = Joined(adapter=CogVideoX(str(teacher)), epochs=1, threads=1, compile=False)
    with pytest.raises(
        CheckpointMismatch, match=r"cut into units \['transformer_blocks\.0', .*this.*\['all'\]"
    ):
        fit(stopped, module, samples, ckpt_path=str(written(stopped)[0]))


def test_a_checkpoint_between_last_step_and_closing_is_refused(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    class Unclosed(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "checkpoints" / "bad.ckpt")
            raise Interruption

    with pytest.raises(Interruption):
        fit(tmp_path, s2q(teacher), samples, Unclosed())
    bad = tmp_path / "checkpoints" / "bad.ckpt"
    with pytest.raises(CheckpointMismatch, match="after the last step of unit 0 and before"):
        examined(bad)
    with pytest.raises(CheckpointMismatch, match="would train the unit twice"):
        fit(tmp_path, s2q(teacher), samples, ckpt_path=str(bad))


def test_a_checkpoint_that_cannot_be_finished_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recon.engine.checkpoint_io import AtomicCheckpointIO

    target = tmp_path / "checkpoints" / "step.ckpt"
    AtomicCheckpointIO().save_checkpoint({"value": 1}, target)
    before = target.read_bytes()

    def half(content: Any, file: Any) -> None:
        file.write(b"half")
        raise NumericsError("the disk is full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(NumericsError):
        AtomicCheckpointIO().save_checkpoint({"value": 2}, target)
    assert target.read_bytes() == before
    assert [p.name for p in target.parent.iterdir()] == ["step.ckpt"]
