"""What the teacher and its quantised forms make of the same batch: videos, images or answers."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from recon.engine import attention
from recon.engine.assembly import layer_groups, linear, nearest_layers, placed_in
from recon.engine.baselines import Baselines
from recon.engine.data import CalibrationData
from recon.engine.forms import carry, crowded
from recon.engine.stem_and_head import copies, nearest_ends
from recon.engine.unit import LayerGroup, Unit
from recon.engine.vision import full_groups
from recon.layers.quant_attention import QuantAttention
from recon.layers.quant_linear import QuantLinear
from recon.models.capabilities import SeesPictures

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction

Form = Literal["full_precision", "round_to_nearest", "quantized"]


@torch.no_grad()
def sample(
    module: "Reconstruction", batch: dict[str, Any], forms: Iterable[Form]
) -> dict[str, Any]:
    """Outputs of each form for the batch.

    Returns:
        The batch, and under every form's name what `CalibrationData.outputs` makes with it.
    """
    data: CalibrationData = module.trainer.datamodule  # type: ignore[attr-defined]
    device = module.trainer.strategy.root_device
    kept = _baselines(module, data, device)
    result: dict[str, Any] = dict(batch)
    for form in forms:
        around = pipeline(module, form, device)
        make = partial(data.outputs, around, batch)
        learned = form == "quantized"
        result[form] = make() if kept is None or learned else kept.get(around.network, batch, make)
    return result


def _baselines(
    module: "Reconstruction", data: CalibrationData, device: torch.device
) -> Baselines | None:
    if data.baselines is None:
        return None
    settings = {**data.sampling_settings(), "dtype": str(module.adapter.compute_dtype(device))}
    settings["device"] = device.type
    return Baselines(Path(data.baselines).expanduser(), module.adapter, settings)


def pipeline(module: "Reconstruction", form: Form, device: torch.device) -> Any:
    """The family's pipeline around one form of the network; made once, kept by the module.

    Where the forms would crowd an accelerator, the network of every other form waits in host memory
    from then on, until it is asked for: use one before the next is asked for, the quantised last,
    whose layers are the module's own.
    """
    if module.forms_apart is None:
        module.forms_apart = crowded(module.adapter, device)
    if module.forms_apart:
        for other in module.pipelines.keys() - {form}:
            carry(module.pipelines[other].network, "cpu")
    if form not in module.pipelines:
        whole = network(module, form, device)
        module.pipelines[form] = module.adapter.pipeline(device, whole)
    elif module.forms_apart:
        carry(module.pipelines[form].network, device)
    return module.pipelines[form]


def network(module: "Reconstruction", form: Form, device: torch.device) -> nn.Module:
    """The whole network of the public class, in one of its forms, on `device`."""
    whole = module.adapter.network(device)
    if form == "full_precision":
        return whole
    if form == "quantized" and module.vision is not None:
        _, unknown = whole.load_state_dict(module.tuned_tensors(), strict=False)
        assert not unknown, unknown
    attention.put_in(module.adapter, whole, _products(module, form))
    dtype = module.adapter.compute_dtype(device)
    # Part by part: what is replaced makes room for what the next part keeps.
    for layers in _nearest(module, whole) if form == "round_to_nearest" else _closed(module):
        for layer in layers.values():
            layer.to(device)
            layer.keep_resident(dtype)
            layer.teacher_weight = None
        placed_in(whole, layers, copies(module))
    return whole.eval()


def _closed(module: "Reconstruction") -> Iterator[Mapping[str, QuantLinear]]:
    """The closed layers, one by one."""
    for name, layer in module.quantizers.items():
        if isinstance(layer, QuantLinear) and layer.closed:
            yield {name.replace("/", "."): layer}


def _products(module: "Reconstruction", form: Form) -> dict[str, QuantAttention]:
    if form == "round_to_nearest":
        return attention.nearest_attentions(module, module.adapter.block_names)
    closed = module.units[: module.index]
    found = {n: part for unit in closed for n, part in module.attentions_of(unit).items()}
    return {name: part.to(module.run_device) for name, part in found.items()}


def _nearest(module: "Reconstruction", whole: nn.Module) -> Iterator[Mapping[str, QuantLinear]]:
    """Round-to-nearest layers, block by block and then what else is quantised."""
    for name in module.adapter.block_names:
        unit, blocks = Unit(name, (name,)), [whole.get_submodule(name)]
        groups = layer_groups(module.adapter, unit, blocks, skip_roles=module.skip_roles)
        activation = {group.name: module.activation_spec(group.role) for group in groups}
        yield nearest_layers(groups, module.weight, activation)
    yield nearest_ends(module, whole)
    if module.quantize_vision and isinstance(module.adapter, SeesPictures):
        for names in full_groups(module.adapter):
            linears = {name: linear(whole, name) for name in names}
            group = LayerGroup(names[0], "vision", linears)
            activation = {group.name: module.vision_activation}
            yield nearest_layers([group], module.weight, activation)
