"""A quantised layer against the linear it stands for: open, folded, closed, taken up again."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from recon.errors import CapabilityMissing
from recon.layers.patches import as_linear
from recon.layers.quant_linear import QuantLinear
from recon.layers.rounding import AdaptiveRounding, NearestRounding
from recon.layers.transform import InputTransform, begin_all
from recon.quantizers.affine import absmax_scale, codes, weight_range
from recon.quantizers.packing import unpack
from recon.quantizers.spec import QuantSpec
from recon.quantizers.transforms import KroneckerTransform

WEIGHT = QuantSpec(num_bits=4, strategy="channel")
TOKEN = QuantSpec(num_bits=6, strategy="token", dynamic=True)
WIDTH, OUT = 24, 10


class Unrounded(NearestRounding):
    """The weight as it is: a layer with its quantiser off."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear(seed: int = 0, bias: bool = True) -> nn.Linear:
    made = nn.Linear(WIDTH, OUT, bias=bias)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator(seed)))
    return made.requires_grad_(False)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=generator(99))


def transform(seed: int = 1) -> InputTransform:
    scale = torch.rand(WIDTH, generator=generator(seed)) + 0.5
    kronecker = KroneckerTransform(WIDTH, start="haar", generator=generator(seed))
    made = InputTransform(scale, kronecker)
    with torch.no_grad():  # away from the start, where sigma is 1
        for parameter in kronecker.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(seed + 1)))
    return made


