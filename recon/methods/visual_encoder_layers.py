"""The quantised layers of the visual encoder in Q-VLM, while it is searched and while it learns."""

from typing import TYPE_CHECKING

from torch import nn

from recon.calibration.statistics import UnitRecord
from recon.engine.activation_sites import ActivationSites
from recon.engine.searched_layers import searched_layers
from recon.engine.unit import LayerGroup
from recon.layers.quant_linear import QuantLinear
from recon.layers.rounding import OffsetRounding
from recon.layers.static_range import StaticRange
from recon.layers.token_range import TokenRange
from recon.quantizers.spec import QuantSpec

if TYPE_CHECKING:
    from recon.methods.q_vlm import QVLM

SEARCH_STAGE = "visual_encoder_search"


def encoder_activation(spec: QuantSpec | None) -> QuantSpec | None:
    """The bits of all activations, each token on its own range.

    Source: Q-VLM, after Outlier Suppression.
    """
    if spec is None or spec.strategy == "token":
        return spec
    return QuantSpec(
        num_bits=spec.num_bits,
        strategy="token",
        dynamic=True,
        scale_denominator=spec.scale_denominator,
    )


def encoder_sites(method: "QVLM") -> ActivationSites:
    """Ranges per token, of which shares are tried whatever the grid of the language model."""
    return ActivationSites(method.shrinks, percentiles=False, power=method.initial_norm)


def encoder_layers(
    method: "QVLM",
    groups: list[LayerGroup],
    record: UnitRecord,
    sites: ActivationSites,
    *,
    learning: bool = False,
) -> dict[str, QuantLinear]:
    """Layers rounded to nearest, by full name, on the ranges that their search chose.

    Args:
        method: Knows the grids, what was found and what is tuned.
        groups: The encoder's linears.
        record: Of their inputs.
        sites: Takes up the ranges.
        learning: Whether what `veo` names is to learn.
    """
    tuned = method.veo.params if learning else ()
    chosen = method.findings.get(SEARCH_STAGE, {}).get("candidates", {})
    range_bounds, step_bounds = (
        method.learned_change if part in tuned else None for part in ("act_ranges", "weight_scales")
    )
    spec = method.vision_activation
    layers: dict[str, QuantLinear] = {}
    for group in groups:
        made: TokenRange | StaticRange | None = None
        if spec is not None:
            site = sites.add(group, record, spec)
            candidate = chosen.get(group.name, sites.initial([group.name])[0])
            made = site.restart(candidate, range_bounds)
        layers |= searched_layers(
            group,
            method.weight,
            spec,
            made,
            lambda weight, scale: OffsetRounding(
                weight, scale, method.weight, bounds=step_bounds, learn_offset="rounding" in tuned
            ),
        )
    if "weights" in tuned:
        for layer in layers.values():
            assert layer.teacher_weight is not None
            layer.teacher_weight = nn.Parameter(layer.teacher_weight.float().clone())
    return layers
