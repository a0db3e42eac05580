import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recon.errors import ConfigError
from recon.quantizers.affine import (
    absmax_scale,
    codes,
    dequantize,
    fake_quantize,
    fake_quantize_tokens,
    round_ste,
    weight_range,
)
from recon.quantizers.ranges import clip_rows, mse_clip_ratio
from recon.quantizers.spec import QuantSpec, ScaleDenominator
from tests.reference.quantizer import codes_by_loop, fake_quantize_by_autograd

TOKENS = QuantSpec(num_bits=4, strategy="token", dynamic=True)
CLIP_START = 1 / (1 + math.exp(-4.0))  # FlatQuant's start, a logit of 4


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("denominator", ["qmax", "half_range"])
def test_codes_equal_equation_1(bits: int, denominator: ScaleDenominator) -> None:
    spec = QuantSpec(num_bits=bits, scale_denominator=denominator)
    x = draw(5, 37)
    x[2] = 0
    expected, scales = codes_by_loop(x, spec.denominator, spec.qmin, spec.qmax)
    scale = absmax_scale(weight_range(x, spec), spec)
    torch.testing.assert_close(scale, scales, rtol=0, atol=0)
    torch.testing.assert_close(codes(x, scale, spec), expected, rtol=0, atol=0)
    assert scale[2] == 1


def test_the_two_denominators_on_one_row() -> None:
    row = torch.tensor([[-3.0, 1.5, 3.0]])
    by_qmax = QuantSpec(num_bits=4)
    scale = absmax_scale(weight_range(row, by_qmax), by_qmax)
    assert scale.item() == pytest.approx(3 / 7)
    assert codes(row, scale, by_qmax).tolist() == [[-7, 4, 7]]
    by_range = QuantSpec(num_bits=4, scale_denominator="half_range")
    scale = absmax_scale(weight_range(row, by_range), by_range)
    assert scale.item() == pytest.approx(3 / 7.5)
    assert codes(row, scale, by_range).tolist() == [[-8, 4, 7]]  # 7.5 rounds to 8, then clamps


def test_scale_is_one_where_the_range_is_zero_and_keeps_nan() -> None:
    spec = QuantSpec(num_bits=4)
    scale = absmax_scale(torch.tensor([0.0, 1e-45, 7.0, float("nan")]), spec)
    assert scale[:3].tolist() == [1.0, 1.0, 1.0]
    assert scale[3].isnan()


def test_bfloat16_is_rounded_in_float32() -> None:
    spec = QuantSpec(num_bits=8)
    x = draw(6, 64).bfloat16()
    scale = absmax_scale(weight_range(x, spec), spec)
    assert scale.dtype == torch.float32
    expected, scales = codes_by_loop(x.float(), spec.denominator, spec.qmin, spec.qmax)
    assert torch.equal(codes(x, scale, spec), expected)
    value = fake_quantize(x, scale, spec)
    assert value.dtype == torch.bfloat16
    assert torch.equal(value, (expected * scales).bfloat16())


def test_group_scales_equal_channel_scales_of_the_pieces() -> None:
    spec = QuantSpec(num_bits=3, strategy="group", group_size=8)
    rows = QuantSpec(num_bits=3)
    weight = draw(4, 24)
    absmax = weight_range(weight, spec)
    assert absmax.shape == (4, 3)
    scale = absmax_scale(absmax, spec)
    for group in range(3):
        piece = weight[:, 8 * group : 8 * group + 8]
        piece_scale = absmax_scale(weight_range(piece, rows), rows)
        assert torch.equal(scale[:, group : group + 1], piece_scale)
        expected = codes(piece, piece_scale, rows)
        assert torch.equal(codes(weight, scale, spec)[:, 8 * group : 8 * group + 8], expected)
    value = fake_quantize(weight, scale, spec)
    assert torch.equal(value, dequantize(codes(weight, scale, spec), scale, spec))


def test_tensor_strategy_has_one_scale() -> None:
    spec = QuantSpec(num_bits=8, strategy="tensor")
    weight = draw(4, 6)
    absmax = weight_range(weight, spec)
    assert absmax.shape == (1, 1)
    assert absmax.item() == weight.abs().max().item()
    scale = absmax_scale(absmax, spec)
    assert codes(weight, scale, spec).abs().max() == 127


def test_rounding_once_is_enough() -> None:
    spec = QuantSpec(num_bits=4)
    weight = draw(16, 256)
    scale = absmax_scale(weight_range(weight, spec), spec)
    once = fake_quantize(weight, scale, spec)
    assert torch.equal(once, dequantize(codes(weight, scale, spec), scale, spec))
    assert torch.equal(dequantize(codes(once, scale, spec).to(torch.int8), scale, spec), once)
    assert max(len(row.unique()) for row in once) <= 2**4


