"""Quantised layers in, and out of, the blocks of a network."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from recon.engine.unit import LayerGroup, Unit
from recon.layers.quant_linear import QuantLinear
from recon.layers.transform import InputTransform
from recon.layers.tree import replace, shared_copy
from recon.models.adapter import ModelAdapter
from recon.quantizers.spec import QuantSpec


def layer_groups(
    adapter: ModelAdapter, unit: Unit, blocks: Sequence[nn.Module], *, skip_roles: Iterable[str]
) -> list[LayerGroup]:
    """The linears of `blocks` that are to be quantised, grouped by shared input, in call order."""
    skipped = set(skip_roles)
    return [
        LayerGroup(
            name=f"{block_name}.{group.linears[0]}",
            role=group.role,
            linears={f"{block_name}.{name}": linear(block, name) for name in group.linears},
        )
        for block_name, block in zip(unit.blocks, blocks, strict=True)
        for group in adapter.input_groups(block_name)
        if group.role not in skipped
    ]


def linear(block: nn.Module, name: str) -> nn.Linear:
    """The linear layer of that name inside `block`."""
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear), f"{name} is a {type(module).__name__}"
    return module


def assembled(
    unit: Unit, blocks: Sequence[nn.Module], layers: Mapping[str, QuantLinear]
) -> list[nn.Module]:
    """Copies of the unit's blocks in which `layers` stand for the linears of their names.

    All other weights are shared with `blocks`; biases are taken from the linears replaced.
    """
    students = []
    for block_name, block in zip(unit.blocks, blocks, strict=True):
        prefix = f"{block_name}."
        inside = {n.removeprefix(prefix): q for n, q in layers.items() if n.startswith(prefix)}
        for name, layer in inside.items():
            bias = linear(block, name).bias
            layer.bias = None if bias is None else bias.detach()
        students.append(replace(shared_copy(block), inside).eval())
    return students


def placed_in(
    network: nn.Module, layers: Mapping[str, QuantLinear], copies: Mapping[str, str] | None = None
) -> nn.Module:
    """`network`, each of `layers` in the place of the linear or convolution of its name, in place.

    Args:
        network: A network, or a tree with the names of one; layers take their biases from it.
        layers: By full name.
        copies: Further places, by the name of the layer that is put there as well.
    """
    for name, layer in layers.items():
        replaced = network.get_submodule(name)
        assert isinstance(replaced, nn.Linear | nn.Conv2d), f"{name} is a {type(replaced).__name__}"
        layer.bias = None if replaced.bias is None else replaced.bias.detach()
        if isinstance(replaced, nn.Conv2d):
            layer.kernel = (replaced.kernel_size[0], replaced.kernel_size[1])
    further = {place: layers[name] for place, name in (copies or {}).items() if name in layers}
    return replace(network, {**layers, **further})


def nearest_layers(
    groups: Sequence[LayerGroup], weight: QuantSpec, activation: dict[str, QuantSpec | None]
) -> dict[str, QuantLinear]:
    """Round-to-nearest layers for the same linears, bits and granularity: the yardstick."""
    layers = {}
    for group in groups:
        for name, module in group.linears.items():
            layer = QuantLinear(module, weight, activation[group.name])
            layer.keep_resident(module.weight.dtype)
            layers[name] = layer
    return layers


def adopted(
    saved: Mapping[str, Tensor],
    linears: Mapping[str, tuple[int, int]],
    groups: Sequence[Sequence[str]],
    weight: Mapping[str, QuantSpec],
    activation: Mapping[str, QuantSpec | None],
) -> dict[str, QuantLinear]:
    """Closed layers rebuilt from saved tensors.

    Args:
        saved: Tensors by `<layer>.<tensor>` with the dotted name of the layer, such as
            `transformer_blocks.0.ff.net.2.codes`. Layers that share a transform each name it.
        linears: (out, in_) of the layers to rebuild.
        groups: Names of layers that share their transform.
        weight: Grid of the weight of each layer.
        activation: Grid of the input of each layer.
    """
    layers: dict[str, QuantLinear] = {}
    for names in groups:
        transform: InputTransform | None = None
        for name in names:
            prefix = f"{name}."
            tensors = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
            if transform is None and any(key.startswith("transform.") for key in tensors):
                parts = [tensors.get(f"transform.{part}") for part in InputTransform.PARTS]
                transform = InputTransform.closed(*parts, spec=activation[name])
            out, in_ = linears[name]
            empty = nn.Linear(in_, out, bias=False, device="meta")
            layers[name] = QuantLinear(empty, weight[name], activation[name])
            layers[name].adopt(tensors, transform)
    return layers


def compile_pays(device: torch.device, weights: int, tokens: int, steps: int) -> bool:
    """Whether compiling a unit's step earns back the minute it takes.

    Args:
        device: Where steps run.
        weights: Quantised weights of one unit.
        tokens: Tokens of one step.
        steps: Steps of the whole run.
    """
    if device.type == "cuda":
        return True
    # Forward and backward are about 6 operations a weight and token; 2e13 of them take minutes.
    return 6.0 * weights * tokens * steps > 2e13
