"""Building a network of a library's class without memory for its weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _EmptyOnMeta(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty and given.get("device") is None:
            given["device"] = "meta"
        return func(*args, **given)


def skeleton(make: Callable[[], nn.Module]) -> nn.Module:
    """What `make` builds, its weights on the meta device, tables computed on the CPU.

    Layers allocate weights with `torch.empty`, and tables that no file holds (rotary frequencies,
    position indices) in other ways: the former take no memory, the latter are right. Weights that
    a layer makes otherwise (ones of a norm) are small; all are there to be replaced.
    """
    # Initialisers must not move the caller's random state.
    with torch.random.fork_rng(devices=[]), _EmptyOnMeta():
        return make()
