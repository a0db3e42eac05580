"""A linear layer whose weight is an integer grid and whose input is quantised as it arrives."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from recon.layers.patches import image_of, patches
from recon.layers.recomputed import recomputed
from recon.layers.rounding import (
    CLIP_LOGIT_START,
    AdaptiveRounding,
    NearestRounding,
    Rounding,
)
from recon.layers.static_range import on_own_range
from recon.layers.token_range import TokenRange
from recon.layers.transform import InputTransform
from recon.quantizers.affine import dequantize, fake_quantize_tokens
from recon.quantizers.packing import pack, unpack
from recon.quantizers.spec import QuantSpec


class QuantLinear(nn.Module):
    """y = Q_a((x ∘ s) P) · Q_w(W̃)ᵀ + b.

    Open, it computes Q_w from the full-precision weight through `rounding`, and everything that
    is learned is a parameter. Closed, it holds packed integer codes and step sizes and nothing of
    the full-precision weight. The full-precision weight is deliberately no buffer: checkpoints
    hold what is learned, not the teacher.

    With a `kernel` it stands for a convolution over patches side by side: each patch is a token.

    Args:
        linear: The layer it stands for.
        weight: Grid of the weight.
        activation: Grid of the input; None leaves the input as it is.
        transform: What is applied to the input first; the same object in every linear that
            shares this input.
        rounding: How the weight is rounded while open; default round-to-nearest.
        learn_activation_clip: Whether the kept shares of a token's maximum and minimum are
            learned (one pair per layer).
        clip_start: Logit at which those shares start.
        activation_range: The kept share of every token's range, searched or learned; the same
            object in every linear that shares this input.
    """

    codes: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None
    activation_clip: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        weight: QuantSpec,
        activation: QuantSpec | None,
        *,
        transform: InputTransform | None = None,
        rounding: Rounding | None = None,
        learn_activation_clip: bool = False,
        clip_start: float = CLIP_LOGIT_START,
        activation_range: TokenRange | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight_spec, self.activation_spec = weight, activation
        self.transform = transform
        self.activation_range = activation_range
        self.rounding: Rounding | None = rounding or NearestRounding(
            self.out_features, weight, learn_clip=False
        )
        learn_activation_clip = learn_activation_clip and activation is not None
        self.activation_clip_logits = (
            nn.Parameter(torch.full((2,), clip_start)) if learn_activation_clip else None
        )
        for name in ("codes", "scale", "zero_point", "activation_clip"):
            self.register_buffer(name, None)
        self.teacher_weight: Tensor | None = linear.weight.detach()
        self.bias: Tensor | None = None if linear.bias is None else linear.bias.detach()
        self.resident_weight: Tensor | None = None
        self.kernel: tuple[int, int] | None = None

    @property
    def closed(self) -> bool:
        """Whether the weight is codes."""
        return self.codes is not None

    def transformed_weight(self) -> Tensor:
        """The full-precision weight that meets the transformed input, [out, channels], float32."""
        assert self.teacher_weight is not None
        weight = self.teacher_weight.float()
        return weight if self.transform is None else self.transform.weight(weight)

    def quantized_weight(self) -> Tensor:
        """The weight as the grid represents it, [out, channels], float32."""
        if self.resident_weight is not None:
            return self.resident_weight
        if self.codes is None or self.scale is None:
            assert self.rounding is not None
            return recomputed(self.rounding, self.transformed_weight())
        codes = unpack(self.codes, self.weight_spec.num_bits, self.in_features)
        codes = codes.to(self.scale.dtype)
        if self.zero_point is not None:
            codes = codes - self.zero_point
        return dequantize(codes, self.scale, self.weight_spec)

    def forward(self, inputs: Tensor) -> Tensor:
        """Output of the layer, [..., out], in the dtype of `inputs` [..., channels].

        With a kernel: from images [batch, channels, height, width] to [batch, out, rows, columns].
        """
        if self.kernel is None:
            return self._product(inputs)
        product = self._product(patches(inputs, self.kernel))
        return image_of(product, rows=inputs.shape[-2] // self.kernel[0])

    def _product(self, inputs: Tensor) -> Tensor:
        hidden = inputs if self.transform is None else self.transform(inputs)
        if self.activation_spec is not None or self.activation_range is not None:
            hidden = recomputed(self._on_grid, hidden)
        weight = self.quantized_weight().to(inputs.dtype)
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        return functional.linear(hidden.to(inputs.dtype), weight, bias)

    def _on_grid(self, hidden: Tensor) -> Tensor:
        """The transformed input as its grid represents it."""
        if self.activation_spec is not None and self.activation_spec.strategy != "token":
            return self._on_fixed_grid(hidden.float())
        if self.activation_range is not None:
            ranged: Tensor = self.activation_range(hidden)
            return ranged
        assert self.activation_spec is not None
        clip = self.activation_clip
        if self.activation_clip_logits is not None:
            clip = self.activation_clip_logits.sigmoid()
        return fake_quantize_tokens(hidden.float(), self.activation_spec, clip)

    def _on_fixed_grid(self, hidden: Tensor) -> Tensor:
        """Hidden itself where the transform quantised it; else on the range of this very call."""
        assert self.activation_spec is not None
        if self.transform is not None and self.transform.static is not None:
            return hidden
        return on_own_range(hidden, self.activation_spec)

    @torch.no_grad()
    def fold(self) -> Tensor:
        """Folds transform and activation clip; returns the weight to be rounded, float32."""
        assert self.teacher_weight is not None
        weight = self.teacher_weight.float()
        if self.transform is not None:
            self.transform.fold()
            weight = self.transform.folded_weight(self.teacher_weight)
        if self.activation_clip_logits is not None:
            self.activation_clip = self.activation_clip_logits.detach().sigmoid()
            self.activation_clip_logits = None
        if self.activation_range is not None:
            self.activation_clip = self.activation_range.clip().detach().clone()
            self.activation_range = None
        return weight

    @torch.no_grad()
    def close(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Replaces the weight by `codes` (integers, [out, channels]) and `scale`.

        Args:
            codes: Signed, also on an asymmetric grid.
            scale: Step sizes.
            zero_point: Code of zero in each row, [out, 1]; None: that of the rounding, if any.
        """
        self.fold()
        if zero_point is None and isinstance(self.rounding, AdaptiveRounding):
            zero_point = self.rounding.zero_point
        self.zero_point = None if zero_point is None else zero_point.detach().to(torch.int8)
        self.codes = pack(codes, self.weight_spec.num_bits)
        self.scale = scale.detach().float().clone()
        self.rounding = None
        self.teacher_weight = None

    def close_as_rounded(self) -> None:
        """Replaces the weight by the codes and step sizes of its rounding."""
        weight = self.fold()
        assert self.rounding is not None
        self.close(*self.rounding.close(weight))

    def adopt(self, tensors: dict[str, Tensor], transform: InputTransform | None) -> None:
        """Becomes the closed layer that these saved tensors describe."""
        self.codes, self.scale = tensors["codes"], tensors["scale"]
        self.zero_point = tensors.get("zero_point")
        self.activation_clip = tensors.get("activation_clip")
        self.activation_clip_logits = self.activation_range = None
        self.transform = transform
        self.rounding = None
        self.teacher_weight = None

    def keep_resident(self, dtype: torch.dtype) -> None:
        """Keeps the de-quantised weight, for many calls in a row at the cost of its memory."""
        self.resident_weight = None
        self.resident_weight = self.quantized_weight().to(dtype)

    def carry_kept(self, device: torch.device | str) -> None:
        """Moves what is no buffer, and so stays where it is under `to`."""
        for name in ("teacher_weight", "bias", "resident_weight"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))
