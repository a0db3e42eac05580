"""One epoch per unit: what is open, what learns, and what stops a stage cut short."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from recon.engine import Reconstruction
from recon.engine.unit import Unit
from recon.errors import ConfigError, NumericsError
from recon.layers.quant_linear import QuantLinear
from recon.layers.rounding import AdaptiveRounding
from recon.methods.adaround import AdaRound
from recon.methods.rtn import RoundToNearest
from recon.methods.s2q_vdit import S2QVDiT
from recon.models.cogvideox import CogVideoX
from tests.engine.tiny_run import fit, trainer_for


def adaround(teacher: Path, **changed: Any) -> AdaRound:
    return AdaRound(
        adapter=CogVideoX(str(teacher)), threads=1, compile=False, **{"steps": 2, **changed}
    )


class OpenOnly(Callback):
    """Asserts at every step that the open unit alone learns."""

    def __init__(self) -> None:
        self.open: list[int] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        assert isinstance(pl_module, Reconstruction)
        assert pl_module.opened is not None
        inside = tuple(f"{name}." for name in pl_module.opened.unit.blocks)
        self.open.append(pl_module.index)
        for key, layer in pl_module.quantizers.items():
            assert isinstance(layer, QuantLinear)
            name = key.replace("/", ".")
            learns = any(p.requires_grad for p in layer.parameters())
            if name.startswith(inside):
                assert learns
                assert isinstance(layer.rounding, AdaptiveRounding)
            else:
                assert layer.closed
                assert not list(layer.parameters())
                assert layer.rounding is None
                assert layer.teacher_weight is None
        (optimizer,) = trainer.optimizers
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in pl_module.parameters()}


def test_only_the_open_unit_learns_and_has_logits(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    watch, module = OpenOnly(), adaround(teacher)
    fit(tmp_path, module, samples, watch)
    assert watch.open == [0, 0, 1, 1, 2, 2]
    assert not list(module.parameters())
    assert all(q.closed for q in module.quantizers.values() if isinstance(q, QuantLinear))


def test_the_network_is_outside_the_module(teacher: Path) -> None:
    module = adaround(teacher)
    assert list(module.state_dict()) == []
    assert [name for name, _ in module.named_children()] == ["quantizers", "tuned"]


class StopEarly(Callback):
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        trainer.should_stop = trainer.global_step == 3


def test_a_stage_cut_short_is_not_closed(teacher: Path, samples: Path, tmp_path: Path) -> None:
    module = adaround(teacher, steps=2)
    with pytest.raises(
        ConfigError, match=r"Unit transformer_blocks\.1 ended after 1 of 2 steps.*send SIGTERM"
    ):
        fit(tmp_path, module, samples, StopEarly())
    assert module.index == 1
    assert not (tmp_path / "summary.json").exists()


class TwoUnits(RoundToNearest):
    """The first two blocks together, then the third."""

    def partition(self) -> list[Unit]:
        first, second, third = self.adapter.block_names
        return [Unit("front", (first, second)), Unit("back", (third,))]


def test_units_may_hold_several_blocks(teacher: Path, samples: Path, tmp_path: Path) -> None:
    split, whole = (
        kind(adapter=CogVideoX(str(teacher)), threads=1, compile=False)
        for kind in (TwoUnits, RoundToNearest)
    )
    fit(tmp_path / "two", split, samples)
    fit(tmp_path / "three", whole, samples)
    assert len(split.history) == 2
    # Nothing is learned here, so where the cuts are changes no number.
    assert split.final_error == whole.final_error
    assert split.history[-1]["error_after"] == whole.history[-1]["error_after"]


class Explodes(S2QVDiT):
    def unit_loss(self, student: Any, teacher: Any, sample: int) -> dict[str, Any]:
        factor = torch.inf if self.trainer.global_step == 5 else 1.0
        return {"mse": factor * (student - teacher).square().mean()}


def test_a_loss_that_is_not_finite_stops_in_that_unit(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    module = Explodes(adapter=CogVideoX(str(teacher)), epochs=1, threads=1, compile=False)
    with pytest.raises(NumericsError, match=r"unit transformer_blocks\.1 is NaN or Inf at step 1"):
        fit(tmp_path, module, samples, every=100)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step.ckpt", "unit=001.ckpt"]  # both from before the fault


def test_threads_are_part_of_what_a_run_is(teacher: Path, samples: Path, tmp_path: Path) -> None:
    module = RoundToNearest(adapter=CogVideoX(str(teacher)), threads=1, compile=False)
    trainer_for(tmp_path)
    fit(tmp_path, module, samples)
    assert module.fingerprint["model.threads"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"threads": 0}, "threads must be at least 1 or null, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(
    teacher: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        RoundToNearest(adapter=CogVideoX(str(teacher)), **arguments).check()


@pytest.mark.parametrize("inputs", ["full_precision", "quantised", "mix"])
def test_every_choice_of_inputs_runs_and_differs(
    teacher: Path, samples: Path, tmp_path: Path, inputs: Any
) -> None:
    module = adaround(teacher, inputs=inputs)
    fit(tmp_path, module, samples)
    assert module.final_error["reconstructed"] > 0
