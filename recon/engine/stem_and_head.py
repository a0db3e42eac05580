"""Stem and head: linears before the first block and behind the last, quantised without training.

They are no unit. A unit is a chain of blocks whose tokens are compared with the teacher's; the stem
makes those tokens, and beside them what conditions every block, out of latents, times and classes.
So each of these linears is settled by itself and closed at once, on what enters it behind those
that are closed already: the stem before the streams start, the head on the student's stream when
the last block is closed. The student's and the round-to-nearest stream start from their own stem
and end in their own head.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from recon.calibration.statistics import UnitRecord, recorded_inputs
from recon.engine.assembly import adopted, nearest_layers, placed_in
from recon.engine.unit import LayerGroup, OpenUnit, Unit
from recon.errors import CapabilityMissing, ConfigError
from recon.layers.patches import as_linear
from recon.layers.quant_linear import QuantLinear
from recon.models.adapter import InputGroup, ModelAdapter
from recon.models.capabilities import ExposesEnds, missing_attributes
from recon.quantizers.affine import check_group_size
from recon.quantizers.spec import QuantSpec
from recon.types import Sample, State

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction


def exposed_ends(adapter: ModelAdapter) -> ExposesEnds:
    """The adapter, as one whose stem and head can be reached.

    Raises:
        CapabilityMissing: It is none.
    """
    if not isinstance(adapter, ExposesEnds):
        raise CapabilityMissing(
            f"model.stem_and_head quantises what stands outside the blocks, which "
            f"{type(adapter).__name__} does not let be reached. Implement "
            f"{', '.join(missing_attributes(adapter, ExposesEnds))}, or set model.stem_and_head: "
            "null."
        )
    return adapter


def check(module: "Reconstruction") -> None:
    """Does nothing if stem and head can be quantised as configured.

    Raises:
        CapabilityMissing: The adapter does not let them be reached.
        ConfigError: The grid is none for a weight, or does not fit one.
    """
    spec = module.outside_weight
    if spec is None:
        return
    exposed_ends(module.adapter)
    if spec.strategy == "token":
        raise ConfigError(
            "model.stem_and_head takes strategy channel or group, as model.weight, got token. It "
            "is the grid of weights; their inputs have that of model.activation."
        )
    for group in ends_groups(module):
        for linear in group.linears.values():
            check_group_size(linear.in_features, spec)


def ends_groups(module: "Reconstruction", network: nn.Module | None = None) -> list[LayerGroup]:
    """The linears of stem and head that are quantised, by input; none where they are left.

    Args:
        module: The method.
        network: Has them; None: one without memory.
    """
    if module.outside_weight is None:
        return []
    adapter = exposed_ends(module.adapter)
    whole = module.adapter.empty_network() if network is None else network
    return _groups(module, whole, (*adapter.stem_groups(), *adapter.head_groups()))


def nearest_ends(module: "Reconstruction", network: nn.Module) -> dict[str, QuantLinear]:
    """Their round-to-nearest layers, the yardstick, from a network that has them."""
    spec, groups = module.outside_weight, ends_groups(module, network)
    if spec is None:
        return {}
    activation = {group.name: module.activation_spec(group.role) for group in groups}
    return nearest_layers(groups, spec, activation)


def copies(module: "Reconstruction") -> Mapping[str, str]:
    """As `ExposesEnds.copies`; none where stem and head are left."""
    return {} if module.outside_weight is None else exposed_ends(module.adapter).copies()


def _groups(
    module: "Reconstruction", network: nn.Module, groups: tuple[InputGroup, ...]
) -> list[LayerGroup]:
    return [
        LayerGroup(
            name=group.linears[0],
            role=group.role,
            linears={name: as_linear(network.get_submodule(name)) for name in group.linears},
        )
        for group in groups
        if group.role not in module.skip_roles
    ]


class StemAndHead:
    """Those of the student and of the network rounded to nearest; implements `Ends`.

    Args:
        module: The method, whose `outside_weight` is set.
    """

    def __init__(self, module: "Reconstruction") -> None:
        self._module, self._adapter = module, exposed_ends(module.adapter)

    @cached_property
    def names(self) -> frozenset[str]:
        """Full names of their linears that are quantised."""
        return frozenset(name for group in ends_groups(self._module) for name in group.linears)

    @torch.no_grad()
    def embed(self, stream: str, sample: Sample) -> State:
        """What enters the first block in the stream `student` or `nearest`."""
        return self._adapter.embed_with(self._parts[stream], sample, self._module.run_device)

    @torch.no_grad()
    def output(self, stream: str, sample: Sample, state: State) -> Tensor:
        """The network's output in that stream, from the state that leaves the last block."""
        device = self._module.run_device
        return self._adapter.output_with(self._parts[stream], sample, state, device)

    def settle_stem(self) -> None:
        """Closes the layers of the stem, unless they are."""
        front = self._module.frontier
        self._settle(self._adapter.stem_groups(), lambda i: self.embed("student", front.sample(i)))

    def settle_head(self) -> None:
        """Closes the layers of the head, behind the last closed block."""
        front = self._module.frontier
        self._settle(
            self._adapter.head_groups(),
            lambda i: self.output("student", front.sample(i), front.state("student", i)),
        )

    def adopt(self, saved: Mapping[str, Tensor]) -> None:
        """Registers those closed layers that a checkpoint has tensors of, by full name."""
        module = self._module
        groups = [g for g in ends_groups(module) if f"{g.name}.codes" in saved]
        linears = {name: linear for group in groups for name, linear in group.linears.items()}
        roles = {name: group.role for group in groups for name in group.linears}
        layers = adopted(
            saved,
            {name: (one.out_features, one.in_features) for name, one in linears.items()},
            [list(group.linears) for group in groups],
            dict.fromkeys(linears, self._spec),
            {name: module.activation_spec(role) for name, role in roles.items()},
        )
        for name, layer in layers.items():
            module.quantizers[name.replace(".", "/")] = layer

    @property
    def _spec(self) -> QuantSpec:
        assert self._module.outside_weight is not None
        return self._module.outside_weight

    @cached_property
    def _parts(self) -> dict[str, nn.Module]:
        """Stem and head of each stream; the student's with the layers that are closed."""
        module = self._module
        student, nearest = (self._adapter.ends(module.run_device) for _ in range(2))
        module.quantizers.to(module.run_device)
        named = {key.replace("/", "."): part for key, part in module.quantizers.items()}
        closed = {
            name: part
            for name, part in named.items()
            if name in self.names and isinstance(part, QuantLinear)
        }
        return {
            "student": placed_in(student, closed),
            "nearest": placed_in(nearest, nearest_ends(module, nearest)),
        }

    def _settle(self, groups: tuple[InputGroup, ...], run: Callable[[int], object]) -> None:
        module, parts = self._module, self._parts["student"]
        for group in _groups(module, self._adapter.ends(module.run_device), groups):
            if group.name.replace(".", "/") in module.quantizers:
                continue
            first = {group.name: parts.get_submodule(group.name)}
            opened = OpenUnit(Unit(group.name, ()), [group], [], UnitRecord())
            for sample in module.frontier.calibration:
                with self._recorded(first, opened.record):
                    run(sample)
            opened.record.reduce()
            layers = module.close_outside(opened)
            for name, layer in layers.items():
                module.quantizers[name.replace(".", "/")] = layer
            module.quantizers.to(module.run_device)
            placed_in(parts, layers)

    def _recorded(
        self, linears: Mapping[str, nn.Module], record: UnitRecord
    ) -> AbstractContextManager[None]:
        tokens = self._module.wants_tokens
        return recorded_inputs(linears, record, with_gram=(), tokens=tokens)
