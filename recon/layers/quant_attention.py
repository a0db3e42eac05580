"""Attention whose two matrix products see quantised operands."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from recon.layers.static_range import StaticRange, on_own_range
from recon.quantizers.affine import absmax_scale, fake_quantize, fake_quantize_tokens
from recon.quantizers.spec import QuantSpec

OPERANDS = ("query", "key", "value", "probability")
"""What is quantised: the query times channels^-0.5, the key, the value and the softmax."""


def scaled(query: Tensor) -> Tensor:
    """The query [..., channels] as the first product takes it, float32."""
    return query.float() * query.shape[-1] ** -0.5


def probabilities(query: Tensor, key: Tensor) -> Tensor:
    """Softmax over the keys of a scaled query's products, [..., queries, keys], float32."""
    return (query @ key.mT).float().softmax(-1)


class QuantAttention(nn.Module):
    """Q_p(softmax(Q_q(q / √channels) Q_k(k)ᵀ)) Q_v(v), over all keys.

    Operands are quantised on a fixed grid each where `ranges` has one. Without it, strategy token
    gives every token of every head a range of its own, and strategy tensor every call. The softmax
    lies in [0, 1] and gets unsigned codes, whose largest is the row's (or the call's) maximum.

    The [queries, keys] matrix is formed, as quantising it asks for. A value's own step per token
    lies along the sum of the second product: an integer kernel multiplies it into the softmax
    before that is quantised.

    Args:
        activation: Grid of query, key and value; strategy token or tensor.
        softmax_bits: Bits of the softmax, in [2, 8].
        ranges: Fixed grids by operand, all four or none.

    Source: PTQ4DiT (arXiv 2405.16005) and its quant_block.py: one grid per tensor and operand, the
    query after its scaling, the softmax at 8 bits. Ranges per token are ours.
    """

    def __init__(
        self,
        activation: QuantSpec,
        softmax_bits: int,
        ranges: Mapping[str, StaticRange] | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.softmax_bits = activation, softmax_bits
        self.softmax = QuantSpec(num_bits=softmax_bits, strategy="tensor", symmetric=False)
        self.ranges = nn.ModuleDict(ranges)

    @classmethod
    def closed(
        cls, tensors: Mapping[str, Tensor], activation: QuantSpec, softmax_bits: int
    ) -> "QuantAttention":
        """The module whose `state_dict` after `fold` was `tensors`."""
        made = cls(activation, softmax_bits)
        for name in OPERANDS:
            step, zero_point = (tensors.get(f"ranges.{name}.{k}") for k in ("step", "zero_point"))
            if step is not None and zero_point is not None:
                made.ranges[name] = StaticRange.closed(step, zero_point, made.spec(name))
        return made

    def spec(self, operand: str) -> QuantSpec:
        """Grid of an operand."""
        return self.softmax if operand == "probability" else self.activation

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What scaled_dot_product_attention gives, quantised: [batch, heads, queries, channels].

        Args:
            query: [batch, heads, queries, channels].
            key: [batch, heads, keys, channels].
            value: [batch, heads, keys, channels].
        """
        dtype = query.dtype
        left = self._quantized("query", scaled(query)).to(dtype)
        right = self._quantized("key", key.float()).to(dtype)
        softmax = self._quantized("probability", probabilities(left, right)).to(dtype)
        return softmax @ self._quantized("value", value.float()).to(dtype)

    def _quantized(self, name: str, operand: Tensor) -> Tensor:
        if name in self.ranges:
            quantized: Tensor = self.ranges[name](operand)
            return quantized
        if self.activation.strategy == "tensor":
            return on_own_range(operand, self.spec(name))
        if name == "probability":
            largest = operand.amax(dim=-1, keepdim=True)  # over keys
            return fake_quantize(operand, absmax_scale(largest, self.softmax), self.softmax)
        return fake_quantize_tokens(operand, self.activation)

    @torch.no_grad()
    def fold(self) -> None:
        """Turns learned steps into buffers; idempotent."""
        for static in self.ranges.values():
            assert isinstance(static, StaticRange)
            static.fold()
