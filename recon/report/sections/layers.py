"""What was quantised, what was left in full precision, and why."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from safetensors import safe_open
from torch import nn

from recon.engine.native import Native
from recon.models.capabilities import ExposesEnds
from recon.quantizers.spec import QuantSpec
from recon.report.run import Missing, Run

Parts = dict[str, list[int]]
"""Shapes of the tensors of an input transform, by their names."""


@dataclass(frozen=True)
class Row:
    """Linears that stand at the same place of their blocks and were treated alike."""

    name: str
    """Inside the block, or with a star for the numbers of a list of modules."""
    count: int
    shape: str
    weights: int
    """Of all of them together."""
    role: str = ""
    weight: str = ""
    activation: str = ""
    transform: str = ""
    reason: str = ""
    """Why they stayed in full precision."""


@dataclass(frozen=True)
class Layers:
    """What the section shows."""

    quantised: list[Row]
    left: list[Row]
    attentions: list[tuple[str, int]]
    """How products of attentions are quantised, and in how many."""
    share: float
    """Of the weights of all linears, those that were quantised."""
    other_tensors: int
    """That are no quantised weight: embeddings, norms, convolutions, biases, other linears."""
    other_values: int


def build(run: Run) -> Layers | Missing:
    """The section of one run."""
    if run.native is None:
        return Missing(
            "Which layers are quantised is written when the run has ended.", run.command("fit")
        )
    native = run.native
    described: dict[str, Any] = native.manifest["layers"]
    roles = layer_roles(native)
    linears = {
        name: (module.out_features, module.in_features)
        for name, module in native.adapter.empty_network().named_modules()
        if isinstance(module, nn.Linear)
    }
    parts = _transform_parts(native)
    blocks = tuple(f"{block}." for block in native.adapter.block_names)
    quantised = [_quantised(native, name, roles.get(name, ""), parts) for name in described]
    adaln = native.manifest["fingerprint"].get("model.adaln")
    left = [
        Row(
            name=_starred(name),
            count=1,
            shape=_shape(*size),
            weights=prod(size),
            role=_words(roles.get(name, "")),
            reason=_reason(name, roles.get(name), adaln, blocks),
        )
        for name, size in linears.items()
        if name not in described and name not in native.manifest["copies"]
    ]
    done, rest = sum(row.weights for row in quantised), sum(row.weights for row in left)
    tensors, values = _others(native)
    return Layers(
        _merged(quantised), _merged(left), _attentions(native), done / (done + rest),
        tensors, values,
    )  # fmt: skip


def layer_roles(native: Native) -> dict[str, str]:
    """Role of every linear inside the blocks, stem and head, by full dotted name."""
    adapter = native.adapter
    roles: dict[str, str] = {
        f"{block}.{name}": group.role
        for block in adapter.block_names
        for group in adapter.input_groups(block)
        for name in group.linears
    }
    if isinstance(adapter, ExposesEnds):
        ends = (*adapter.stem_groups(), *adapter.head_groups())
        roles |= {name: group.role for group in ends for name in group.linears}
    return roles


def inside_block(native: Native, name: str) -> tuple[int, str]:
    """Place of a linear's block among the blocks, and the linear's name inside it.

    Outside the blocks: 0 and the full name.
    """
    for place, block in enumerate(native.adapter.block_names):
        if name.startswith(f"{block}."):
            return place, name.removeprefix(f"{block}.")
    return 0, name


def _quantised(native: Native, name: str, role: str, parts: Mapping[str, Parts]) -> Row:
    facts = native.manifest["layers"][name]
    size = facts["out_features"], facts["in_features"]
    inside = inside_block(native, name)[1]
    spec = facts["activation"]
    return Row(
        name=_starred(name) if inside == name else inside,
        count=1,
        shape=_shape(*size),
        weights=prod(size),
        role=_words(role),
        weight=_grid(QuantSpec(**facts["weight"])),
        activation=_grid(QuantSpec(**spec)) if spec else "full precision",
        transform=_transform(parts.get(facts["transform"], {})),
    )


def _transform_parts(native: Native) -> dict[str, Parts]:
    """Shapes of the tensors of each input transform, by the layer that it is stored under."""
    found: dict[str, Parts] = {}
    with safe_open(native.folder / "quantized.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            owner, between, part = key.partition(".transform.")
            if between:
                found.setdefault(owner, {})[part] = file.get_slice(key).get_shape()
    return found


def _transform(parts: Parts) -> str:
    said = []
    if "channel_scale" in parts or "rotated_scale" in parts:
        said.append("channel scale")
    if "left" in parts:
        said.append(f"rotation {parts['left'][0]} ⊗ {parts['right'][0]}")
    if "static.step" in parts:
        said.append("fixed range")
    return ", ".join(said)


def _grid(spec: QuantSpec) -> str:
    shared = f"group of {spec.group_size}" if spec.strategy == "group" else spec.strategy
    kind = "" if spec.symmetric else ", asymmetric"
    return f"{spec.num_bits} bits per {shared}{kind}"


def _starred(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "∗", name)


def _shape(out: int, in_: int) -> str:
    return f"{out:,} × {in_:,}"


def _words(role: str) -> str:
    return role.replace("_", " ")


def _reason(name: str, role: str | None, adaln: str | None, blocks: tuple[str, ...]) -> str:
    if not name.startswith(blocks):
        return "outside the blocks: only linears of blocks are quantised"
    if role is None:
        return "inside a block, but none of the linears that its adapter offers for quantising"
    if role == "modulation" and adaln == "fp":
        return "model.adaln is fp: scales, shifts and gates keep full precision"
    return "not chosen by the method"


def _merged(rows: Iterable[Row]) -> list[Row]:
    """Equal rows added up, in the order in which they first occur."""
    found: dict[Row, int] = {}
    for row in rows:
        found[row] = found.get(row, 0) + 1
    return [
        Row(**{**vars(row), "count": count, "weights": count * row.weights})
        for row, count in found.items()
    ]


def _attentions(native: Native) -> list[tuple[str, int]]:
    found: dict[str, int] = {}
    for facts in native.manifest["attentions"].values():
        spec = QuantSpec(**facts["activation"])
        text = f"query, key, value {_grid(spec)}; softmax {facts['softmax_bits']} bits"
        found[text] = found.get(text, 0) + 1
    return list(found.items())


def _others(native: Native) -> tuple[int, int]:
    """Number of tensors that are not quantised, and of values in them."""
    with safe_open(native.folder / "network.safetensors", "pt") as file:
        names = list(file.keys())
        return len(names), sum(prod(file.get_slice(name).get_shape()) for name in names)
