import pytest
import torch
from torch import Tensor

from recon.layers.quant_attention import OPERANDS, QuantAttention, scaled
from recon.layers.static_range import StaticRange
from recon.quantizers.affine import fake_quantize_tokens
from recon.quantizers.spec import QuantSpec
from tests.reference.attention import quantized_attention

STATIC = QuantSpec(num_bits=4, strategy="tensor", symmetric=False)
TOKEN = QuantSpec(num_bits=4, strategy="token", dynamic=True)
ENDS = {"query": (-0.8, 0.9), "key": (-2.0, 1.5), "value": (-1.0, 3.0), "probability": (0.0, 0.6)}


def operands(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, [2, 3, 5, 4] each: some outside the ranges of ENDS."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 2, 3, 5, 4, generator=generator).unbind(0)
    return query, key, value


def fixed(learn: str | None = None, softmax_bits: int = 6) -> QuantAttention:
    made = QuantAttention(STATIC, softmax_bits)
    for name, (low, high) in ENDS.items():
        made.ranges[name] = StaticRange(low, high, made.spec(name), learn)  # type: ignore[arg-type]
    return made


def static_of(products: QuantAttention, operand: str) -> StaticRange:
    found = products.ranges[operand]
    assert isinstance(found, StaticRange)
    return found


def test_fixed_ranges_give_what_the_plain_restatement_gives() -> None:
    query, key, value = operands()
    products = fixed()
    grids = {
        name: (
            float(static_of(products, name).step),
            int(static_of(products, name).zero_point),
            products.spec(name).num_bits,
        )
        for name in OPERANDS
    }
    found = products(query, key, value)
    assert found.shape == query.shape
    for row in range(2):
        for head in range(3):
            expected = quantized_attention(
                query[row, head].tolist(), key[row, head].tolist(), value[row, head].tolist(), grids
            )
            torch.testing.assert_close(
                found[row, head], torch.tensor(expected), atol=1e-5, rtol=1e-5
            )


def test_with_many_bits_and_wide_ranges_it_is_attention() -> None:
    query, key, value = operands()
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    for spec in (
        QuantSpec(num_bits=8, strategy="token", dynamic=True),
        QuantSpec(num_bits=8, strategy="tensor", symmetric=False),
    ):
        found = QuantAttention(spec, 8)(query, key, value)
        assert 0 < float((found - exact).abs().max()) < 0.03


def test_every_token_of_every_head_has_a_range_of_its_own() -> None:
    query, key, value = operands()
    left, right = (fake_quantize_tokens(x, TOKEN) for x in (scaled(query), key))
    softmax = (left @ right.mT).softmax(-1)
    largest = softmax.amax(-1, keepdim=True)
    codes = (softmax / largest * 63).round()
    expected = codes * largest / 63 @ fake_quantize_tokens(value, TOKEN)
    torch.testing.assert_close(QuantAttention(TOKEN, 6)(query, key, value), expected)
    assert int(codes.max()) == 63  # unsigned: no code is spent on what a softmax cannot be


def test_half_precision_keeps_its_type() -> None:
    query, key, value = (x.bfloat16() for x in operands())
    assert fixed()(query, key, value).dtype == torch.bfloat16


@pytest.mark.parametrize("operand", OPERANDS)
def test_the_step_of_each_operand_gets_the_gradient_of_the_rounding_it_makes(operand: str) -> None:
    """The three-case formula, times the gradient that reaches the quantised operand."""
    products = fixed("absolute")
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> None:
        def hook(_: object, arguments: tuple[Tensor], output: Tensor) -> None:
            output.retain_grad()
            seen[name] = (arguments[0].detach(), output)

        products.ranges[name].register_forward_hook(hook)

    keep(operand)
    weights = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    (products(*operands()) * weights).sum().backward()
    inputs, output = seen[operand]
    static = static_of(products, operand)
    spec, step = products.spec(operand), static.step
    low, high = spec.qmin - static.zero_point, spec.qmax - static.zero_point
    code = (inputs / step).round()
    share = torch.where(code < low, low, torch.where(code > high, high, code - inputs / step))
    assert output.grad is not None
    assert step.grad is not None
    assert float(step.grad) != 0
    torch.testing.assert_close(step.grad, (share * output.grad).sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("learn", ["log", "absolute", None])
def test_folding_keeps_the_values_and_saved_tensors_give_them_back(learn: str | None) -> None:
    products = fixed(learn)
    with torch.no_grad():
        for parameter in products.parameters():
            parameter.mul_(1.1)
    before = products(*operands()).detach()
    products.fold()
    products.fold()
    assert not list(products.parameters())
    saved = products.state_dict()
    assert len(saved) == 2 * len(OPERANDS)
    again = QuantAttention.closed(saved, STATIC, 6)
    assert torch.equal(again(*operands()), before)
    assert QuantAttention.closed({}, TOKEN, 6).state_dict() == {}
