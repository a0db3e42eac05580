"""The layers a run will end with, before there is any data: for planning.

A method opens a unit as in a fit, on statistics of unit size and on linears that keep all their
inputs but two rows of outputs: what it puts in front of an input is then there in full, and what it
keeps for each row of a weight is stretched to the rows there are. No weight is read.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recon.calibration.statistics import UnitRecord
from recon.engine.assembly import adopted, layer_groups
from recon.engine.stem_and_head import ends_groups
from recon.engine.unit import LayerGroup, OpenUnit, Unit
from recon.layers.quant_linear import QuantLinear
from recon.quantizers.spec import QuantSpec

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction

ROWS = 2
"""Outputs of a linear in the trial."""


def quantised_groups(module: "Reconstruction", unit: Unit) -> list[LayerGroup]:
    """The linears of a unit that a fit would quantise, on the meta device."""
    blocks: list[nn.Module] = [module.adapter.empty_block(name) for name in unit.blocks]
    return layer_groups(module.adapter, unit, blocks, skip_roles=module.skip_roles)


def opened_layers(module: "Reconstruction", unit: Unit) -> dict[str, QuantLinear]:
    """The layers of a unit while it learns, with all their parameters, without memory.

    Returns:
        Layers by full dotted name, on the meta device.
    """
    groups = quantised_groups(module, unit)
    shapes = {name: linear for group in groups for name, linear in group.linears.items()}
    layers = _trial(module, unit, groups)
    for name, layer in layers.items():
        _stretch(layer, shapes[name])
    return layers


def closed_layers(module: "Reconstruction", units: list[Unit]) -> dict[str, QuantLinear]:
    """The layers that a run leaves, with codes and step sizes of the right shape.

    Blocks with linears of the same names and shapes are opened once. Numbers mean nothing.

    Returns:
        Layers by full dotted name; their codes and step sizes are one number, repeated. Shares of
        a token's range that the run is still to find are NaN.
    """
    templates: dict[object, dict[str, Tensor]] = {}
    closed: dict[str, QuantLinear] = {}
    for unit in units:
        for block in unit.blocks:
            groups = quantised_groups(module, Unit(block, (block,)))
            kind = tuple(
                (group.role, name.removeprefix(block), tuple(linear.weight.shape))
                for group in groups
                for name, linear in group.linears.items()
            )
            if kind not in templates:
                templates[kind] = _saved(module, block, groups)
            closed |= _adopted(module, block, groups, templates[kind], module.weight)
    if module.outside_weight is None:
        return closed
    ends = ends_groups(module)
    return closed | _adopted(module, "", ends, _saved_ends(module, ends), module.outside_weight)


def _trial(
    module: "Reconstruction", unit: Unit, groups: list[LayerGroup]
) -> dict[str, QuantLinear]:
    """Layers as the method opens them, on linears of `ROWS` outputs."""
    with torch.random.fork_rng(devices=[]):  # planning must not move the run's random state
        torch.manual_seed(0)
        return module.foreseen_layers(_thin_unit(module, unit, groups))


def _thin_unit(module: "Reconstruction", unit: Unit, groups: list[LayerGroup]) -> OpenUnit:
    thin = [
        LayerGroup(group.name, group.role, {n: _thin(m) for n, m in group.linears.items()})
        for group in groups
    ]
    return OpenUnit(unit, thin, [], _record(module, thin))


def _thin(linear: nn.Linear) -> nn.Linear:
    made = nn.Linear(linear.in_features, ROWS, bias=linear.bias is not None)
    return made.requires_grad_(False)


def _record(module: "Reconstruction", groups: list[LayerGroup]) -> UnitRecord:
    """Statistics of inputs of size one."""
    record = UnitRecord()
    widths = {group.name: next(iter(group.linears.values())).in_features for group in groups}
    for name, width in widths.items():
        # The tokens of two samples, and a row for each.
        for sample in range(2):
            row = (sample, 2) if module.wants_rows else None
            record.see(name, torch.randn(4, width), row=row, tokens=module.wants_tokens)
    record.gram = _Identities(widths) if module.wants_gram else {}
    return record


class _Identities(dict[str, Tensor]):
    """Gram matrices of uncorrelated inputs, made when asked for: they may take a gigabyte."""

    def __init__(self, widths: dict[str, int]) -> None:
        super().__init__()
        self._widths = widths

    def __missing__(self, name: str) -> Tensor:
        return torch.eye(self._widths[name], dtype=torch.float64)


def _stretch(layer: QuantLinear, linear: nn.Linear) -> None:
    """Gives the layer the shape of `linear` and puts it on the meta device."""
    rows = linear.out_features
    layer.out_features = rows
    assert layer.rounding is not None
    for part in layer.rounding.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.ndim and parameter.shape[0] == ROWS:
                made = parameter.new_empty(rows, *parameter.shape[1:], device="meta")
                part._parameters[name] = nn.Parameter(made)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.ndim and buffer.shape[0] == ROWS:
                part._buffers[name] = buffer.new_empty(rows, *buffer.shape[1:], device="meta")
    layer.to("meta")
    layer.teacher_weight = torch.empty_like(linear.weight, requires_grad=False)
    layer.bias = None if linear.bias is None else torch.empty_like(linear.bias)


@torch.no_grad()
def _saved(module: "Reconstruction", block: str, groups: list[LayerGroup]) -> dict[str, Tensor]:
    """State of a block's closed layers, `ROWS` outputs each, by name within the block."""
    layers = _trial(module, Unit(block, (block,)), groups)
    for layer in layers.values():
        learned = _learns_share(layer)
        layer.close_as_rounded()
        clip = layer.activation_clip
        if clip is not None and (learned or bool((clip != 1).any())):
            clip.fill_(torch.nan)
    return {
        f"{name.removeprefix(block)}.{key}": tensor
        for name, layer in layers.items()
        for key, tensor in layer.state_dict().items()
    }


def _learns_share(layer: QuantLinear) -> bool:
    """Whether training moves the share of a token's range that is kept."""
    found = layer.activation_range
    return layer.activation_clip_logits is not None or (
        found is not None and found.log_factor is not None
    )


@torch.no_grad()
def _saved_ends(module: "Reconstruction", groups: list[LayerGroup]) -> dict[str, Tensor]:
    """The same of stem and head, by full name."""
    saved: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for group in groups:
            unit = _thin_unit(module, Unit(group.name, ()), [group])
            for name, layer in module.close_outside(unit).items():
                saved |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
    return saved


def _adopted(
    module: "Reconstruction",
    block: str,
    groups: list[LayerGroup],
    template: dict[str, Tensor],
    weight: QuantSpec,
) -> dict[str, QuantLinear]:
    shapes = {
        name: (linear.out_features, linear.in_features)
        for group in groups
        for name, linear in group.linears.items()
    }
    saved: dict[str, Tensor] = {}
    for key, tensor in template.items():
        name = f"{block}{key}"
        layer, _, part = name.rpartition(".")
        if part in ("codes", "scale", "zero_point") and layer in shapes and tensor.shape[0] == ROWS:
            saved[name] = tensor.new_ones(1, 1).expand(shapes[layer][0], tensor.shape[1])
        else:
            saved[name] = tensor.detach()  # an object of its own: it counts in every block
    return adopted(
        saved,
        shapes,
        [list(group.linears) for group in groups],
        dict.fromkeys(shapes, weight),
        {n: module.activation_spec(group.role) for group in groups for n in group.linears},
    )
