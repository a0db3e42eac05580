"""Copies that share storage, and replacing layers inside them."""

from itertools import chain

import pytest
import torch
from torch import nn

from recon.layers.tree import replace, shared_copy


def tree() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))


def test_a_shared_copy_has_its_own_modules_and_the_same_tensors() -> None:
    original = tree()
    copy = shared_copy(original)
    assert copy.get_submodule("1.0") is not original.get_submodule("1.0")
    pairs = zip(
        chain(original.parameters(), original.buffers()),
        chain(copy.parameters(), copy.buffers()),
        strict=True,
    )
    assert all(one is other for one, other in pairs)


def test_replacing_in_the_copy_leaves_the_original_alone() -> None:
    original = tree().eval()
    x = torch.randn(2, 3)
    expected = original(x)
    copy = replace(shared_copy(original), {"1.0": nn.Identity()})
    assert isinstance(copy.get_submodule("1.0"), nn.Identity)
    assert torch.equal(original(x), expected)
    assert not torch.equal(copy(x), expected)


def test_a_name_that_is_not_there_is_refused() -> None:
    with pytest.raises(AttributeError, match="nowhere"):
        replace(tree(), {"1.nowhere": nn.Identity()})
