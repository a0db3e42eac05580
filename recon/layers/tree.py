"""Finding and replacing layers in a module tree."""

import copy
from collections.abc import Mapping
from itertools import chain

from torch import nn


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy of the module tree whose parameters and buffers are the originals, not copies.

    Layers can then be replaced in the copy while the original stays the teacher, at no memory.
    """
    memo = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    return copy.deepcopy(module, memo)


def replace(module: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """`module`, with each layer named in `layers` (dotted, relative) replaced, in place.

    Raises:
        AttributeError: A name is not in the tree.
    """
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        owner = module.get_submodule(parent)
        owner.get_submodule(child)  # refuses a name that is not there
        setattr(owner, child, layer)
    return module
