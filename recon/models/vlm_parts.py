"""The parts of a vision-language network of transformers, found by role."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from recon.errors import CapabilityMissing
from recon.models.adapter import InputGroup, Role

PARTS: Mapping[str, tuple[str, ...]] = {
    "vision tower": ("vision_tower", "visual", "vision_model"),
    "projector": ("multi_modal_projector", "connector", "visual.merger"),
    "language model": ("language_model", "text_model"),
}
"""Names of a part inside the base model, by what it is for. Source: transformers 5.17 to 5.23,
classes of LLaVA, Qwen2-VL, Qwen2.5-VL, InternVL, Idefics3 and SmolVLM."""

LINEARS: Mapping[Role, tuple[str, ...]] = {
    "attention_input": ("q_proj", "k_proj", "v_proj", "qkv"),
    "attention_output": ("o_proj", "out_proj", "projection_layer", "proj"),
    "feed_forward_up": ("gate_proj", "up_proj", "fc1"),
    "feed_forward_down": ("down_proj", "fc2"),
}
"""Last names of the Linears of a transformer layer, by the input they share, in call order."""

SPELLINGS = (
    (r"^model\.", ""),
    (r"^language_model\.(model\.)?lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "language_model."),
    (r"^vision_tower\.vision_model\.", "vision_tower."),
    (r"^(layers|embed_tokens|norm)\.", r"language_model.\1."),
)
"""Rewritings after which names agree between releases: transformers moved the parts in 4.52 and in
5.0, and save_pretrained still writes the old names."""


def canonical(name: str) -> str:
    """A tensor's name, the same for every release of transformers.

    >>> canonical("language_model.model.layers.0.mlp.up_proj.weight")
    'language_model.layers.0.mlp.up_proj.weight'
    >>> canonical("model.language_model.layers.0.mlp.up_proj.weight")
    'language_model.layers.0.mlp.up_proj.weight'
    """
    for pattern, replacement in SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


@dataclass(frozen=True)
class Parts:
    """Dotted names of the parts in the network."""

    base: str
    """The model without its head; holds all others but the head."""
    vision_tower: str
    projector: str
    """Inside the tower where a family merges patches there."""
    language_model: str
    layers: str
    """The list of decoder layers."""
    head: str
    """From channels to logits."""
    embeddings: str
    """From tokens to channels."""


def find_parts(network: nn.Module) -> Parts:
    """The parts of a network of a `...ForConditionalGeneration` class.

    Raises:
        CapabilityMissing: A part is not there; names what was looked for.
    """
    base = getattr(network, "base_model_prefix", "")
    if not base or not hasattr(network, base):
        raise _missing(network, "base model", (base or "base_model_prefix",), ())
    body = network.get_submodule(base)
    found = {role: f"{base}.{_part(body, role, names)}" for role, names in PARTS.items()}
    language_model = found["language model"]
    return Parts(
        base=base,
        vision_tower=found["vision tower"],
        projector=found["projector"],
        language_model=language_model,
        layers=f"{language_model}.{_longest_list(network.get_submodule(language_model))}",
        head=_name_of(network, "get_output_embeddings"),
        embeddings=_name_of(network, "get_input_embeddings"),
    )


def layer_groups(linears: Iterable[str], prefix: str = "") -> tuple[InputGroup, ...]:
    """Linears of one transformer layer by the input they share, in call order.

    Args:
        linears: Dotted names of all Linears of the layer.
        prefix: Put in front of each name of the result.

    Raises:
        CapabilityMissing: A Linear has no role, or a role no Linear.
    """
    named = list(linears)
    by_leaf = {name.rpartition(".")[2]: name for name in named}
    groups = [
        InputGroup(tuple(prefix + by_leaf[leaf] for leaf in leaves if leaf in by_leaf), role)
        for role, leaves in LINEARS.items()
    ]
    known = {leaf for leaves in LINEARS.values() for leaf in leaves}
    odd = sorted(name for name in named if name.rpartition(".")[2] not in known)
    empty = [group.role for group in groups if not group.linears]
    if odd or empty or len(by_leaf) != len(named):
        raise CapabilityMissing(
            f"A layer holds the Linears {named}; roles are known for {sorted(known)}. Without a "
            f"role: {odd}; roles without a Linear: {empty}. Experts and other layouts need an "
            "input_groups of their own: write it in a subclass."
        )
    return tuple(groups)


def vision_layers(tower: nn.Module) -> str:
    """Dotted name in the tower of its list of transformer layers.

    Raises:
        CapabilityMissing: It has none.
    """
    return _longest_list(tower)


def _part(body: nn.Module, role: str, names: tuple[str, ...]) -> str:
    present = dict(body.named_modules())
    for name in names:
        if name in present:
            return name
    raise _missing(body, role, names, (name for name, _ in body.named_children()))


def _longest_list(body: nn.Module) -> str:
    lists = {
        name: len(module)
        for name, module in body.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1
    }
    if not lists:
        wanted = ("a ModuleList of layers of one class",)
        raise _missing(body, "list of layers", wanted, (name for name, _ in body.named_children()))
    return max(lists, key=lambda name: (lists[name], -len(name)))


def _name_of(network: nn.Module, method: str) -> str:
    module = getattr(network, method)()
    for name, candidate in network.named_modules():
        if candidate is module and module is not None:
            return name
    raise _missing(network, method.removeprefix("get_"), (f"{method}()",), ())


def _missing(
    owner: nn.Module, role: str, wanted: Iterable[str], present: Iterable[str]
) -> CapabilityMissing:
    return CapabilityMissing(
        f"{type(owner).__name__} has no {role}: looked for {', '.join(wanted)}; it holds "
        f"{', '.join(present) or 'nothing of the kind'}. Use the adapter of the model's family, "
        "or add the name to recon.models.vlm_parts."
    )