def test_round_ste_rounds_to_even_and_passes_the_gradient() -> None:
    x = torch.tensor([0.5, 1.5, -2.4, 1e7], requires_grad=True)
    rounded = round_ste(x)
    assert rounded.tolist() == [0, 2, -2, 1e7]
    (rounded * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 2, 3, 4]


def gradients(f: Callable[[], Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    value = f()
    return torch.autograd.grad(
        (value * draw(*value.shape, dtype=value.dtype, seed=9)).sum(), leaves
    )


@pytest.mark.parametrize("shrink", [1.0, 0.5])  # 0.5: half of the range is clamped
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_equal_those_of_plain_autograd(bits: int, shrink: float) -> None:
    spec = QuantSpec(num_bits=bits)
    x = draw(7, 33, dtype=torch.float64).requires_grad_()
    scale = (absmax_scale(weight_range(x.detach(), spec), spec) * shrink).requires_grad_()
    ours = gradients(lambda: fake_quantize(x, scale, spec), x, scale)
    plain = gradients(lambda: fake_quantize_by_autograd(x, scale, spec.qmin, spec.qmax), x, scale)
    torch.testing.assert_close(ours, plain)


def test_gradient_through_the_range_equals_plain_autograd_also_for_ties() -> None:
    spec = QuantSpec(num_bits=4)
    x = draw(6, 20, dtype=torch.float64)
    x[0, 3], x[0, 5] = 4.0, -4.0  # a tie of both signs
    x[1] = 0
    x.requires_grad_()

    def plain() -> Tensor:
        absmax = x.abs().amax(-1, keepdim=True)
        scale = torch.where(absmax > 0, absmax / 7, 1.0)
        return fake_quantize_by_autograd(x, scale, -8, 7)

    ours = gradients(lambda: fake_quantize(x, absmax_scale(weight_range(x, spec), spec), spec), x)
    torch.testing.assert_close(ours, gradients(plain, x))


def test_scale_gradient_equals_finite_differences_where_the_codes_stay() -> None:
    # Where no rounding flips, d(value)/d(scale) is the code; the straight-through part is
    # the rest, -x/s, for values inside the range.
    spec = QuantSpec(num_bits=4)
    x = draw(3, 9, dtype=torch.float64)
    scale = torch.full((3, 1), 0.31, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(fake_quantize(x, scale, spec).sum(), scale)
    step = 1e-7
    moved = dequantize(codes(x, scale + step, spec), scale + step, spec)
    still = dequantize(codes(x, scale, spec), scale, spec)
    numeric = ((moved - still) / step).sum(-1, keepdim=True)
    quotient = x / scale.detach()
    inside = (quotient.round() >= -8) & (quotient.round() <= 7)
    torch.testing.assert_close(
        grad, numeric - (quotient * inside).sum(-1, keepdim=True), rtol=1e-5, atol=1e-5
    )


def test_group_gradient_has_the_shape_of_the_scale() -> None:
    spec = QuantSpec(num_bits=4, strategy="group", group_size=5)
    x = draw(4, 20, dtype=torch.float64).requires_grad_()
    scale = absmax_scale(weight_range(x.detach(), spec), spec).requires_grad_()
    ours = gradients(lambda: fake_quantize(x, scale, spec), x, scale)
    wide = gradients(
        lambda: fake_quantize_by_autograd(x, scale.repeat_interleave(5, 1), -8, 7), x, scale
    )
    torch.testing.assert_close(ours, wide)


def test_tokens_equal_the_rows_of_the_loop_and_a_zero_token_stays_zero() -> None:
    x = draw(2, 3, 11)
    x[1, 1] = 0
    expected, scales = codes_by_loop(x.reshape(-1, 11), 7, -8, 7)
    value = fake_quantize_tokens(x, TOKENS)
    assert torch.equal(value, (expected * scales).reshape(x.shape))
    assert not value[1, 1].any()
    assert fake_quantize_tokens(x.bfloat16(), TOKENS).dtype == torch.bfloat16


def test_clip_shrinks_each_end_and_keeps_zero_inside() -> None:
    x = torch.tensor([[1.0, 2.0, 4.0], [-8.0, 1.0, 4.0]])
    clip = torch.tensor([CLIP_START, 0.25])
    value = fake_quantize_tokens(x, TOKENS, clip)
    assert value.max(-1).values[0].item() == pytest.approx(4 * 0.982, abs=1e-3)
    # Row 1: |min| 8 * 0.25 = 2 against max 4 * 0.982; the larger end gives the scale.
    scale = 4 * CLIP_START / 7
    assert value[1, 0].item() == pytest.approx(-8 * scale)
    assert value[1, 2].item() == pytest.approx(7 * scale)


def test_gradients_of_tokens_reach_clip_and_input() -> None:
    x = draw(5, 16, dtype=torch.float64).requires_grad_()
    logits = torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True)

    def plain() -> Tensor:
        ratio = logits.sigmoid()
        upper = x.amax(-1, keepdim=True).clamp_min(0) * ratio[0]
        lower = x.amin(-1, keepdim=True).clamp_max(0) * ratio[1]
        scale = torch.maximum(upper, lower.abs()) / 7
        return fake_quantize_by_autograd(x, scale, -8, 7)

    ours = gradients(lambda: fake_quantize_tokens(x, TOKENS, logits.sigmoid()), x, logits)
    torch.testing.assert_close(ours, gradients(plain, x, logits))
    assert all(grad.abs().sum() > 0 for grad in ours)


def test_weight_clip_starts_at_0_982_and_gets_a_gradient() -> None:
    weight = draw(4, 50, dtype=torch.float64).requires_grad_()
    logits = torch.full((2, 4, 1), 4.0, dtype=torch.float64, requires_grad=True)
    ratio = logits.sigmoid()
    clipped = clip_rows(weight, ratio[0], ratio[1])
    torch.testing.assert_close(clipped.amax(-1), weight.amax(-1) * CLIP_START)
    torch.testing.assert_close(clipped.amin(-1), weight.amin(-1) * CLIP_START)
    assert pytest.approx(0.982, abs=1e-3) == CLIP_START
    spec = QuantSpec(num_bits=4)
    value = fake_quantize(clipped, absmax_scale(weight_range(clipped, spec), spec), spec)
    grads = torch.autograd.grad(value.square().sum(), (weight, logits))
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_compiled_equals_eager_with_gradients() -> None:
    spec = QuantSpec(num_bits=4)

    def both(weight: Tensor, x: Tensor, clip: Tensor) -> Tensor:
        quantised = fake_quantize(weight, absmax_scale(weight_range(weight, spec), spec), spec)
        return fake_quantize_tokens(x, TOKENS, clip) @ quantised.t()

    leaves = (draw(8, 24), draw(2, 5, 24, seed=1), torch.tensor([0.9, 0.8]))
    for leaf in leaves:
        leaf.requires_grad_()
    # aot_eager traces what inductor would compile, without the C++ compiler's seconds.
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), both(*leaves))
    torch.testing.assert_close(
        gradients(lambda: compiled(*leaves), *leaves), gradients(lambda: both(*leaves), *leaves)
    )


