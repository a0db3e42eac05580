import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor

import recon
from recon.engine.checkpoints import written
from recon.engine.sampling import network
from recon.engine.stage_data import run_blocks, timestep_rows
from recon.errors import CapabilityMissing, ConfigError
from recon.layers.rounding import AdaptiveRounding
from recon.layers.static_range import StaticRange
from recon.methods.ptq4dit import PUBLISHED_TOKENS, PTQ4DiT
from recon.models.cogvideox import CogVideoX
from recon.models.dit import DiT
from recon.quantizers.affine import codes, fake_quantize_tokens, static_grid
from recon.quantizers.gptq import gptq_codes
from recon.quantizers.spec import QuantSpec
from tests.engine.tiny_run import (
    Interruption,
    Soft,
    assert_same,
    fit,
    quantized_bytes,
    write_samples,
)
from tests.models.tiny import tiny_image_sample, write_tiny_cogvideox, write_tiny_dit
from tests.reference import ptq4dit as reference


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_dit(tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def samples(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "calibration"
    draw = partial(tiny_image_sample, batch=2)
    return write_samples(folder, teacher, samples=4, family=DiT, draw=draw)


def method(teacher: Path, **changed: Any) -> PTQ4DiT:
    settings: dict[str, Any] = {"steps": 6, "lr": 0.02, "threads": 1, "compile": False, **changed}
    settings = {"weight": QuantSpec(num_bits=3), **settings}
    return PTQ4DiT(adapter=DiT(str(teacher)), **settings)


class First(Callback):
    """Looks at a module before the first step of its first unit."""

    def __init__(self, look: Any) -> None:
        self._look, self.seen = look, False

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self.seen:
            self.seen = True
            self._look(pl_module)


def inputs_of(module: PTQ4DiT, name: str) -> dict[int, Tensor]:
    """What enters a linear of the open unit's teacher, by calibration sample."""
    assert module.opened is not None
    (block,) = module.opened.teacher_blocks
    found: dict[int, Tensor] = {}
    for sample in module.frontier.calibration:
        handle = block.get_submodule(name).register_forward_pre_hook(
            lambda _, arguments, sample=sample: found.update({sample: arguments[0].detach()})
        )
        with torch.no_grad():
            state = module.frontier.state("teacher", sample)
            module.adapter.forward_block(block, state)
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["attn1.to_q", "attn1.to_out.0", "ff.net.0.proj"])
def test_the_scale_of_every_balanced_input_is_the_papers(
    name: str, teacher: Path, samples: Path, tmp_path: Path
) -> None:
    def look(module: LightningModule) -> None:
        assert isinstance(module, PTQ4DiT)
        assert module.opened is not None
        inputs = inputs_of(module, name)
        # One sample per timestep, ascending; both rows of a guided call count.
        table = [
            reference.activation_salience(inputs[sample].flatten(0, 1).tolist())
            for sample in module.frontier.calibration
        ]
        group = next(g for g in module.opened.groups if g.name.endswith(name))
        rows = [row for linear in group.linears.values() for row in linear.weight.tolist()]
        weight = reference.weight_salience(rows)
        plain = reference.balancing(reference.calibrated_salience(table, weight), weight)
        expected = torch.tensor(plain, dtype=torch.float64)
        expected = expected / expected.log().mean().exp()
        transform = module.opened.layers[group.name].transform
        assert transform is not None
        assert transform.channel_scale is not None
        torch.testing.assert_close(transform.channel_scale, expected.float(), rtol=1e-5, atol=0)
        assert {module.opened.layers[n].transform for n in group.linears} == {transform}

    looked = First(look)
    fit(tmp_path, method(teacher), samples, looked)
    assert looked.seen


def test_balancing_and_the_start_of_rounding_change_no_output(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    def look(module: LightningModule) -> None:
        assert isinstance(module, PTQ4DiT)
        assert module.opened is not None
        state = module.frontier.state("teacher", 0)
        with torch.no_grad():
            student = run_blocks(module.adapter, module.opened.student_blocks, state)
        # Weights that the range search clips are the only difference.
        error = (module.adapter.tokens(student) - module.frontier.target(0)).square().mean()
        assert float(error / module.frontier.target(0).square().mean()) < 1e-4

    looked = First(look)
    wide = QuantSpec(num_bits=8)
    fit(tmp_path, method(teacher, activation=None, weight=wide), samples, looked)
    assert looked.seen


EIGHT = QuantSpec(num_bits=8, strategy="token", dynamic=True)


@pytest.mark.parametrize("name", ["attn1.to_q", "ff.net.2"])
def test_rounding_can_start_halfway_to_the_codes_that_gptq_finds_on_balanced_inputs(
    name: str, teacher: Path, samples: Path, tmp_path: Path
) -> None:
    def look(module: LightningModule) -> None:
        assert isinstance(module, PTQ4DiT)
        assert module.opened is not None
        layer = module.opened.layers[f"transformer_blocks.0.{name}"]
        rounding, weight = layer.rounding, layer.teacher_weight
        assert isinstance(rounding, AdaptiveRounding)
        assert weight is not None
        inputs = torch.cat([x.flatten(0, -2) for x in inputs_of(module, name).values()]).double()
        if layer.transform is not None:
            assert layer.transform.channel_scale is not None
            inputs = inputs * layer.transform.channel_scale
            weight = layer.transform.weight(weight)
        inputs = fake_quantize_tokens(inputs.float(), EIGHT).double()
        weight = weight.float()
        expected = gptq_codes(weight, inputs.T @ inputs, rounding.step, module.weight)
        assert rounding.origin is not None
        start = ((2 * rounding.origin - weight) / rounding.step).round()
        assert float((start == expected).float().mean()) > 0.995  # sums in another order
        nearest = codes(weight, rounding.step, module.weight)
        assert float((start == nearest).float().mean()) < 0.95

    looked = First(look)
    fit(tmp_path, method(teacher, rounding_start="gptq", activation=EIGHT), samples, looked)
    assert looked.seen


CPU = torch.device("cpu")
STATIC = QuantSpec(num_bits=8, strategy="tensor", symmetric=False)
ASYMMETRIC = QuantSpec(num_bits=3, symmetric=False)
SWITCHES: list[dict[str, Any]] = [
    {"balance": "none"},
    {"reconstruct": False},
    {"balance": "none", "reconstruct": False},
    {"salience": "mean"},
    {"salience": "max"},
    {"salience": "midpoint"},
    {"gauge": False, "activation": QuantSpec(num_bits=4, strategy="token", dynamic=True)},
    {"balance_feed_forward_down": True},
    {"rounding_weight": 10.0},
    {"lambda_scaling": "none", "rounding_weight": 10.0},
    {"grid": 2},
    {"rounding_start": "gptq"},
    {"weight": ASYMMETRIC},
    {"weight": ASYMMETRIC, "rounding_start": "gptq"},
    {"weight": ASYMMETRIC, "reconstruct": False},
    {"activation": STATIC},
    {"activation": STATIC, "balance": "none"},
    {"activation": STATIC, "reconstruct": False},
    {"activation": STATIC, "step_size": "absolute", "step_lr": 4e-5},
    {"activation": QuantSpec(num_bits=8, strategy="tensor")},
    {"quantize_attention": True},
    {"quantize_attention": True, "activation": STATIC},
    {"quantize_attention": True, "activation": STATIC, "reconstruct": False},
    {"inputs": "mix"},
    {"inputs": "full_precision"},
    {"adaln": "fp"},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_every_switch_runs_and_changes_what_it_should(
    switch: dict[str, Any], teacher: Path, samples: Path, tmp_path: Path
) -> None:
    module = method(teacher, **switch)
    base = {"rounding_weight": 10.0} if "lambda_scaling" in switch else {}
    fit(tmp_path / "switched", module, samples)
    assert 0 < module.final_error["reconstructed"] < 1
    fit(tmp_path / "default", method(teacher, **base), samples)
    assert quantized_bytes(tmp_path / "switched") != quantized_bytes(tmp_path / "default")
    loaded = recon.load(tmp_path / "switched")
    whole, sample = network(module, "quantized", CPU), module.frontier.sample(0)
    with torch.no_grad():
        outputs = [net(**sample, return_dict=False)[0] for net in (whole, loaded)]
    assert torch.equal(*outputs)


def test_ranges_of_attention_come_from_the_unbalanced_operands_of_all_samples(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    def look(module: LightningModule) -> None:
        assert isinstance(module, PTQ4DiT)
        assert module.opened is not None
        (name, products), *others = module.opened.attentions.items()
        assert not others
        # Full range: with a grid of two ratios and 8 bits the narrow one, 0.2, costs more.
        for operand, linear in (("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
            layer = module.opened.groups[1].linears[f"{name}.{linear}"]
            inputs = inputs_of(module, f"attn1.{linear}")
            outputs = torch.cat([layer(x).detach() for x in inputs.values()])
            if operand == "query":
                outputs = outputs / 16**0.5
            step, zero_point = static_grid(float(outputs.min()), float(outputs.max()), STATIC)
            found = products.ranges[operand]
            assert isinstance(found, StaticRange)
            assert found.log_step is not None
            assert float(found.log_step.detach().exp()) == pytest.approx(step, rel=1e-4)
            assert float(found.zero_point) == zero_point
        probability = products.ranges["probability"]
        assert isinstance(probability, StaticRange)
        assert probability.spec.num_bits == 6
        assert float(probability.zero_point) == 0
        learned = {
            id(p) for group in module.parameter_groups(module.opened) for p in group["params"]
        }
        assert {id(p) for p in products.parameters()} <= learned
        assert len(list(products.parameters())) == 4

    looked = First(look)
    attended = method(teacher, activation=STATIC, quantize_attention=True, softmax_bits=6, grid=2)
    fit(tmp_path, attended, samples, looked)
    assert looked.seen
    manifest = json.loads((tmp_path / "quantized" / "manifest.json").read_text())
    assert manifest["attentions"]["transformer_blocks.1.attn1"]["softmax_bits"] == 6


LEARNED_STEPS = {"activation": STATIC, "quantize_attention": True, "step_lr": 0.05}


@pytest.mark.parametrize("step", [4, 9])
@pytest.mark.parametrize(
    "switches", [LEARNED_STEPS, {"rounding_start": "gptq"}], ids=["steps of attention", "gptq"]
)
def test_what_is_learned_continues_bit_for_bit(
    switches: dict[str, Any], step: int, teacher: Path, samples: Path, tmp_path: Path
) -> None:
    def make() -> PTQ4DiT:
        return method(teacher, **switches)

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            if trainer.global_step == step:
                raise Interruption

    whole, after, module = Soft(), Soft(), make()
    fit(tmp_path / "whole", module, samples, whole)
    with pytest.raises(Interruption):
        fit(tmp_path / "stopped", make(), samples, Stop())
    again, newest = make(), str(written(tmp_path / "stopped")[0])
    fit(tmp_path / "stopped", again, samples, after, ckpt_path=newest)
    steps = sorted(after.after)
    assert steps[0] > step - 2
    assert steps[-1] == 12
    if switches is LEARNED_STEPS:
        assert any(".attn1" in key or "/attn1.ranges" in key for key in after.after[12])
    for number, state in after.after.items():
        assert_same(state, whole.after[number])
    assert quantized_bytes(tmp_path / "stopped") == quantized_bytes(tmp_path / "whole")
    assert again.final_error == module.final_error


def test_attention_is_quantised_where_the_family_lets_it_be(teacher: Path, tmp_path: Path) -> None:
    video = write_tiny_cogvideox(tmp_path)
    refused = PTQ4DiT(adapter=CogVideoX(str(video)), quantize_attention=True)
    with pytest.raises(CapabilityMissing, match="CogVideoX does not let be replaced"):
        refused.check()
    method(teacher, quantize_attention=True).check()
    with pytest.raises(ConfigError, match=r"softmax_bits must lie in \[2, 8\], got 9"):
        method(teacher, quantize_attention=True, softmax_bits=9).check()
    with pytest.raises(ConfigError, match=r"model\.activation is null"):
        method(teacher, quantize_attention=True, activation=None).check()


def edited(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a teacher with other weights."""
    shutil.copytree(source, folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


def kill_channels(tensors: dict[str, Tensor]) -> None:
    """In the first block a dead input channel, a dead weight column, and an attention of zeros."""
    block, width = "transformer_blocks.0", 32
    for leaf, scale in (("weight", 0.0), ("bias", -1.0)):  # (1 + scale) LN(z) + shift = 0
        tensors[f"{block}.norm1.linear.{leaf}"][3] = 0
        tensors[f"{block}.norm1.linear.{leaf}"][width + 3] = scale
        tensors[f"{block}.attn1.to_v.{leaf}"].zero_()
    tensors[f"{block}.ff.net.0.proj.weight"][:, 5] = 0


@pytest.mark.parametrize("activation", [STATIC, None], ids=["fixed ranges", "per token"])
def test_dead_channels_and_ranges_of_nothing_give_finite_numbers(
    activation: QuantSpec | None, teacher: Path, samples: Path, tmp_path: Path
) -> None:
    dead = edited(teacher, tmp_path / "teacher", kill_channels)
    given = {} if activation is None else {"activation": activation}

    def look(module: LightningModule) -> None:
        assert isinstance(module, PTQ4DiT)
        assert module.opened is not None
        record = module.opened.record.absmax
        assert float(record["transformer_blocks.0.attn1.to_q"][3]) == 0
        assert float(record["transformer_blocks.0.attn1.to_out.0"].max()) == 0

    looked, module = First(look), method(dead, quantize_attention=True, **given)
    fit(tmp_path / "run", module, samples, looked)
    assert looked.seen
    assert 0 < module.final_error["reconstructed"] < 1
    saved = load_file(tmp_path / "run" / "quantized" / "quantized.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in saved.values())
    assert all(float(t.min()) > 0 for name, t in saved.items() if name.endswith(("scale", "step")))


def equalise(tensors: dict[str, Tensor]) -> None:
    """Every channel of the balanced linears gets the same largest weight."""
    names = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj")
    for key, tensor in tensors.items():
        if key.endswith(tuple(f"{name}.weight" for name in names)):
            tensor.copy_(0.1 * tensor.sign())


def test_a_constant_salience_has_no_rank_and_ssc_is_then_the_mean(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    even = edited(teacher, tmp_path / "teacher", equalise)
    for salience in ("ssc", "mean", "max"):
        fit(tmp_path / salience, method(even, salience=salience), samples)
    assert quantized_bytes(tmp_path / "ssc") == quantized_bytes(tmp_path / "mean")
    assert quantized_bytes(tmp_path / "ssc") != quantized_bytes(tmp_path / "max")


def test_one_sample_per_timestep_makes_no_difference_to_ssc_and_a_repeated_one_does(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    fit(tmp_path / "timestep", method(teacher), samples)
    fit(tmp_path / "sample", method(teacher, ssc_over="sample"), samples)
    assert quantized_bytes(tmp_path / "timestep") == quantized_bytes(tmp_path / "sample")
    timesteps = [300, 100, 300, 500]
    assert timestep_rows([{"timestep": torch.tensor([t, t])} for t in timesteps]) == [1, 0, 1, 2]


def test_the_loss_is_a_sum_over_tokens_and_a_mean_over_channels(teacher: Path) -> None:
    module = method(teacher)
    ones = torch.ones(2, 3, 5)
    assert float(module.unit_loss(ones, 0 * ones, 0)["mse"]) == 3
    assert PUBLISHED_TOKENS == 256


def test_two_block_forwards_per_sample_and_a_learned_rounding_beats_the_nearest(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    learned, nearest = method(teacher, steps=60), method(teacher, reconstruct=False)
    fit(tmp_path / "learned", learned, samples)
    fit(tmp_path / "nearest", nearest, samples)
    count = learned.sample_count + 2  # two are held out
    assert learned.forwards["teacher"] == learned.forwards["student"] == 2 * count
    assert learned.final_error["reconstructed"] < nearest.final_error["reconstructed"]


def test_samples_that_go_through_together_give_the_gradient_of_each_alone(
    teacher: Path, samples: Path, tmp_path: Path
) -> None:
    alone = method(teacher, batch_size=4)
    together = method(teacher, batch_size=4, micro_batch=2)
    fit(tmp_path / "alone", alone, samples)
    fit(tmp_path / "together", together, samples)
    for one, other in zip(alone.history, together.history, strict=True):
        assert one["loss_first"] == pytest.approx(other["loss_first"], rel=1e-5)
        assert one["loss_last"] == pytest.approx(other["loss_last"], rel=1e-3)


@pytest.mark.parametrize(("key", "value"), [("steps", 0), ("grid", 1)])
def test_numbers_out_of_range_are_refused(teacher: Path, key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{key} must be at least"):
        method(teacher, **{key: value})