def trained(layer: QuantLinear) -> QuantLinear:
    """The layer with every parameter off its start."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(7)))
    return layer


def layer_of(module: nn.Linear, shared: InputTransform | None, learned: bool) -> QuantLinear:
    rounding = NearestRounding(OUT, WEIGHT, learn_clip=learned)
    return QuantLinear(
        module, WEIGHT, TOKEN, transform=shared, rounding=rounding, learn_activation_clip=learned
    )


TRANSFORMS: dict[str, Callable[[], InputTransform | None]] = {
    "none": lambda: None,
    "scale": lambda: InputTransform(torch.rand(WIDTH, generator=generator(3)) + 0.5),
    "scale and rotation": transform,
    "rotation": lambda: InputTransform(
        None, KroneckerTransform(WIDTH, start="haar", generator=generator(4))
    ),
    "rotation and scale": lambda: InputTransform(
        None,
        KroneckerTransform(WIDTH, start="haar", generator=generator(5)),
        rotated_scale=torch.rand(WIDTH, generator=generator(6)) + 0.5,
    ),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_with_quantisers_off_it_is_the_linear_open_and_folded(kind: str, bias: bool) -> None:
    module, x = linear(bias=bias), inputs(2, 5)
    shared = TRANSFORMS[kind]()
    rounding = Unrounded(OUT, WEIGHT, learn_clip=False)
    layer = QuantLinear(module, WEIGHT, None, transform=shared, rounding=rounding)
    torch.testing.assert_close(layer(x), module(x), rtol=1e-5, atol=1e-5)
    folded = layer.fold()
    hidden = x if shared is None else shared(x)
    torch.testing.assert_close(
        functional.linear(hidden, folded, module.bias), module(x), rtol=1e-5, atol=1e-5
    )


def test_linears_that_share_an_input_share_one_transform_open_and_folded() -> None:
    shared, x = transform(), inputs(3)
    modules = [linear(seed) for seed in range(3)]
    layers = [
        QuantLinear(
            m, WEIGHT, None, transform=shared, rounding=Unrounded(OUT, WEIGHT, learn_clip=False)
        )
        for m in modules
    ]
    for layer, module in zip(layers, modules, strict=True):
        torch.testing.assert_close(layer(x), module(x), rtol=1e-5, atol=1e-5)
    assert len({id(layer.transform) for layer in layers}) == 1
    weights = [layer.fold() for layer in layers]  # folding a shared transform twice changes nothing
    for weight, module in zip(weights, modules, strict=True):
        result = functional.linear(shared(x), weight, module.bias)
        torch.testing.assert_close(result, module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [WEIGHT, QuantSpec(num_bits=3, strategy="group", group_size=8)])
def test_a_closed_layer_is_codes_times_scale_bit_for_bit(spec: QuantSpec) -> None:
    module = linear()
    layer = QuantLinear(module, spec, None)
    weight = layer.fold()
    assert layer.rounding is not None
    found, scale = layer.rounding.close(weight)
    open_weight = layer.quantized_weight()
    layer.close(found, scale)
    assert layer.closed
    assert layer.codes is not None
    assert layer.codes.dtype == torch.int32
    held = unpack(layer.codes, spec.num_bits, WIDTH).float()
    assert torch.equal(held, found.float())
    width = spec.group_size or WIDTH
    product = (held.unflatten(1, (-1, width)) * scale.unsqueeze(-1)).flatten(1)
    assert torch.equal(layer.quantized_weight(), product)
    assert torch.equal(layer.quantized_weight(), open_weight)
    assert torch.equal(layer(inputs(4)), functional.linear(inputs(4), product, module.bias))


def test_a_closed_layer_keeps_nothing_of_the_full_precision_weight() -> None:
    layer = trained(layer_of(linear(), transform(), learned=True))
    weight = layer.fold()
    assert layer.rounding is not None
    layer.close(*layer.rounding.close(weight))
    assert layer.teacher_weight is None
    assert not list(layer.parameters())
    names = {"codes", "scale", "activation_clip"}
    names |= {f"transform.{part}" for part in ("channel_scale", "left", "right")}
    assert set(layer.state_dict()) == names


def test_folding_keeps_the_outputs_of_the_open_layer() -> None:
    layer = trained(layer_of(linear(), transform(), learned=True))
    x = inputs(6)
    before = layer(x)
    weight = layer.fold()
    assert layer.rounding is not None
    layer.close(*layer.rounding.close(weight))
    # A value may fall on the other side of a rounding boundary: few do.
    assert ((layer(x) - before).abs() > 1e-4).float().mean() < 0.05


@pytest.mark.parametrize("learned", [True, False])
def test_a_layer_adopted_from_saved_tensors_equals_the_one_that_was_saved(learned: bool) -> None:
    shared = transform() if learned else None
    layer = trained(layer_of(linear(), shared, learned))
    weight = layer.fold()
    assert layer.rounding is not None
    layer.close(*layer.rounding.close(weight))
    saved = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    parts = [saved.get(f"transform.{part}") for part in InputTransform.PARTS]
    other = QuantLinear(nn.Linear(WIDTH, OUT, bias=False, device="meta"), WEIGHT, TOKEN)
    other.adopt(saved, InputTransform.closed(*parts) if learned else None)
    other.bias = layer.bias
    assert torch.equal(other(inputs(2, 3)), layer(inputs(2, 3)))
    assert other.state_dict().keys() == saved.keys()
    assert all(torch.equal(other.state_dict()[name], saved[name]) for name in saved)


def test_a_resident_weight_changes_no_bit() -> None:
    layer = layer_of(linear(), None, learned=False)
    weight = layer.fold()
    assert layer.rounding is not None
    layer.close(*layer.rounding.close(weight))
    expected = layer(inputs(3))
    layer.keep_resident(torch.float32)
    assert torch.equal(layer(inputs(3)), expected)
    assert "resident_weight" not in layer.state_dict()


def test_factors_computed_once_give_the_gradients_of_factors_computed_each_time() -> None:
    gradients = []
    for cached in (False, True):
        shared = transform()
        layers = [layer_of(linear(seed), shared, learned=True) for seed in range(3)]
        parameters = list(nn.ModuleList(layers).parameters())
        if cached:
            begin_all([shared])
        loss = torch.stack([layer(inputs(4)).square().mean() for layer in layers]).sum()
        if cached:
            shared.end()
        gradients.append(torch.autograd.grad(loss, parameters))
    for once, each in zip(*gradients, strict=True):
        torch.testing.assert_close(once, each, rtol=1e-4, atol=1e-4)  # other order of sums


def test_after_the_end_of_a_step_changed_parameters_count() -> None:
    shared, x = transform(), inputs(2)
    begin_all([shared])
    before = shared(x)
    shared.end()
    with torch.no_grad():
        for parameter in shared.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(shared(x), before)


def test_learned_clips_work_per_group_too() -> None:
    spec = QuantSpec(num_bits=4, strategy="group", group_size=8)
    rounding = NearestRounding(OUT, spec, learn_clip=True)
    weight = linear().weight
    scale = rounding.scale(weight)
    assert scale.shape == (OUT, WIDTH // 8)
    kept = torch.tensor(4.0).sigmoid()
    torch.testing.assert_close(scale, absmax_scale(kept * weight_range(weight, spec), spec))
    assert rounding(weight).shape == weight.shape


def test_adaptive_rounding_starts_at_the_weight_and_ends_on_the_grid() -> None:
    weight = linear().weight
    scale = absmax_scale(weight_range(weight, WEIGHT), WEIGHT)
    rounding = AdaptiveRounding(weight, scale, WEIGHT)
    torch.testing.assert_close(rounding(weight), weight, rtol=1e-4, atol=1e-4)
    found, same_scale = rounding.close(weight)
    assert torch.equal(same_scale, scale)
    assert (found - codes(weight, scale, WEIGHT)).abs().max() <= 1


# In the place of a convolution


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_convolution_over_patches_is_a_linear_on_each_of_them(bias: bool) -> None:
    convolution = nn.Conv2d(3, OUT, kernel_size=(2, 4), stride=(2, 4), bias=bias)
    layer = QuantLinear(as_linear(convolution), QuantSpec(num_bits=8), None)
    layer.kernel = (2, 4)
    images = torch.randn(2, 3, 6, 8, generator=generator(3))
    weight = layer.quantized_weight().reshape(convolution.weight.shape)
    expected = functional.conv2d(images, weight, convolution.bias, stride=(2, 4))
    torch.testing.assert_close(layer(images), expected)
    # Each patch has a range of its own: a bright one does not touch the others.
    layer.activation_spec = QuantSpec(num_bits=2, strategy="token", dynamic=True)
    before = layer(images)
    images[:, :, :2, :4] *= 100
    changed = (layer(images) - before).abs().amax(dim=(0, 1)) > 0
    assert changed.tolist() == [[True, False], [False, False], [False, False]]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(3, 4, 3, stride=2), "kernel and stride must be equal"),
        (nn.Conv2d(3, 4, 2, stride=2, padding=1), "without padding"),
        (nn.Conv2d(4, 4, 2, stride=2, groups=2), "or groups"),
        (nn.LayerNorm(4), "A LayerNorm cannot be quantised as a Linear"),
    ],
    ids=["overlapping", "padded", "grouped", "no linear"],
)
def test_what_is_no_linear_over_patches_is_refused(module: nn.Module, reason: str) -> None:
    with pytest.raises(CapabilityMissing, match=reason):
        as_linear(module)
