"""The network that turns pictures into features, with layers and tensors of the run in it.

It stands in front of the blocks, so that what is done to it is a stage before there are units. Its
quantised layers are registered beside those of units and its tuned tensors under
`Reconstruction.tuned`, both by their full name in the network: results, checkpoints and evaluated
networks take them from there. Once its stage is closed, every stream starts behind it.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recon.calibration import ranks
from recon.calibration.statistics import UnitRecord, recorded_inputs
from recon.engine.assembly import adopted, linear
from recon.engine.unit import LayerGroup
from recon.errors import CapabilityMissing, ConfigError
from recon.layers.quant_linear import QuantLinear
from recon.layers.tree import replace
from recon.models.adapter import ModelAdapter
from recon.models.capabilities import SeesPictures, missing_attributes
from recon.quantizers.spec import QuantSpec
from recon.types import Sample, State

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction

STAGE = "visual_encoder"
"""Name of the stage, among those of `Reconstruction.preparation`, that this network is open in."""


class VisionNetwork:
    """The vision network of an adapter, at first in full precision.

    Args:
        adapter: Of the teacher.
        device: Where it runs.
        layers: Linears of it that are quantised, by full name.
        tensors: Further tensors of it that stand for the teacher's, by full name; parameters among
            them get gradients.
    """

    def __init__(
        self,
        adapter: SeesPictures,
        device: torch.device,
        layers: Mapping[str, QuantLinear] | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._adapter, self._device = adapter, device
        self._layers, self._tensors = dict(layers or {}), dict(tensors or {})

    @cached_property
    def _network(self) -> nn.Module:
        network = self._adapter.vision_network(self._device)
        layers = {self._inside(name): layer for name, layer in self._layers.items()}
        for name, layer in layers.items():
            bias = linear(network, name).bias
            layer.bias = None if bias is None else bias.detach()
        return replace(network, layers).eval()

    def _inside(self, name: str) -> str:
        return name.removeprefix(f"{self._adapter.vision_name}.")

    def parameters(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """Tensors of the modules of these names in the network, by full name."""
        return {
            f"{self._adapter.vision_name}.{name}.{leaf}": tensor
            for name in names
            for leaf, tensor in self._network.get_submodule(name).named_parameters(recurse=False)
        }

    def groups(self) -> list[LayerGroup]:
        """Its linears by the input they share, in call order; of a network in full precision."""
        prefix = f"{self._adapter.vision_name}."
        return [
            LayerGroup(
                name=prefix + group.linears[0],
                role=group.role,
                linears={prefix + name: linear(self._network, name) for name in group.linears},
            )
            for group in self._adapter.vision_groups()
        ]

    def features(self, sample: Sample) -> Tensor:
        """What the pictures of a sample become, [image tokens, channels]."""
        for name, tensor in self._tensors.items():
            _place(self._network, self._inside(name), tensor)
        return self._adapter.vision_output(self._network, sample)

    def embed(self, sample: Sample) -> State:
        """The state that enters the first block, pictures seen through this network."""
        features = self.features(sample) if has_pictures(self._adapter, sample) else None
        return self._adapter.embed_features(sample, features, self._device)

    def record(self, module: "Reconstruction", groups: list[LayerGroup]) -> UnitRecord:
        """Statistics of the inputs of its linears over the calibration samples with pictures."""
        record = UnitRecord()
        firsts = {group.name: group.linears[group.name] for group in groups}
        for name, layer in firsts.items():
            # A process whose samples are all text takes part in the reductions with zero, which
            # every range holds.
            zero = torch.zeros(1, layer.in_features, device=self._device)
            record.see(name, zero, tokens=module.wants_tokens)
        for index in module.frontier.calibration:
            sample = module.frontier.sample(index)
            if has_pictures(self._adapter, sample):
                with recorded_inputs(firsts, record, with_gram=(), tokens=module.wants_tokens):
                    self.features(sample)
        record.reduce()
        return record


def _place(network: nn.Module, name: str, tensor: Tensor) -> None:
    """Lets a tensor stand for one of the network, in its type; a gradient reaches the tensor."""
    owner, _, leaf = name.rpartition(".")
    holder = network.get_submodule(owner)
    dtype = getattr(holder, leaf).dtype
    delattr(holder, leaf)
    setattr(holder, leaf, tensor.to(dtype))


def has_pictures(adapter: SeesPictures, sample: Sample) -> bool:
    """Whether the vision network takes part in a sample."""
    return bool(adapter.image_tokens(sample).any())


def samples_with_pictures(module: "Reconstruction", adapter: SeesPictures) -> tuple[int, int]:
    """How many calibration and held-out samples have pictures, over all processes."""
    front = module.frontier
    counts = [
        sum(has_pictures(adapter, front.sample(index)) for index in share)
        for share in (front.calibration, front.held_out)
    ]
    learned, judged = ranks.total(torch.tensor(counts, device=front.device)).tolist()
    return learned, judged


def refuse_texts(module: "Reconstruction", adapter: SeesPictures, *, held_out: bool) -> None:
    """Does nothing if there are pictures among the calibration samples of all processes.

    Args:
        module: Whose samples they are.
        adapter: Knows a picture.
        held_out: Whether there must be some among the held-out samples too.

    Raises:
        ConfigError: There are none.
    """
    learned, judged = samples_with_pictures(module, adapter)
    if not learned or (held_out and not judged):
        raise ConfigError(
            f"{learned} calibration and {judged} held-out samples have pictures; the visual "
            "encoder is quantised and tuned on the former, and what tuning brings is judged by the "
            "latter. Add samples with pictures (data.num_samples, data.held_out_samples), or "
            "switch model.quantize_vision and model.veo off."
        )


def sees_pictures(adapter: ModelAdapter, setting: str, remedy: str) -> SeesPictures:
    """The adapter, as one whose pictures can be reached.

    Raises:
        CapabilityMissing: It is none; names the setting that asks for it.
    """
    if not isinstance(adapter, SeesPictures):
        raise CapabilityMissing(
            f"{setting}, but {type(adapter).__name__} does not say which tokens are a picture's "
            f"and what makes them. Implement "
            f"{', '.join(missing_attributes(adapter, SeesPictures))}, or {remedy}."
        )
    return adapter


def full_groups(adapter: SeesPictures) -> list[list[str]]:
    """Full names of the linears of the vision network, by the input they share."""
    return [
        [f"{adapter.vision_name}.{name}" for name in group.linears]
        for group in adapter.vision_groups()
    ]


def adopt(module: "Reconstruction", layers: Mapping[str, Tensor], tuned: dict[str, Tensor]) -> None:
    """Takes up the closed layers and tuned tensors of a checkpoint, if its stage was closed.

    Args:
        module: Its position is restored already.
        layers: Tensors of quantised layers, by full name.
        tuned: Tuned tensors, by full name.
    """
    ahead = [] if module.units else module.preparation()[module.stage_index :]
    if not isinstance(module.adapter, SeesPictures) or any(s.name == STAGE for s in ahead):
        return
    groups = [names for names in full_groups(module.adapter) if f"{names[0]}.codes" in layers]
    made: dict[str, QuantLinear] = {}
    if groups:
        empty = module.adapter.empty_network()
        linears = {name: linear(empty, name) for names in groups for name in names}
        shapes = {name: (m.out_features, m.in_features) for name, m in linears.items()}
        activation: dict[str, QuantSpec | None] = dict.fromkeys(shapes, module.vision_activation)
        weight = dict.fromkeys(shapes, module.weight)
        made = adopted(layers, shapes, groups, weight, activation)
    settle(module, made, tuned)


def settle(
    module: "Reconstruction", layers: Mapping[str, QuantLinear], tuned: Mapping[str, Tensor]
) -> None:
    """Registers the closed layers and the tensors of the vision network; streams now see them."""
    module.tuned.clear()
    for name, tensor in tuned.items():
        kept = tensor.detach().to(module.run_device)
        module.tuned[name.replace(".", "/")] = nn.Parameter(kept, requires_grad=False)
    for name, layer in layers.items():
        module.quantizers[name.replace(".", "/")] = layer
    module.quantizers.to(module.run_device)
    if isinstance(module.adapter, SeesPictures) and (layers or tuned):
        module.vision = VisionNetwork(
            module.adapter, module.run_device, layers, module.tuned_tensors()
        )
