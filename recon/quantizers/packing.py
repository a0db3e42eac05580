"""Dense storage of codes: each row is one little-endian stream of bits in 32-bit words.

Element i of a row starts at bit i * num_bits as u = q + 2^(num_bits - 1). Values of 3, 5, 6 and 7
bits cross the borders of words. Eight values always fill num_bits whole bytes, so a row is
assembled eight values at a time in 64-bit integers, whose low bytes are the stream; the same few
operations serve every width on every (little-endian) device.

Source: compressed-tensors 0.20, pack-quantized; check vector int4 -8..7 -> 0x76543210, 0xfedcba98.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from recon.errors import ConfigError, NumericsError
from recon.quantizers.spec import MAX_BITS, MIN_BITS

_VALUES = 8
_WORD_BYTES = 4
_WORD_BITS = 32


def pack(codes: Tensor, num_bits: int) -> Tensor:
    """Words int32 [..., out, ceil(in_ * num_bits / 32)] that hold the codes; spare bits are zero.

    Args:
        codes: Integers in [-2^(num_bits-1), 2^(num_bits-1) - 1], int8 or float, [..., out, in_].
        num_bits: In [2, 8].

    Raises:
        ConfigError: num_bits is outside [2, 8].
        NumericsError: A code does not fit: it would spill into its neighbour.
    """
    _check_bits(num_bits)
    _check_codes(codes, num_bits)
    in_features = codes.shape[-1]
    offset = 1 << (num_bits - 1)
    unsigned = codes.to(torch.int16).add_(offset).to(torch.uint8)
    unsigned = pad(unsigned, (0, -in_features % _VALUES)).unflatten(-1, (-1, _VALUES))
    joined = unsigned[..., 0].to(torch.int64)
    for index in range(1, _VALUES):
        joined |= unsigned[..., index].to(torch.int64) << (index * num_bits)
    stream = joined.unsqueeze(-1).view(torch.uint8)[..., :num_bits].flatten(-2)
    width = _words(in_features, num_bits) * _WORD_BYTES
    return _resize(stream, width).contiguous().view(torch.int32)


def unpack(packed: Tensor, num_bits: int, in_features: int) -> Tensor:
    """Codes int8 [..., out, in_features] out of the words of `pack`.

    Args:
        packed: int32, [..., out, ceil(in_features * num_bits / 32)].
        num_bits: In [2, 8].
        in_features: Values of a row.

    Raises:
        ConfigError: num_bits is outside [2, 8], or the words of a row do not hold in_features.
    """
    _check_bits(num_bits)
    words = _words(in_features, num_bits)
    if packed.shape[-1] != words or packed.dtype != torch.int32:
        raise ConfigError(
            f"unpack got rows of {packed.shape[-1]} {packed.dtype} words; {in_features} values of "
            f"{num_bits} bits take {words} torch.int32 words. Pass the shape and the bits that the "
            "weight was packed with."
        )
    groups = -(-in_features // _VALUES)
    stream = _resize(packed.contiguous().view(torch.uint8), groups * num_bits)
    octets = pad(stream.unflatten(-1, (groups, num_bits)), (0, _VALUES - num_bits))
    joined = octets.contiguous().view(torch.int64)  # [..., out, groups, 1]
    mask, offset = (1 << num_bits) - 1, 1 << (num_bits - 1)
    values = [((joined >> (index * num_bits)) & mask).sub_(offset) for index in range(_VALUES)]
    # Narrowed before they are joined: eight int64 copies would be 64 bytes per code.
    codes = torch.cat([value.to(torch.int8) for value in values], dim=-1)
    return codes.flatten(-2)[..., :in_features].contiguous()


def _words(in_features: int, num_bits: int) -> int:
    return -(-in_features * num_bits // _WORD_BITS)


def _resize(stream: Tensor, width: int) -> Tensor:
    """The stream cut or filled with zero bytes to the width; only spare bits are ever cut."""
    return pad(stream, (0, width - stream.shape[-1]))


def _check_bits(num_bits: int) -> None:
    if not MIN_BITS <= num_bits <= MAX_BITS:
        raise ConfigError(
            f"num_bits must lie in [{MIN_BITS}, {MAX_BITS}] to be packed, got {num_bits}. Store "
            "wider values unpacked."
        )


def _check_codes(codes: Tensor, num_bits: int) -> None:
    if codes.numel() == 0:
        return
    low, high = (end.item() for end in torch.aminmax(codes))
    offset = 1 << (num_bits - 1)
    if not (low >= -offset and high < offset):
        raise NumericsError(
            f"pack got codes in [{low}, {high}], but {num_bits} bits hold [{-offset}, "
            f"{offset - 1}]. Pass what quantizers.affine.codes gives for the same num_bits."
        )
