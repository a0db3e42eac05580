"""Which parameters of a network a method quantises, and which it leaves: for planning."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from recon.engine.foresight import quantised_groups
from recon.engine.stem_and_head import copies, ends_groups
from recon.engine.unit import LayerGroup, Unit
from recon.quantizers.spec import QuantSpec

if TYPE_CHECKING:
    from recon.engine.reconstruction import Reconstruction


@dataclass(frozen=True)
class Quantised:
    """Linears of one role."""

    role: str
    linears: int
    parameters: int
    """Of their weights."""
    weight: str
    """Bits, and what shares a step size."""
    activation: str
    """The same of their inputs."""


@dataclass(frozen=True)
class Left:
    """Linears, or other tensors, that stay in full precision."""

    part: str
    linears: int
    parameters: int
    why: str


def quantised_rows(module: "Reconstruction", units: list[Unit]) -> list[Quantised]:
    """What becomes codes, by role: in the blocks, then outside of them."""
    inside = (group for unit in units for group in quantised_groups(module, unit))
    rows = _rows(module, inside, module.weight)
    if module.outside_weight is not None:
        rows += _rows(module, ends_groups(module), module.outside_weight)
    return rows


def _rows(
    module: "Reconstruction", groups: Iterable[LayerGroup], weight: QuantSpec
) -> list[Quantised]:
    linears: defaultdict[str, list[nn.Linear]] = defaultdict(list)
    for group in groups:
        linears[group.role] += group.linears.values()
    return [
        Quantised(
            role=role,
            linears=len(found),
            parameters=sum(linear.weight.numel() for linear in found),
            weight=_words(weight),
            activation=_words(module.activation_spec(role)),
        )
        for role, found in linears.items()
    ]


def _words(spec: QuantSpec | None) -> str:
    """A grid in words.

    >>> _words(QuantSpec(4, "group", 128)), _words(None)
    ('4 per group of 128', '16')
    """
    if spec is None:
        return "16"
    shared = f"group of {spec.group_size}" if spec.strategy == "group" else spec.strategy
    return f"{spec.num_bits} per {shared}"


def left_rows(module: "Reconstruction", quantised: set[str]) -> list[Left]:
    """Linears that stay, by part of the network, and all other parameters as one."""
    adapter = module.adapter
    reasons = {
        f"{block}.{name}": f"role {group.role} is left out (model.adaln: {module.adaln})"
        for block in adapter.block_names
        for group in adapter.input_groups(block)
        if group.role in module.skip_roles
        for name in group.linears
    }
    reasons |= {
        name: f"quantised and kept once, as {first}" for name, first in copies(module).items()
    }
    stems = tuple(f"{block}." for block in adapter.block_names)
    network = adapter.empty_network()
    parts: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for name, part in network.named_modules():
        if isinstance(part, nn.Linear) and name not in quantised:
            inside = name.startswith(stems)
            why = "in the blocks, but no input group's" if inside else "outside the blocks"
            parts[_part(name), reasons.get(name, why)].append(part.weight.numel())
    rows = [Left(part, len(sizes), sum(sizes), why) for (part, why), sizes in parts.items()]
    weights = sum(part.weight.numel() for part in network.modules() if isinstance(part, nn.Linear))
    rest = sum(p.numel() for p in network.parameters()) - weights
    named = network.named_modules()
    rest -= sum(p.weight.numel() for n, p in named if isinstance(p, nn.Conv2d) and n in quantised)
    return [*rows, Left("biases, norms, tables, convolutions", 0, rest, "no Linear's weight")]


def _part(name: str) -> str:
    """The name of a list of layers and what stands in each, or the name itself.

    >>> _part("transformer_blocks.3.norm1.emb.linear_1"), _part("proj_out_1")
    ('transformer_blocks.*.norm1.emb', 'proj_out_1')
    """
    whole = re.sub(r"\.\d+\.", ".*.", name)
    head, _, leaf = whole.rpartition(".")
    return head if "*" in head and leaf else whole
