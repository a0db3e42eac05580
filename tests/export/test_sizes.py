"""What the weights of published layers take on disk."""

import pytest
import torch
from torch import nn

from recon.export import auto_round, compressed_tensors
from recon.layers.quant_linear import QuantLinear
from recon.quantizers.spec import QuantSpec
from tests.export.finished_run import W4, bits


def closed(out: int, in_: int, spec: QuantSpec) -> QuantLinear:
    layer = QuantLinear(nn.Linear(in_, out), spec, None)
    assert layer.rounding is not None
    layer.close(*layer.rounding.close(layer.fold()))
    return layer


@pytest.mark.parametrize("shape", [(4608, 1152), (1920, 1920)], ids=["DiT-XL/2", "CogVideoX-2B"])
@pytest.mark.parametrize("spec", [W4, bits(4, 128), bits(4, 64)], ids=["rows", "128", "64"])
def test_four_bits_alone_take_less_than_0_3_of_bfloat16(
    shape: tuple[int, int], spec: QuantSpec
) -> None:
    layer = closed(*shape, spec)
    scheme = compressed_tensors._Scheme(spec, None)
    full = 2 * shape[0] * shape[1]
    for tensors in (compressed_tensors._tensors(layer, scheme), auto_round._tensors(layer)):
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 0.30 * full


def test_rows_take_less_than_0_26_in_the_native_format() -> None:
    layer = closed(1152, 1152, W4)
    held = sum(tensor.nbytes for tensor in layer.state_dict().values())
    assert held <= 0.26 * 2 * 1152**2


def test_auto_rounds_words_hold_inputs_in_their_order() -> None:
    layer = QuantLinear(nn.Linear(32, 32, bias=False), W4, None)
    integers = (torch.arange(32) % 16 - 8).expand(32, -1)
    layer.close(integers, torch.ones(32, 1))
    held = auto_round._tensors(layer)
    words = [0x76543210, -0x01234568]  # the second is 0xfedcba98
    assert held["qweight"].tolist() == [[word] * 32 for word in words * 2]
    assert held["qzeros"].tolist() == [[0x77777777] * 4]  # 8, less one
    assert held["scales"].dtype == torch.float16
