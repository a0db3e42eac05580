"""Weights with a zero-point per row: searched, learned, rounded by GPTQ, closed."""

import pytest
import torch
from torch import Tensor, nn

from recon.errors import ConfigError
from recon.layers.quant_linear import QuantLinear
from recon.layers.rounding import AdaptiveRounding
from recon.methods.adaround import AdaRound
from recon.methods.ptq4dit import PTQ4DiT
from recon.models.dit import DiT
from recon.models.folding import scale_rows
from recon.quantizers.affine import absmax_scale, codes, dequantize, weight_range
from recon.quantizers.packing import unpack
from recon.quantizers.ranges import mse_clip_ratio, mse_zero_points
from recon.quantizers.spec import QuantSpec

SPEC = QuantSpec(num_bits=4, symmetric=False)
OUT, WIDTH = 6, 40


@pytest.fixture
def weight() -> Tensor:
    """Rows to one side of zero, as after balancing; the last is dead."""
    drawn = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(0))
    made = drawn.square() * torch.tensor([1.0, -1.0, 0.3, -5.0, 1.0, 0.0])[:, None]
    made[4] += 2  # zero stays inside the range
    return made


def linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(WIDTH, OUT, bias=False)
    made.weight.data = weight.clone()
    return made.requires_grad_(False)


def by_hand(row: list[float]) -> tuple[float, float]:
    """Step and unsigned zero-point of the range, of 80, that leaves the least square error."""
    least, best = float("inf"), (1.0, 0.0)
    for number in range(80):
        ratio = 1.0 - 0.8 * number / 79
        low, high = ratio * min(0.0, *row), ratio * max(0.0, *row)
        step = (high - low) / 15 or 1.0
        zero = round(-low / step)
        made = [step * (min(15, max(0, round(x / step) + zero)) - zero) for x in row]
        error = sum((one - other) ** 2 for one, other in zip(made, row, strict=True))
        if error < least * (1 - 1e-9):
            least, best = error, (step, zero)
    return best


def test_every_row_gets_the_grid_with_the_least_error(weight: Tensor) -> None:
    step, zero_point = mse_zero_points(weight, SPEC)
    expected = [by_hand(row) for row in weight.double().tolist()]
    for row, (one, zero) in enumerate(expected):
        assert float(step[row]) == pytest.approx(one, rel=1e-5)
        assert float(zero_point[row]) == zero - 8
    made = dequantize(
        codes(weight + step * zero_point, step, SPEC.signed) - zero_point, step, SPEC.signed
    )
    error = (made - weight).square().sum()
    signed = SPEC.signed
    scale = absmax_scale(weight_range(weight, signed) * mse_clip_ratio(weight, signed), signed)
    symmetric = (dequantize(codes(weight, scale, signed), scale, signed) - weight).square().sum()
    assert float(error) < 0.5 * float(symmetric)


@torch.no_grad()
def test_rounding_starts_at_the_weight_and_closes_on_unsigned_codes(weight: Tensor) -> None:
    step, zero_point = mse_zero_points(weight, SPEC, grid=1)
    rounding = AdaptiveRounding(weight, step, SPEC, zero_point=zero_point)
    # The full range, rounded zero-points aside: only what a row's ends lose is cut.
    assert float((rounding(weight) - weight).abs().max()) <= float(0.51 * step.max())
    inner = weight.abs() < 0.5 * weight.abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(rounding(weight)[inner], weight[inner], rtol=1e-4, atol=1e-5)
    layer = QuantLinear(linear(weight), SPEC, None, rounding=rounding)
    layer.close(*rounding.close(weight))
    assert layer.codes is not None
    assert layer.scale is not None
    unsigned = unpack(layer.codes, 4, WIDTH).float() + 8
    expected = step * (unsigned - (zero_point + 8))
    torch.testing.assert_close(layer.quantized_weight(), expected)
    assert float((expected - weight).abs().max()) <= float(1.01 * step.max())
    again = QuantLinear(nn.Linear(WIDTH, OUT, bias=False, device="meta"), SPEC, None)
    again.adopt(dict(layer.state_dict()), None)
    assert torch.equal(again.quantized_weight(), layer.quantized_weight())
    before = layer.quantized_weight()
    scale_rows(layer, torch.full((OUT,), 2.0))
    assert torch.equal(layer.quantized_weight(), 2 * before)


def test_the_yardstick_has_zero_points_on_full_ranges(weight: Tensor) -> None:
    layer = QuantLinear(linear(weight), SPEC, None)
    step = (weight.amax(1).clamp(min=0) - weight.amin(1).clamp(max=0))[:, None] / 15
    error = (layer.quantized_weight() - weight).abs()
    assert bool((error <= 1.01 * step).all())
    assert int(layer.quantized_weight()[0].unique().numel()) > 8


def test_methods_without_zero_points_refuse_them() -> None:
    with pytest.raises(ConfigError, match="AdaRound finds no zero-points of weights"):
        AdaRound(adapter=DiT("nowhere"), weight=SPEC).check()
    whole = QuantSpec(num_bits=4, strategy="tensor", symmetric=False)
    with pytest.raises(ConfigError, match="symmetric is false with strategy tensor"):
        PTQ4DiT(adapter=DiT("nowhere"), weight=whole).check()
