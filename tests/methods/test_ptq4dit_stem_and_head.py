"""Stem and head of DiT, quantised: against weights rounded by hand in the public network."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from torch import Tensor, nn

import recon
from recon.engine.checkpoints import written
from recon.engine.sampling import network
from recon.errors import CapabilityMissing, ConfigError
from recon.layers.quant_linear import QuantLinear
from recon.methods.ptq4dit import PTQ4DiT
from recon.models.cogvideox import CogVideoX
from recon.models.dit import DiT
from recon.quantizers.spec import QuantSpec
from recon.report.run import Run
from recon.report.sections import layers as layers_section
from recon.report.sections import scales as scales_section
from tests.engine.tiny_run import (
    Interruption,
    Soft,
    assert_same,
    fit,
    quantized_bytes,
    write_samples,
)
from tests.models.tiny import tiny_image_sample, write_tiny_cogvideox, write_tiny_dit

CPU = torch.device("cpu")
STATIC = QuantSpec(num_bits=8, strategy="tensor", symmetric=False)
FOUR = QuantSpec(num_bits=4)
TIMES = "norm1.emb.timestep_embedder"
STEM = ("pos_embed.proj", *(f"transformer_blocks.0.{TIMES}.linear_{n}" for n in (1, 2)))
HEAD = ("proj_out_1", "proj_out_2")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dit(tmp_path_factory.mktemp("dit"))


def drawn(teacher: Path, folder: Path) -> Path:
    draw = partial(tiny_image_sample, batch=2)
    return write_samples(folder / "calibration", teacher, samples=4, family=DiT, draw=draw)


@pytest.fixture(scope="module")
def samples(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn(teacher, tmp_path_factory.mktemp("images"))


def method(teacher: Path, **changed: Any) -> PTQ4DiT:
    settings = {"steps": 6, "lr": 0.02, "threads": 1, "compile": False, "stem_and_head": FOUR}
    return PTQ4DiT(adapter=DiT(str(teacher)), **{**settings, **changed})


def output(net: nn.Module, sample: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = net(**sample, return_dict=False)[0]
    return found


def rounded(weight: Tensor) -> Tensor:
    """Each row on 4-bit codes, with the step, of 80, that leaves the least square error."""
    rows = weight.flatten(1).double()
    best, least = rows, torch.full((len(rows),), float("inf"), dtype=torch.float64)
    for ratio in torch.linspace(1.0, 0.2, 80, dtype=torch.float64):
        step = ratio * rows.abs().amax(dim=1, keepdim=True) / 7
        made = (rows / step).round().clamp(-8, 7) * step
        error = (made - rows).square().sum(dim=1)
        best = torch.where((error < least)[:, None], made, best)
        least = torch.minimum(error, least)
    return best.reshape(weight.shape).float()


@pytest.mark.parametrize("equal", [True, False], ids=["one embedder", "embedders that differ"])
def test_the_network_is_that_with_every_weight_outside_the_blocks_rounded(
    equal: bool, tmp_path: Path
) -> None:
    teacher = write_tiny_dit(tmp_path / "dit", equal_embedders=equal)
    samples = drawn(teacher, tmp_path)
    plain: dict[str, Any] = {"activation": None, "balance": "none", "reconstruct": False}
    module = method(teacher, **plain)
    fit(tmp_path / "blocks", method(teacher, **plain, stem_and_head=None), samples)
    fit(tmp_path / "all", module, samples)
    expected, loaded = recon.load(tmp_path / "blocks"), recon.load(tmp_path / "all")
    sample = module.frontier.sample(0)
    before = output(expected, sample)
    copies = [f"transformer_blocks.1.{TIMES}.linear_{n}" for n in (1, 2)]
    for name in (*STEM, *HEAD, *copies):
        layer = expected.get_submodule(name)
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        layer.weight.data = rounded(layer.weight)
        assert isinstance(loaded.get_submodule(name), QuantLinear)
    after = output(loaded, sample)
    torch.testing.assert_close(after, output(expected, sample), rtol=1e-4, atol=1e-5)
    assert float((after - before).norm() / before.norm()) > 0.01
    assert torch.equal(after, output(network(module, "quantized", CPU), sample))


@pytest.mark.parametrize("activation", [STATIC, None], ids=["fixed ranges", "per token"])
def test_streams_start_and_end_in_their_own_stem_and_head(
    activation: QuantSpec | None, teacher: Path, samples: Path, tmp_path: Path
) -> None:
    given = {} if activation is None else {"activation": activation}
    module = method(teacher, **given)
    fit(tmp_path, module, samples)
    count = module.sample_count + 2  # two are held out
    assert module.forwards["teacher"] == module.forwards["student"] == 2 * count
    full, loaded = module.adapter.network(CPU), recon.load(tmp_path)
    nearest = network(module, "round_to_nearest", CPU)
    held_out = [module.frontier.sample(index) for index in module.frontier.held_out]
    assert len(held_out) == 2
    for form, found in ((loaded, "reconstructed"), (nearest, "round_to_nearest")):
        pairs = [(output(form, s).double(), output(full, s).double()) for s in held_out]
        wrong = sum(float((one - other).square().sum()) for one, other in pairs)
        power = sum(float(other.square().sum()) for _, other in pairs)
        assert module.final_error[found] == pytest.approx(wrong / power, rel=1e-4)


def test_equal_embedders_are_kept_once_and_described(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    fit(tmp_path, method(teacher, weight=QuantSpec(num_bits=3)), samples)
    stored = load_file(tmp_path / "quantized" / "quantized.safetensors")
    rest = load_file(tmp_path / "quantized" / "network.safetensors")
    assert {f"{name}.codes" for name in (*STEM, *HEAD)} <= set(stored)
    assert not [name for name in stored if name.startswith(f"transformer_blocks.1.{TIMES}")]
    assert not [name for name in rest if TIMES in name and name.endswith("weight")]
    assert f"transformer_blocks.1.{TIMES}.linear_1.bias" in rest
    manifest = json.loads((tmp_path / "quantized" / "manifest.json").read_text())
    assert manifest["layers"]["proj_out_2"]["weight"]["num_bits"] == 4
    assert manifest["layers"]["transformer_blocks.1.ff.net.2"]["weight"]["num_bits"] == 3
    loaded = recon.load(tmp_path)
    first, second = (
        loaded.get_submodule(f"transformer_blocks.{block}.{TIMES}.linear_2") for block in (0, 1)
    )
    assert first is second
    run = Run(tmp_path, "tiny")
    shown = layers_section.build(run)
    assert isinstance(shown, layers_section.Layers)
    assert shown.share == 1
    grids = {row.name: (row.role, row.weight, row.count) for row in shown.quantised}
    assert grids["pos_embed.proj"] == ("patch embedding", "4 bits per channel", 1)
    assert grids[f"{TIMES}.linear_1"] == ("timestep embedding", "4 bits per channel", 1)
    assert grids["norm1.linear"] == ("modulation", "3 bits per channel", 2)
    assert isinstance(scales_section.build(run), scales_section.Scales)


def test_rounding_for_the_output_of_each_layer_leaves_less_of_an_error(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    errors = []
    for reconstruct in (True, False):
        module = method(teacher, reconstruct=reconstruct, steps=1, stem_and_head=QuantSpec(3))
        fit(tmp_path / str(reconstruct), module, samples)
        assert module.ends is not None
        wrong = 0.0
        for index in module.frontier.calibration:
            sample = module.frontier.sample(index)
            given = module.adapter.embed(sample, CPU)
            made = module.ends.embed("student", sample)
            wrong += float((made["conditioning"] - given["conditioning"]).square().sum())
        errors.append(wrong)
    assert errors[0] < 0.7 * errors[1]


def test_modulation_that_keeps_full_precision_keeps_it_in_the_head_too(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    fit(tmp_path, method(teacher, adaln="fp"), samples)
    layers = json.loads((tmp_path / "quantized" / "manifest.json").read_text())["layers"]
    assert "proj_out_1" not in layers
    assert "proj_out_2" in layers


@pytest.mark.parametrize("step", [4, 9])
def test_a_run_continues_bit_for_bit(
    step: int, teacher: Path, samples: Path, tmp_path: Path
) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            if trainer.global_step == step:
                raise Interruption

    make: Callable[[], PTQ4DiT] = partial(method, teacher, activation=STATIC)
    whole, after, module = Soft(), Soft(), make()
    fit(tmp_path / "whole", module, samples, whole)
    with pytest.raises(Interruption):
        fit(tmp_path / "stopped", make(), samples, Stop())
    again, newest = make(), str(written(tmp_path / "stopped")[0])
    fit(tmp_path / "stopped", again, samples, after, ckpt_path=newest)
    assert any("pos_embed/proj.codes" in key for key in after.after[12])
    for number, state in after.after.items():
        assert_same(state, whole.after[number])
    assert quantized_bytes(tmp_path / "stopped") == quantized_bytes(tmp_path / "whole")
    assert again.final_error == module.final_error


def test_what_cannot_be_quantised_outside_the_blocks_is_refused(
    teacher: Path, tmp_path: Path
) -> None:
    video = write_tiny_cogvideox(tmp_path)
    with pytest.raises(CapabilityMissing, match=r"stem_and_head .* CogVideoX does not let"):
        PTQ4DiT(adapter=CogVideoX(str(video)), stem_and_head=FOUR).check()
    token = QuantSpec(num_bits=8, strategy="token", dynamic=True)
    with pytest.raises(ConfigError, match=r"model\.stem_and_head takes strategy channel or group"):
        method(teacher, stem_and_head=token).check()
    wide = QuantSpec(num_bits=4, strategy="group", group_size=32)
    with pytest.raises(ConfigError, match="does not divide the 16 inputs"):
        method(teacher, stem_and_head=wide).check()
