"""The invertible map that a group of linears applies to its shared input."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recon.quantizers.transforms import (
    Factors,
    KroneckerTransform,
    apply_kronecker,
    factors_of_all,
)


class InputTransform(nn.Module):
    """Channel scale, then Kronecker product: x̃ = (x ∘ s) P, and W̃ = (W / s) P^{-T} on the weight.

    While a unit is open, s and P are parameters; `fold` turns them into three buffers
    (`channel_scale` [channels], `left` [a, a], `right` [b, b]), any of which may be absent.

    Args:
        channel_scale: Start value of s, shape [channels], positive; None leaves it out.
        kronecker: The learned product; None leaves it out.
        learn_scale: Whether s receives gradients.

    Source: S²Q-VDiT and its stated origin FlatQuant (arXiv 2410.09426): scale before rotation.
    """

    channel_scale: Tensor | None
    left: Tensor | None
    right: Tensor | None

    def __init__(
        self,
        channel_scale: Tensor | None,
        kronecker: KroneckerTransform | None = None,
        *,
        learn_scale: bool = True,
    ) -> None:
        super().__init__()
        if channel_scale is not None and learn_scale:
            # A parameter of the logarithm would change the published learning rate's meaning.
            self.channel_scale = nn.Parameter(channel_scale.clone())
        else:
            self.register_buffer("channel_scale", channel_scale)
        self.kronecker = kronecker
        self._ready: Factors | None = None
        self._sharing = False
        self._seen: tuple[Tensor, Tensor] | None = None
        self.register_buffer("left", None)
        self.register_buffer("right", None)

    @classmethod
    def closed(
        cls, channel_scale: Tensor | None, left: Tensor | None, right: Tensor | None
    ) -> "InputTransform":
        """A folded transform that holds these tensors."""
        transform = cls(channel_scale, learn_scale=False)
        transform.left, transform.right = left, right
        return transform

    def begin(self, factors: Factors | None) -> None:
        """Until `end`, uses these factors, and transforms an input once for all that share it."""
        self._ready, self._sharing = factors, True

    def end(self) -> None:
        """Forgets what `begin` brought: the next step has other parameters."""
        self._ready, self._sharing, self._seen = None, False, None

    def _factors(self) -> Factors:
        assert self.kronecker is not None
        return self._ready or self.kronecker.all_factors()

    def forward(self, inputs: Tensor) -> Tensor:
        """Transformed input, same shape [..., channels], float32."""
        if self._seen is not None and self._seen[0] is inputs:
            return self._seen[1]
        transformed = self._transformed(inputs.float())
        if self._sharing:
            self._seen = (inputs, transformed)
        return transformed

    def _transformed(self, inputs: Tensor) -> Tensor:
        if self.channel_scale is not None:
            inputs = inputs * self.channel_scale
        if self.kronecker is not None:
            return apply_kronecker(inputs, *self._factors()[:2])
        if self.left is not None and self.right is not None:
            return apply_kronecker(inputs, self.left, self.right)
        return inputs

    def weight(self, weight: Tensor) -> Tensor:
        """The weight [out, channels] that meets the transformed input with the same product."""
        if self.channel_scale is not None:
            weight = weight / self.channel_scale
        if self.kronecker is not None:
            weight = apply_kronecker(weight, *self._factors()[2:])
        return weight

    @torch.no_grad()
    def folded_weight(self, weight: Tensor) -> Tensor:
        """`weight`, computed in float64 and returned in float32: what is rounded, once.

        The rounded factors that `fold` keeps are inverted here, not the parameters they came
        from, so that folding leaves the product exact to float32.
        """
        weight = weight.double()
        if self.channel_scale is not None:
            weight = weight / self.channel_scale.double()
        if self.left is not None and self.right is not None:
            left, right = (torch.linalg.inv(f.double()).T for f in (self.left, self.right))
            weight = apply_kronecker(weight, left.contiguous(), right.contiguous())
        return weight.float()

    @torch.no_grad()
    def fold(self) -> None:
        """Turns the parameters into buffers; idempotent, so that sharers may each ask for it."""
        if isinstance(self.channel_scale, nn.Parameter):
            scale = self.channel_scale.detach().clone()
            del self.channel_scale
            self.register_buffer("channel_scale", scale)
        if self.kronecker is not None:
            # float64: the Cayley map solves a linear system, whose float32 error would be kept.
            left, right = self.kronecker.factors(torch.float64)
            self.left, self.right = left.float(), right.float()
            self.kronecker = None


def begin_all(transforms: Sequence[InputTransform]) -> None:
    """`begin` for each, with the factors of all computed together."""
    products = [t.kronecker for t in transforms if t.kronecker is not None]
    factors = iter(factors_of_all(products))
    for transform in transforms:
        transform.begin(None if transform.kronecker is None else next(factors))
