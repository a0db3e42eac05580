import pytest
import torch
from torch import nn

from recon.errors import ConfigError
from recon.layers.quant_linear import QuantLinear
from recon.layers.static_range import StaticRange
from recon.layers.transform import InputTransform
from recon.quantizers.affine import fake_quantize_static, static_grid
from recon.quantizers.ranges import static_range_errors
from recon.quantizers.spec import QuantSpec

ASYMMETRIC = QuantSpec(num_bits=4, strategy="tensor", symmetric=False)
SYMMETRIC = QuantSpec(num_bits=4, strategy="tensor")


def test_the_grid_of_an_asymmetric_range_holds_zero_and_both_ends() -> None:
    step, zero_point = static_grid(-0.5, 2.5, ASYMMETRIC)
    assert step == pytest.approx(0.2)
    assert zero_point == 2
    x = torch.tensor([-3.0, -0.5, -0.4, 0.0, 0.09, 0.11, 2.5, 9.0])
    found = fake_quantize_static(x, torch.tensor(step), torch.tensor(zero_point), ASYMMETRIC)
    expected = torch.tensor([-0.4, -0.4, -0.4, 0.0, 0.0, 0.2, 2.4, 2.6])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert static_grid(0.0, 0.0, ASYMMETRIC) == static_grid(0.0, 0.0, SYMMETRIC) == (1.0, 0.0)
    assert static_grid(0.5, 3.0, ASYMMETRIC)[1] == 0  # zero is always inside


def test_the_gradient_of_the_step_is_the_three_case_formula() -> None:
    step, zero_point = torch.tensor(0.2, requires_grad=True), torch.tensor(2.0)
    for value, expected in ((0.25, 1 - 1.25), (-9.0, 0 - 2), (9.0, 15 - 2)):
        x = torch.tensor([value], requires_grad=True)
        fake_quantize_static(x, step, zero_point, ASYMMETRIC).sum().backward()
        assert step.grad is not None
        assert x.grad is not None
        assert float(step.grad) == pytest.approx(expected, abs=1e-5)
        assert float(x.grad) == (1.0 if value == 0.25 else 0.0)
        step.grad = None


@pytest.mark.parametrize("learn", ["log", "absolute", None])
def test_folding_keeps_the_values_and_leaves_no_parameter(learn: str | None) -> None:
    made = StaticRange(-1.0, 2.0, ASYMMETRIC, learn)  # type: ignore[arg-type]
    assert len(list(made.parameters())) == (0 if learn is None else 1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.01)
    x = torch.linspace(-2, 3, 50)
    before = made(x).detach()
    made.fold()
    made.fold()
    assert torch.equal(made(x), before)
    assert not list(made.parameters())
    again = StaticRange.closed(made.step, made.zero_point, ASYMMETRIC)
    assert torch.equal(again(x), before)


def test_linears_that_share_an_input_quantise_it_once_on_the_grid_of_the_transform() -> None:
    static = StaticRange(-1.0, 1.0, SYMMETRIC, "log")
    transform = InputTransform(torch.full((8,), 2.0), learn_scale=False, static=static)
    weight = QuantSpec(num_bits=8)
    pair = [QuantLinear(nn.Linear(8, 3), weight, SYMMETRIC, transform=transform) for _ in range(2)]
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    transform.begin(None)
    found = [layer(x) for layer in pair]
    quantized = transform._seen
    assert quantized is not None
    torch.testing.assert_close(quantized[1], static(2 * x))
    assert found[0].shape == (5, 3)
    for layer in pair:
        layer.fold()
    assert transform.part("static.step") is static.step
    assert transform.part("left") is None


def test_without_a_transform_the_range_is_that_of_the_call() -> None:
    layer = QuantLinear(nn.Linear(8, 3, bias=False), QuantSpec(num_bits=8), ASYMMETRIC)
    x = torch.rand(5, 8, generator=torch.Generator().manual_seed(0)) + 1
    step, zero_point = static_grid(0.0, float(x.max()), ASYMMETRIC)
    on_grid = fake_quantize_static(x, torch.tensor(step), torch.tensor(zero_point), ASYMMETRIC)
    torch.testing.assert_close(layer(x), on_grid @ layer.quantized_weight().T)


def test_the_range_search_finds_the_least_error_and_its_parts_add_up() -> None:
    tokens = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    tokens[0] = 30.0
    ratios, errors = static_range_errors(tokens, float(tokens.min()), 30.0, ASYMMETRIC)
    assert float(ratios[0]) == 1
    best = int(errors.argmin())
    assert best > 0
    assert errors[best] < errors[0]
    halves = [static_range_errors(t, float(tokens.min()), 30.0, ASYMMETRIC)[1] for t in
              tokens.chunk(2)]  # fmt: skip
    torch.testing.assert_close(halves[0] + halves[1], errors)


def test_ranges_of_tokens_have_no_zero_point() -> None:
    with pytest.raises(ConfigError, match="strategy token has no zero-point"):
        QuantSpec(strategy="token", dynamic=True, symmetric=False)


def test_errors_stay_where_the_tokens_are() -> None:
    ratios, errors = static_range_errors(torch.empty(3, 4, device="meta"), -1.0, 1.0, ASYMMETRIC)
    assert (ratios.device.type, errors.device.type) == ("cpu", "meta")
