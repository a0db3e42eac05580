"""The quantised linears of units whose activation ranges are searched."""

from collections.abc import Callable, Mapping

from torch import Tensor

from recon.engine.activation_sites import ActivationSites
from recon.engine.unit import LayerGroup, OpenUnit
from recon.layers.quant_linear import QuantLinear
from recon.layers.rounding import AdaptiveRounding, OffsetRounding, Rounding
from recon.layers.static_range import StaticRange
from recon.layers.token_range import TokenRange
from recon.layers.transform import InputTransform
from recon.quantizers.affine import absmax_scale, weight_range
from recon.quantizers.ranges import mse_clip_ratio
from recon.quantizers.spec import QuantSpec

MakeRounding = Callable[[Tensor, Tensor], Rounding]
"""Of a weight and its step sizes."""


def searched_layers(
    group: LayerGroup,
    weight: QuantSpec,
    activation: QuantSpec | None,
    made: TokenRange | StaticRange | None,
    rounding: MakeRounding,
) -> dict[str, QuantLinear]:
    """Layers for the linears of a group, by full name, weights on steps of least square error.

    Args:
        group: The linears.
        weight: Grid of their weights.
        activation: Grid of their common input; None leaves it unquantised.
        made: Range of that input, shared by the layers; None where it is unquantised.
        rounding: Makes the rounding of each weight.
    """
    token = made if isinstance(made, TokenRange) else None
    fixed = InputTransform(None, static=made) if isinstance(made, StaticRange) else None
    layers = {}
    for name, module in group.linears.items():
        full = module.weight.float()
        scale = absmax_scale(weight_range(full, weight) * mse_clip_ratio(full, weight), weight)
        layers[name] = QuantLinear(
            module,
            weight,
            activation,
            transform=fixed,
            rounding=rounding(full, scale),
            activation_range=token,
        )
    return layers


def nearest(weight: QuantSpec) -> MakeRounding:
    """Rounding to nearest on that grid; nothing learns."""
    return lambda full, scale: OffsetRounding(full, scale, weight)


def round_weights(unit: OpenUnit, rounding: MakeRounding) -> None:
    """Gives each layer of a unit a new rounding, on the step sizes it started from."""
    for layer in unit.layers.values():
        assert isinstance(layer.rounding, OffsetRounding | AdaptiveRounding)
        layer.rounding = rounding(layer.transformed_weight(), layer.rounding.step)
        layer.resident_weight = None


def rest(
    unit: OpenUnit, weight: QuantSpec, sites: ActivationSites, candidates: Mapping[str, int]
) -> None:
    """Lets nothing learn: weights are rounded to nearest, ranges stand on these candidates."""
    round_weights(unit, nearest(weight))
    sites.place(unit, candidates, None)
