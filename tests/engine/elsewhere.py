"""An accelerator that is none: its tensors say that they are elsewhere, and do not meet the host's.

Their numbers lie on the CPU. What a GPU refuses is refused: an operation on tensors of both sides
(single numbers and copies apart), the host's generator for numbers of the device, a reduction over
processes of what is the host's. Kernels, memory and time are not shown.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from recon.calibration import ranks

DEVICE = torch.device("xpu", 0)
"""A kind of device that torch can name without having it."""

ACROSS = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_", "aten::set_"}
"""Operations that may see both sides. Indices may be the host's on a GPU too."""


class Elsewhere(Tensor):
    """A tensor of `DEVICE`; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls: type["Elsewhere"], held: Tensor) -> "Elsewhere":
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, layout=held.layout, device=torch.device("meta"),
        )  # fmt: skip
        made.held = held
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return False

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Elsewhere":
        return memo.setdefault(id(self), Elsewhere(self.held.clone()))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # torch's own stub leaves the function out
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name, given = function._schema.name, dict(kwargs or {})
        if name == "aten::_has_compatible_shallow_copy_type":
            return False
        seen = [part for part in tree_flatten((args, given))[0] if isinstance(part, Tensor)]
        here = [p for p in seen if not isinstance(p, Elsewhere) and p.ndim and not p.is_meta]
        if here and name not in ACROSS:
            shapes = [list(part.shape) for part in here]
            raise AssertionError(f"{name} on the device meets tensors of the host: {shapes}")
        to_host = given.get("device") is not None and torch.device(given["device"]).type == "cpu"
        if given.get("device") is not None:
            given["device"] = torch.device("cpu")
        given.pop("pin_memory", None)
        found = function(*tree_map(_held, args), **tree_map(_held, given))
        if to_host:
            return found
        own = {id(part.held): part for part in seen if isinstance(part, Elsewhere)}
        return tree_map(lambda part: own.get(id(part), _elsewhere(part)), found)


def _held(part: Any) -> Any:
    if isinstance(part, Elsewhere):
        return part.held
    # Gradients that nothing reached are made as zeros of the wrapper's own device.
    return torch.zeros(part.shape, dtype=part.dtype) if _is_meta(part) else part


def _is_meta(part: Any) -> bool:
    return isinstance(part, Tensor) and not isinstance(part, Elsewhere) and part.is_meta


def _elsewhere(part: Any) -> Any:
    whole = isinstance(part, Tensor) and not isinstance(part, Elsewhere)
    return Elsewhere(part) if whole else part


class _Sent(torch.autograd.Function):
    """A copy on the device, for gradients too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return Elsewhere(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _held(gradient)


class Moves(TorchFunctionMode):
    """Lets tensors be made on the device and be moved to and from it."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = dict(kwargs or {})
        special = _SPECIAL.get(function)
        if special is not None:
            return special(function, args, given)
        if given.get("device") is not None and torch.device(given["device"]).type == DEVICE.type:
            assert given.get("generator") is None, "The host's generator was given to the device."
            made = function(*map(_held, args), **{**given, "device": "cpu"})
            return _elsewhere(made)
        return function(*args, **given)


def _to(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    tensor, device = args[0], kwargs.get("device")
    rest: list[torch.dtype] = []
    others = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
    for part in args[1:]:
        if isinstance(part, str | torch.device):
            device = part
        elif isinstance(part, Tensor):
            device, rest = part.device, [*rest, part.dtype]
        elif isinstance(part, torch.dtype):
            rest.append(part)
    if device is None:
        return function(tensor, *rest, **others)
    kind = torch.device(device).type
    if kind != DEVICE.type:
        moved = tensor.held if isinstance(tensor, Elsewhere) and kind == "meta" else tensor
        return function(moved, device, *rest, **others)
    changes = rest or "dtype" in others
    if isinstance(tensor, Elsewhere):
        return function(tensor, *rest, **others) if changes or others.get("copy") else tensor
    if tensor.is_meta:
        made = Elsewhere(torch.zeros(tensor.shape, dtype=tensor.dtype))
        return nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made
    return _Sent.apply(function(tensor, *rest, **others) if changes else tensor)


def _where(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if len(args) == 3 and any(isinstance(part, Elsewhere) for part in args):
        dtype = next((p.dtype for p in args[1:] if isinstance(p, Tensor)), torch.float32)
        args = tuple(
            Elsewhere(torch.tensor(part, dtype=dtype)) if isinstance(part, int | float) else part
            for part in args
        )
    return function(*args, **kwargs)


def _tolist(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return _held(args[0]).tolist()


_SPECIAL: dict[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.tolist: _tolist,
    Tensor.pin_memory: lambda function, args, kwargs: args[0],
    torch.where: _where,
    Tensor.where: _where,
}


@contextmanager
def run_elsewhere(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets Lightning run on the device, and checkpoints be written from it."""
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.strategies import SingleDeviceStrategy

    from recon.engine.checkpoint_io import AtomicCheckpointIO

    save = AtomicCheckpointIO.save_checkpoint

    def saved(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        host = tree_map(lambda p: p.held.clone() if isinstance(p, Elsewhere) else p, checkpoint)
        save(self, host, path)

    device = property(lambda self: DEVICE, lambda self, value: None)
    patch.setattr(SingleDeviceStrategy, "root_device", device)
    for name in ("setup", "setup_device"):
        patch.setattr(CPUAccelerator, name, lambda *args, **kwargs: None)
    patch.setattr(AtomicCheckpointIO, "save_checkpoint", saved)
    for name in ("optimizer", "adam"):
        module = import_module(f"torch.optim.{name}")
        patch.setattr(module, "_device_dtype_check_for_fused", lambda *args, **kwargs: None)
    for name in ("total", "maximum"):
        patch.setattr(ranks, name, partial(_reduced, getattr(ranks, name)))
    with Moves():
        yield


def _reduced(reduce: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    # Lightning starts a group whose processes can only meet on their devices.
    assert isinstance(tensor, Elsewhere), f"{list(tensor.shape)} is the host's, and is reduced"
    return reduce(tensor)