@pytest.mark.parametrize("strategy", ["channel", "group"])
def test_mse_clip_ratio_is_the_best_of_the_grid(strategy: str) -> None:
    spec = (
        QuantSpec(num_bits=3)
        if strategy == "channel"
        else QuantSpec(num_bits=3, strategy="group", group_size=32)
    )
    weight = draw(6, 96)
    weight[4] = 0
    absmax = weight_range(weight, spec)
    ratio = mse_clip_ratio(weight, spec, grid=81)
    assert ratio.shape == absmax.shape
    assert bool((ratio[4] == 1).all())

    def error(candidate: Tensor) -> Tensor:
        scale = absmax_scale(absmax * candidate, spec)
        square = (fake_quantize(weight, scale, spec) - weight).square()
        return square.unflatten(1, (absmax.shape[1], -1)).sum(-1)

    for candidate in torch.linspace(0.2, 1.0, 81):
        assert bool((error(ratio) <= error(torch.full_like(ratio, float(candidate))) + 1e-5).all())
    assert error(ratio).sum() < 0.9 * error(torch.ones_like(ratio)).sum()


def test_errors_name_value_rule_and_remedy() -> None:
    weight = draw(2, 1152)
    with pytest.raises(
        ConfigError, match=r"group_size is 256, which does not divide the 1152 .*\(144, 192, 288\)"
    ):
        weight_range(weight, QuantSpec(strategy="group", group_size=256))
    with pytest.raises(
        ConfigError, match=r"does not divide the 7 inputs of the weight\. Set strat"
    ):
        weight_range(draw(2, 7), QuantSpec(strategy="group", group_size=4))
    with pytest.raises(ConfigError, match=r"scale has 2 groups, but 1152 inputs in groups of 64"):
        codes(weight, torch.ones(2, 2), QuantSpec(strategy="group", group_size=64))
    with pytest.raises(ConfigError, match=r"strategy is token, which describes activations, not"):
        weight_range(weight, TOKENS)
    with pytest.raises(ConfigError, match=r"strategy is channel, which has no range per token\. S"):
        fake_quantize_tokens(weight, QuantSpec())
    with pytest.raises(ConfigError, match=r"at least 2 ratios, got grid 1\. Use 80 or more"):
        mse_clip_ratio(weight, QuantSpec(), grid=1)
