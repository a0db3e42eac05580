"""The symmetric quantiser, one number at a time."""

import torch
from torch import Tensor


def codes_by_loop(x: Tensor, denominator: float, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of the rows of x [rows, channels], each row with its own scale.

    Source: S²Q-VDiT (arXiv 2508.04016), eq. 1; scale 1 for an all-zero row.
    """
    codes = torch.zeros_like(x)
    scales = torch.ones(x.shape[0], 1, dtype=x.dtype)
    for row in range(x.shape[0]):
        absmax = max(abs(value) for value in x[row].tolist())
        if absmax > 0:
            scales[row, 0] = torch.tensor(absmax, dtype=x.dtype) / denominator
        for column in range(x.shape[1]):
            quotient = float(x[row, column] / scales[row, 0])
            codes[row, column] = min(max(round(quotient), qmin), qmax)
    return codes, scales


def fake_quantize_by_autograd(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Values on the grid, built of autograd's own operations with a detached round.

    Source: S²Q-VDiT, eq. 1, with the straight-through estimator of arXiv 1308.3432.
    """
    quotient = x / scale
    rounded = quotient + (quotient.round() - quotient).detach()
    return rounded.clamp(qmin, qmax) * scale


def pack_by_bits(codes: list[int], num_bits: int) -> list[int]:
    """Unsigned 32-bit words of one row, written bit by bit.

    Source: compressed-tensors 0.20, pack-quantized: a little-endian stream, u = q + 2^(bits-1).
    """
    words = [0] * -(-len(codes) * num_bits // 32)
    for index, code in enumerate(codes):
        value = code + 2 ** (num_bits - 1)
        for bit in range(num_bits):
            position = index * num_bits + bit
            words[position // 32] |= ((value >> bit) & 1) << (position % 32)
    return words
