"""The invertible map that a group of linears applies to its shared input."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from recon.layers.static_range import StaticRange
from recon.quantizers.spec import QuantSpec
from recon.quantizers.transforms import (
    Factors,
    KroneckerTransform,
    apply_kronecker,
    factors_of_all,
    transform_gram,
)


class InputTransform(nn.Module):
    """Channel scale, Kronecker product, scale: x̃ = (x ∘ s) P ∘ r, and W̃ = (W / s) P^{-T} / r.

    While a unit is open, s, P and r are parameters; `fold` turns them into buffers
    (`channel_scale` [channels], `left` [a, a], `right` [b, b], `rotated_scale` [channels]), any of
    which may be absent. Nobody needs both scales. Where the linears quantise their input on one
    fixed grid, the grid is the last part: they share it as they share the input.

    Args:
        channel_scale: Start value of s, shape [channels], positive; None leaves it out.
        kronecker: The learned product; None leaves it out.
        rotated_scale: Start value of r, shape [channels], positive; None leaves it out.
        learn_scale: Whether s and r receive gradients.
        static: The fixed grid; None leaves quantising to the linears.

    Source: scale before rotation as FlatQuant (arXiv 2410.09426), S²Q-VDiT's stated origin; after
    it as QuantVGGT, code of the same group.
    """

    PARTS: ClassVar = (
        "channel_scale", "left", "right", "rotated_scale", "static.step", "static.zero_point"
    )  # fmt: skip
    """Names of the buffers that a folded transform keeps."""

    channel_scale: Tensor | None
    left: Tensor | None
    right: Tensor | None
    rotated_scale: Tensor | None

    def __init__(
        self,
        channel_scale: Tensor | None,
        kronecker: KroneckerTransform | None = None,
        *,
        rotated_scale: Tensor | None = None,
        learn_scale: bool = True,
        static: StaticRange | None = None,
    ) -> None:
        super().__init__()
        self.static = static
        for name, scale in (("channel_scale", channel_scale), ("rotated_scale", rotated_scale)):
            if scale is not None and learn_scale:
                # A parameter of the logarithm would change the published learning rate's meaning.
                self.register_parameter(name, nn.Parameter(scale.clone()))
            else:
                self.register_buffer(name, scale)
        self.kronecker = kronecker
        self._ready: Factors | None = None
        self._sharing = False
        self._seen: tuple[Tensor, Tensor] | None = None
        self.register_buffer("left", None)
        self.register_buffer("right", None)

    @classmethod
    def closed(
        cls,
        channel_scale: Tensor | None,
        left: Tensor | None,
        right: Tensor | None,
        rotated_scale: Tensor | None = None,
        step: Tensor | None = None,
        zero_point: Tensor | None = None,
        *,
        spec: QuantSpec | None = None,
    ) -> "InputTransform":
        """A folded transform that holds these tensors, in the order of `PARTS`."""
        static = None
        if step is not None and zero_point is not None and spec is not None:
            static = StaticRange.closed(step, zero_point, spec)
        transform = cls(
            channel_scale, rotated_scale=rotated_scale, learn_scale=False, static=static
        )
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
            inputs = apply_kronecker(inputs, *self._factors()[:2])
        elif self.left is not None and self.right is not None:
            inputs = apply_kronecker(inputs, self.left, self.right)
        if self.rotated_scale is not None:
            inputs = inputs * self.rotated_scale
        return inputs if self.static is None else self.static(inputs)

    def weight(self, weight: Tensor) -> Tensor:
        """The weight [out, channels] that meets the transformed input with the same product."""
        if self.channel_scale is not None:
            weight = weight / self.channel_scale
        if self.kronecker is not None:
            weight = apply_kronecker(weight, *self._factors()[2:])
        return weight if self.rotated_scale is None else weight / self.rotated_scale

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
        if self.rotated_scale is not None:
            weight = weight / self.rotated_scale.double()
        return weight.float()

    def folded_gram(self, gram: Tensor) -> Tensor:
        """Gram of the transformed inputs from that of the inputs, both [channels, channels].

        float64. Only once folded.
        """
        return transform_gram(gram, self.channel_scale, self.left, self.right, self.rotated_scale)

    @torch.no_grad()
    def fold(self) -> None:
        """Turns the parameters into buffers; idempotent, so that sharers may each ask for it."""
        for name in ("channel_scale", "rotated_scale"):
            scale = getattr(self, name)
            if isinstance(scale, nn.Parameter):
                delattr(self, name)
                self.register_buffer(name, scale.detach().clone())
        if self.kronecker is not None:
            # float64: the Cayley map solves a linear system, whose float32 error would be kept.
            left, right = self.kronecker.factors(torch.float64)
            self.left, self.right = left.float(), right.float()
            self.kronecker = None
        if self.static is not None:
            self.static.fold()

    def part(self, name: str) -> Tensor | None:
        """A buffer of a folded transform by its name in `PARTS`; None where it is absent."""
        owner, _, leaf = name.rpartition(".")
        holder = getattr(self, owner) if owner else self
        found: Tensor | None = None if holder is None else getattr(holder, leaf)
        return found


def begin_all(transforms: Sequence[InputTransform]) -> None:
    """`begin` for each, with the factors of all computed together."""
    products = [t.kronecker for t in transforms if t.kronecker is not None]
    factors = iter(factors_of_all(products))
    for transform in transforms:
        transform.begin(None if transform.kronecker is None else next(factors))
