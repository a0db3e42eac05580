"""Whole fits on a tiny Qwen2.5-VL: samples without timesteps, of different lengths."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import recon
from recon.calibration.artefact import CalibrationSet, Row, write_set
from recon.engine import Reconstruction
from recon.engine.sampling import network
from recon.engine.stage_data import timestep_rows
from recon.errors import CapabilityMissing
from recon.methods.adaround import AdaRound
from recon.methods.q_vlm import QVLM
from recon.methods.rtn import RoundToNearest
from recon.models.qwen_vl import Qwen25VL
from recon.quantizers.spec import QuantSpec
from tests.engine.tiny_run import fit
from tests.models.tiny_vlm import tiny_vlm_sample, write_tiny_vlm

FAMILY = "qwen2_5_vl"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vlm(tmp_path_factory.mktemp("teacher"), FAMILY)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def rows() -> Iterator[Row]:
        for index in range(6):
            yield Row(
                tiny_vlm_sample(FAMILY, pictures=index % 3, words=7 + index, seed=index),
                prompt=f"question {index}",
                step=None,
                seed=None,
                change=None,
                gram=None,
                score=None,
                split="calibration" if index < 4 else "held_out",
                reason="Random.",
            )

    folder = tmp_path_factory.mktemp("calibration") / "set"
    names = ("input_ids", "labels", "pixel_values", "image_grid_thw")
    write_set(folder, rows, {"family": FAMILY}, {}, names)
    return folder


class Faint(QVLM):
    """Its loss has derivatives that float16 cannot hold."""

    def unit_loss(self, student: Tensor, teacher: Tensor, sample: int) -> dict[str, Tensor]:
        error = super().unit_loss(student, teacher, sample)["block_error"]
        return {"block_error": 2.0**-20 * error}


def method(kind: type[Reconstruction], teacher: Path) -> Reconstruction:
    learns = {} if kind is RoundToNearest else {"steps": 6, "batch_size": 2}
    return kind(
        adapter=Qwen25VL(str(teacher)),
        weight=QuantSpec(num_bits=4),
        activation=QuantSpec(num_bits=8, strategy="token", dynamic=True),
        **learns,  # type: ignore[arg-type]
    )


def test_the_set_keeps_samples_that_hold_different_tensors(calibration: Path) -> None:
    found = CalibrationSet.load(calibration)
    for index, sample in enumerate(found.samples):
        expected = tiny_vlm_sample(FAMILY, pictures=index % 3, words=7 + index, seed=index)
        assert set(sample) == set(expected)
        assert all(torch.equal(sample[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", [RoundToNearest, AdaRound, QVLM])
def test_a_fit_ends_and_loads_what_it_evaluates(
    kind: type[Reconstruction], teacher: Path, calibration: Path, tmp_path: Path
) -> None:
    module = method(kind, teacher)
    fit(tmp_path / "run", module, calibration)
    assert len(module.history) == 2
    assert module.forwards["teacher"] == 2 * 6
    nearest, found = (module.final_error[k] for k in ("round_to_nearest", "reconstructed"))
    assert 0 < found < 1
    assert found == nearest if kind is RoundToNearest else found != nearest
    evaluated = network(module, "quantized", torch.device("cpu"))
    loaded = recon.load(tmp_path / "run")
    for pictures in (0, 2):
        sample = tiny_vlm_sample(FAMILY, pictures)
        given = module.adapter.call_arguments(sample, "cpu")
        with torch.no_grad():
            assert torch.equal(loaded(**given).logits, evaluated(**given).logits)


def test_samples_of_unequal_lengths_learn_together_as_they_do_alone(
    teacher: Path, calibration: Path, tmp_path: Path
) -> None:
    losses = []
    for micro_batch in (1, 2):
        module = AdaRound(
            adapter=Qwen25VL(str(teacher)),
            weight=QuantSpec(num_bits=4),
            activation=QuantSpec(num_bits=8, strategy="token", dynamic=True),
            steps=6,
            batch_size=2,
            micro_batch=micro_batch,
        )
        fit(tmp_path / str(micro_batch), module, calibration)
        losses.append([summary["loss_last"] for summary in module.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_refuses_to_treat_timesteps_apart_where_there_are_none(calibration: Path) -> None:
    with pytest.raises(CapabilityMissing, match="the calibration samples have none"):
        timestep_rows(CalibrationSet.load(calibration).samples)


def test_a_float16_network_learns_from_a_faint_loss(
    teacher: Path, calibration: Path, tmp_path: Path
) -> None:
    module = Faint(
        adapter=Qwen25VL(str(teacher), "float16"),
        weight=QuantSpec(num_bits=4),
        activation=QuantSpec(num_bits=8, strategy="token", dynamic=True),
        steps=24,
        batch_size=2,
    )
    fit(tmp_path / "run", module, calibration)
    for unit in module.history:
        assert unit["block_error_learned"] < 0.4 * unit["block_error_joint"]
