"""Rounding with a learned offset, and ranges that are searched, then learned."""

import math

import pytest
import torch
from torch import nn

from recon.layers.quant_linear import QuantLinear
from recon.layers.rounding import OffsetRounding
from recon.layers.searched_range import SearchedRange
from recon.layers.static_range import StaticRange
from recon.layers.token_range import TokenRange
from recon.quantizers.affine import (
    absmax_scale,
    codes,
    dequantize,
    fake_quantize_tokens,
    weight_range,
)
from recon.quantizers.spec import QuantSpec

SPECS = [QuantSpec(num_bits=4), QuantSpec(num_bits=3, strategy="group", group_size=4)]
TOKEN = QuantSpec(num_bits=4, strategy="token", dynamic=True)
CHANNEL = QuantSpec(num_bits=4, strategy="channel", symmetric=False)
BOUNDS = (math.log(0.25), math.log(1.5))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_it_starts_at_the_nearest_codes(spec: QuantSpec, bounds: tuple[float, float]) -> None:
    weight = random(6, 8)
    scale = absmax_scale(weight_range(weight, spec), spec)
    learns = bounds is not None
    rounding = OffsetRounding(weight, scale, spec, bounds=bounds, learn_offset=learns)
    found, step = rounding.close(weight)
    assert torch.equal(found, codes(weight, scale, spec))
    assert torch.equal(step, scale)
    assert len(list(rounding.parameters())) == (0 if bounds is None else 2)


@pytest.mark.parametrize("spec", SPECS)
def test_offsets_move_codes_by_one_at_most_and_closing_changes_no_value(spec: QuantSpec) -> None:
    weight = random(6, 8)
    scale = absmax_scale(weight_range(weight, spec), spec)
    rounding = OffsetRounding(weight, scale, spec, bounds=BOUNDS, learn_offset=True)
    assert rounding.offset is not None
    with torch.no_grad():
        rounding.offset.copy_(3 * random(6, 8, seed=1))  # far outside: held at half a step
    found, step = rounding.close(weight)
    nearest = codes(weight, scale, spec)
    assert 0 < float((found - nearest).abs().max()) <= 1
    blocks = found.unflatten(-1, (step.shape[-1], -1)) * step.unsqueeze(-1)
    torch.testing.assert_close(rounding(weight), blocks.flatten(-2), rtol=0, atol=1e-6)


def test_gradients_reach_the_offset_and_the_step() -> None:
    weight = random(6, 8)
    spec = SPECS[0]
    rounding = OffsetRounding(
        weight, absmax_scale(weight_range(weight, spec), spec), spec, bounds=BOUNDS,
        learn_offset=True,
    )  # fmt: skip
    rounding(weight).square().sum().backward()
    for parameter in rounding.parameters():
        assert parameter.grad is not None
        assert float(parameter.grad.abs().sum()) > 0


def test_a_token_range_is_the_clip_it_says_and_folds_into_the_layer() -> None:
    x = random(5, 8)
    range_ = TokenRange(0.7, TOKEN, bounds=BOUNDS)
    torch.testing.assert_close(range_(x), fake_quantize_tokens(x, TOKEN, torch.tensor([0.7, 0.7])))
    layer = QuantLinear(nn.Linear(8, 3), SPECS[0], TOKEN, activation_range=range_)
    assert range_.log_factor is not None
    with torch.no_grad():
        range_.log_factor.fill_(5.0)  # beyond the bound
    before = layer(x).detach()
    layer.fold()
    assert layer.activation_range is None
    assert layer.activation_clip is not None
    assert float(layer.activation_clip[0]) == pytest.approx(0.7 * 1.5)
    assert torch.equal(layer(x), before)


def test_a_learned_range_stays_within_its_bounds_and_finds_its_way_back() -> None:
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 3.0])
    made = StaticRange(low, high, CHANNEL, "log", bounds=BOUNDS)
    assert made.log_step is not None
    start = made.step.clone()
    with torch.no_grad():
        made.log_step.sub_(10)
    x = torch.full((4, 2), 0.3)
    made(x).sum().backward()
    assert made.log_step.grad is not None
    assert float(made.log_step.grad.abs().sum()) > 0
    made.fold()
    torch.testing.assert_close(made.step, 0.25 * start)


def test_each_channel_has_a_grid_of_its_own_even_a_dead_one() -> None:
    x = torch.stack([torch.linspace(-1, 1, 9), torch.linspace(0, 100, 9), torch.zeros(9)], dim=1)
    low, high = x.aminmax(dim=0)
    made = StaticRange(low, high, CHANNEL, None)
    error = (made(x) - x).abs().amax(0)
    assert (error <= made.step / 2 + 1e-5).all()
    assert float(made.step[1]) == pytest.approx(100 / 15)
    assert float(error[2]) == 0


@pytest.mark.parametrize(
    ("spec", "candidates"),
    [
        (TOKEN, [(1.0,), (0.5,)]),
        (
            CHANNEL,
            [(-torch.ones(8), torch.ones(8)), (-torch.full((8,), 0.5), torch.full((8,), 0.5))],
        ),
    ],
)
def test_a_searched_range_moves_and_starts_anew_where_it_was_left(
    spec: QuantSpec, candidates: list[tuple[float]]
) -> None:
    x = random(20, 8)
    site = SearchedRange(spec, candidates)
    outputs = []
    for candidate in (0, 1):
        site.select(candidate)
        outputs.append(site.range(x))
    assert not torch.equal(*outputs)
    errors = site.errors(x, 0.5)
    expected = torch.stack([(o - x).abs().double().pow(0.5).sum() for o in outputs])
    torch.testing.assert_close(errors, expected)
    learned = site.restart(1, BOUNDS)
    torch.testing.assert_close(learned(x).detach(), outputs[1])
    assert len(list(learned.parameters())) == 1
    assert not list(site.restart(1, None).parameters())


def test_step_sizes_can_learn_alone_and_a_weight_through_its_rounding() -> None:
    spec = QuantSpec(num_bits=4, strategy="channel")
    weight = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    scale = absmax_scale(weight_range(weight.detach(), spec), spec)
    rounding = OffsetRounding(weight.detach(), scale, spec, bounds=BOUNDS)
    assert [name for name, _ in rounding.named_parameters()] == ["log_factor"]
    rounding(weight).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones_like(weight))
    codes, closed = rounding.close(weight)
    assert torch.equal(dequantize(codes, closed, spec), rounding(weight))
