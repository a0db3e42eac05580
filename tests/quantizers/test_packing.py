import pytest
import torch

from recon.errors import ConfigError, NumericsError
from recon.quantizers.packing import pack, unpack
from tests.reference.quantizer import pack_by_bits


def random_codes(bits: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    low = -(2 ** (bits - 1))
    return torch.randint(low, -low, shape, generator=generator, dtype=torch.int8)


def test_check_vector_of_compressed_tensors() -> None:
    words = pack(torch.arange(-8, 8).to(torch.int8).unsqueeze(0), 4)
    assert words.dtype == torch.int32
    assert [word & 0xFFFFFFFF for word in words[0].tolist()] == [0x76543210, 0xFEDCBA98]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("in_features", [1, 7, 11, 32, 33, 96, 101])
def test_round_trip_and_words(bits: int, in_features: int) -> None:
    codes = random_codes(bits, 3, in_features)
    packed = pack(codes, bits)
    assert packed.shape == (3, -(-in_features * bits // 32))
    for row, words in zip(codes.tolist(), packed.tolist(), strict=True):
        assert [word & 0xFFFFFFFF for word in words] == pack_by_bits(row, bits)
    assert torch.equal(unpack(packed, bits, in_features), codes)
    assert torch.equal(pack(codes.float(), bits), packed)


def test_leading_axes_and_strides_are_kept() -> None:
    codes = random_codes(3, 2, 13, 4).transpose(1, 2)
    packed = pack(codes, 3)
    assert packed.shape == (2, 4, 2)
    assert torch.equal(unpack(packed, 3, 13), codes)


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"num_bits must lie in \[2, 8\] to be packed, got 9"):
        pack(torch.zeros(1, 1), 9)
    with pytest.raises(NumericsError, match=r"codes in \[0, 8\], but 4 bits hold \[-8, 7\]"):
        pack(torch.tensor([[0, 8]]), 4)
    with pytest.raises(NumericsError, match=r"codes in \[nan, nan\]"):
        pack(torch.tensor([[0.0, float("nan")]]), 4)
    with pytest.raises(ConfigError, match=r"rows of 2 torch.int32 words; 33 values of 3 bits take"):
        unpack(torch.zeros(1, 2, dtype=torch.int32), 3, 33)
