"""What must agree for two artefacts to belong to the same run."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from recon.errors import CheckpointMismatch

NEUTRAL = frozenset({"memory", "adapter", "compile"})
"""Arguments that do not change results: where streams live; the adapter has its own identity;
`compile` would name a method of the module, and is added by the caller."""


def settings(method: object) -> dict[str, Any]:
    """Every constructor argument of a method as plain values, `weight.num_bits` style keys.

    Relies on the rule that a method keeps each argument under its own name.
    """
    found: dict[str, Any] = {}
    for owner in reversed(type(method).__mro__):
        if "__init__" not in vars(owner) or owner.__module__.startswith(("lightning", "torch")):
            continue
        for name in inspect.signature(owner).parameters:
            if name not in NEUTRAL and hasattr(method, name):
                found |= _flat(name, getattr(method, name))
    return found


def _flat(name: str, value: Any) -> dict[str, Any]:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        items = (_flat(f"{name}.{key}", inner) for key, inner in value.items())
        return {key: inner for item in items for key, inner in item.items()}
    return {name: list(value) if isinstance(value, tuple) else value}


def refuse_difference(saved: Mapping[str, Any], present: Mapping[str, Any], what: str) -> None:
    """Does nothing if the two fingerprints agree.

    Raises:
        CheckpointMismatch: They differ; names every differing field with both values.
    """
    fields = sorted(set(saved) | set(present))
    rows = [
        f"  {field}: saved {saved.get(field)!r}, now {present.get(field)!r}"
        for field in fields
        if saved.get(field) != present.get(field)
    ]
    if rows:
        raise CheckpointMismatch(
            f"{what} belongs to another configuration:\n" + "\n".join(rows) + "\nContinue with the "
            "config.yaml saved in its run folder, or start a new one with "
            "--trainer.default_root_dir."
        )
