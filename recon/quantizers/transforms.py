"""Invertible changes of a layer's input: scale per channel, then a Kronecker product.

For y = x W^T the layer sees (x * s) P and its weight becomes (W / s) P^-T, so nothing changes until
something is rounded. P = kron(left, right) acts on the row-major reshape X [a, b] of a token as
left^T X right; a token costs channels * (a + b) multiplications instead of channels^2.

Source: FlatQuant, arXiv 2410.09426, section 3, as used by S²Q-VDiT (arXiv 2508.04016).
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from recon.errors import ConfigError

Start = Literal["reference", "haar", "identity"]

Factors = tuple[Tensor, Tensor, Tensor, Tensor]
"""Left and right factor of P, then of P^-T."""

SMALLEST_SALIENCE = 1e-5
"""Clamp of channel maxima: a dead channel must not give an infinite scale. Source: FlatQuant,
function_utils.py:7-8, which clamps the result; deviates as PTQ4DiT's specification does, on both
saliences."""


def kronecker_split(width: int, split: tuple[int, int] | None = None) -> tuple[int, int]:
    """Sizes (a, b) of the two Kronecker factors with a * b = width, a <= b unless the user says so.

    The most balanced pair (p - q, p + q), whose members are both odd or both even. A width that is
    2 modulo 4 has none and gets (1, width), a single dense factor; a user split may do better.

    Args:
        width: Channels of the input, at least 1.
        split: The user's own pair.

    Raises:
        ConfigError: width is below 1, or the split's product is not the width.

    Source: FlatQuant, function_utils.py:11-21; deviates: that search never ends for 2 modulo 4.
    """
    if width < 1:
        raise ConfigError(
            f"A Kronecker transform needs a width of at least 1, got {width}. Pass the number of "
            "input channels of the layer."
        )
    if split is not None:
        left, right = split
        if left < 1 or right < 1 or left * right != width:
            raise ConfigError(
                f"The Kronecker split ({left}, {right}) has the product {left * right}, but the "
                f"input is {width} wide. Choose two positive factors of {width}, or leave the "
                "split out."
            )
        return left, right
    for left in range(math.isqrt(width), 0, -1):
        right, rest = divmod(width, left)
        if rest == 0 and (right - left) % 2 == 0:
            return left, right
    return 1, width


def apply_kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Product x @ kron(left, right), never formed densely, in the shape and dtype of x.

    Args:
        x: [..., a * b].
        left: [a, a]; cast to x's dtype.
        right: [b, b]; cast to x's dtype.

    Raises:
        ConfigError: a * b is not the width of x.
    """
    width, rows, columns = x.shape[-1], left.shape[0], right.shape[0]
    if rows * columns != width:
        raise ConfigError(
            f"Kronecker factors of {rows} and {columns} act on {rows * columns} channels, but the "
            f"input is {width} wide. Build the transform with the width of this layer's input."
        )
    # Mixed precision is for the network: input and weight are each other's inverse only exactly.
    with torch.autocast(x.device.type, enabled=False):
        blocks = (x.reshape(-1, columns) @ right.to(x.dtype)).view(-1, rows, columns)
        # A batch of small products: `left.t() @ blocks` is folded into a large one over transposed
        # copies, and what comes behind reads its transposed result number by number.
        blocks = torch.bmm(left.to(x.dtype).t().expand(len(blocks), rows, rows), blocks)
    return blocks.view(x.shape)


class KroneckerTransform(nn.Module):
    """Learned invertible P = kron(left, right); each factor is U diag(sigma) V^T.

    U and V are `base @ cayley(skew)`: the base is fixed, the strictly lower triangle of the raw
    parameter is learned, so both stay orthogonal whatever the optimizer does. sigma is learned as
    its logarithm: it stays positive, so P stays invertible (600 AdamW steps of 5e-3 on sigma itself
    can cross zero), P and its inverse are treated alike, and weight decay pulls to 1, not to 0.
    Near the start, where sigma is 1, both forms take the same steps.

    U and V of one factor share the parameter [2, size, size] so that one batched solve serves both.

    Args:
        width: Channels of the input.
        split: Sizes (a, b) of the factors; None takes the most balanced ones.
        trained_singular_values: False fixes sigma at 1, which makes P a rotation.
        start: haar starts U and V at drawn orthogonal matrices; reference at the Cayley map of the
            drawn matrices' lower triangle, which is where FlatQuant starts; identity at P = I.
        generator: Source of the drawn matrices; its device is where they are drawn.

    Raises:
        ConfigError: The split does not fit the width, or start has another value.

    Source: FlatQuant, trans_utils.py:11-16,60-73: PyTorch's orthogonal(cayley,
    use_trivialization=False) does not start at the drawn matrix. Deviates: log sigma.
    """

    left_base: Tensor
    right_base: Tensor
    left_skew: nn.Parameter
    right_skew: nn.Parameter
    left_log_sigma: nn.Parameter | None
    right_log_sigma: nn.Parameter | None

    def __init__(
        self,
        width: int,
        *,
        split: tuple[int, int] | None = None,
        trained_singular_values: bool = True,
        start: Start = "reference",
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        if start not in ("reference", "haar", "identity"):
            raise ConfigError(
                f"KroneckerTransform.start is {start!r}, which is none of reference, haar, "
                "identity. Choose reference for the paper's start."
            )
        self.width = width
        self.split = kronecker_split(width, split)
        for side, size in zip(("left", "right"), self.split, strict=True):
            base, skew = _starting_point(size, start, generator)
            self.register_buffer(f"{side}_base", base)
            self.register_parameter(f"{side}_skew", nn.Parameter(skew))
            log_sigma = nn.Parameter(torch.zeros(size)) if trained_singular_values else None
            self.register_parameter(f"{side}_log_sigma", log_sigma)

    def factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Factors left [a, a] and right [b, b] of P.

        Args:
            dtype: Arithmetic and result; None takes the parameters' own. float64 for folding.
        """
        left, right, _, _ = self.all_factors(dtype)
        return left, right

    def inverse_transposed_factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Factors left [a, a] and right [b, b] of P^-T, as U diag(1/sigma) V^T.

        Args:
            dtype: Arithmetic and result; None takes the parameters' own. float64 for folding.
        """
        _, _, left, right = self.all_factors(dtype)
        return left, right

    def all_factors(
        self, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Left and right of P, then left and right of P^-T: half the solves of two calls.

        Args:
            dtype: Arithmetic and result; None takes the parameters' own. float64 for folding.
        """
        dtype = dtype or self.left_base.dtype
        # bfloat16 products would cost U and V their orthogonality, and P^-T would invert nothing.
        with torch.autocast(self.left_base.device.type, enabled=False):
            left, left_inverse = self._factor("left", dtype)
            right, right_inverse = self._factor("right", dtype)
        return left, right, left_inverse, right_inverse

    def _factor(self, side: Literal["left", "right"], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """One factor of P and of P^-T."""
        base: Tensor = getattr(self, f"{side}_base")
        skew: Tensor = getattr(self, f"{side}_skew")
        log_sigma: Tensor | None = getattr(self, f"{side}_log_sigma")
        u, v = (base.to(dtype) @ cayley(skew.to(dtype))).unbind(0)
        if log_sigma is None:
            rotation = u @ v.mT
            return rotation, rotation
        log_sigma = log_sigma.to(dtype)
        return (u * log_sigma.exp()) @ v.mT, (u * (-log_sigma).exp()) @ v.mT


def factors_of_all(transforms: Sequence[KroneckerTransform]) -> list[Factors]:
    """`all_factors` of each transform, with one solve for all factors of one size.

    A unit learns half a dozen small transforms at once; apart, their hundreds of tiny operations
    cost more than the unit's matrix products.
    """
    members: dict[tuple[int, bool], list[tuple[int, str]]] = {}
    for index, transform in enumerate(transforms):
        for side, size in zip(("left", "right"), transform.split, strict=True):
            learned = getattr(transform, f"{side}_log_sigma") is not None
            members.setdefault((size, learned), []).append((index, side))
    found: dict[tuple[int, str], tuple[Tensor, Tensor]] = {}
    for (_, learned), places in members.items():
        pairs = _stacked_factors([(transforms[i], side) for i, side in places], learned)
        found |= dict(zip(places, pairs, strict=True))
    return [
        (found[i, "left"][0], found[i, "right"][0], found[i, "left"][1], found[i, "right"][1])
        for i in range(len(transforms))
    ]


def _stacked_factors(
    members: Sequence[tuple[KroneckerTransform, str]], learned: bool
) -> list[tuple[Tensor, Tensor]]:
    """(factor of P, factor of P^-T) of each member; all have one size."""
    base = torch.stack([getattr(t, f"{side}_base") for t, side in members])
    skew = torch.stack([getattr(t, f"{side}_skew") for t, side in members])
    # As in `all_factors`: autocast would cost U and V their orthogonality.
    with torch.autocast(base.device.type, enabled=False):
        u, v = (base @ cayley(skew)).unbind(1)
        if not learned:
            return [(rotation, rotation) for rotation in u @ v.mT]
        log_sigma = torch.stack([getattr(t, f"{side}_log_sigma") for t, side in members])
        scale = torch.stack([log_sigma, -log_sigma]).exp().unsqueeze(-2)
        factors, inverses = ((u * scale) @ v.mT).unbind(0)
        return list(zip(factors.unbind(0), inverses.unbind(0), strict=True))


def cayley(raw: Tensor) -> Tensor:
    """Orthogonal (I - A/2)^-1 (I + A/2) of the skew A made from the strictly lower triangle.

    Args:
        raw: [..., size, size]; the diagonal and what lies above it have no effect.
    """
    lower = raw.tril(-1)
    half_skew = (lower - lower.mT) / 2
    identity = torch.eye(raw.shape[-1], dtype=raw.dtype, device=raw.device)
    # solve_ex: I minus a skew matrix is never singular, and checking would stop the GPU each step.
    return torch.linalg.solve_ex(identity - half_skew, identity + half_skew).result


def _starting_point(size: int, start: Start, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Base and raw skew of U and V, each [2, size, size], in the default dtype."""
    identity = torch.eye(size, dtype=torch.float64, device=generator.device).repeat(2, 1, 1)
    base, skew = identity, torch.zeros_like(identity)
    if start != "identity":
        drawn = torch.stack([_haar(size, generator), _haar(size, generator)])
        base, skew = (drawn, skew) if start == "haar" else (base, drawn.tril(-1))
    dtype = torch.get_default_dtype()
    return base.to(dtype), skew.to(dtype)


def _haar(size: int, generator: torch.Generator) -> Tensor:
    """Orthogonal matrix drawn uniformly, in float64.

    Source: Mezzadri, arXiv math-ph/0609050: QR alone is not uniform, the signs of R must be moved.
    """
    normal = torch.randn(
        size, size, generator=generator, dtype=torch.float64, device=generator.device
    )
    q, r = torch.linalg.qr(normal)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def smoothing_scale(activation_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """Factor of each input channel [in_]: x is multiplied by it, the weight's column divided.

    Args:
        activation_absmax: Largest |x| of each channel over all calibration tokens, [in_].
        weight_absmax: Largest |W| of each column, over all layers that share the input, [in_].
        alpha: Share of the difficulty that moves to the weight, in [0, 1].

    Raises:
        ConfigError: alpha is outside [0, 1].

    Source: SmoothQuant, arXiv 2211.10438, eq. 4. Deviates: its reciprocal (SmoothQuant divides x),
    and both saliences are at least 1e-5.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(
            f"The smoothing exponent alpha must lie in [0, 1], got {alpha}. 0.5 shares the "
            "difficulty equally; 1 gives it all to the weight."
        )
    activation = activation_absmax.clamp_min(SMALLEST_SALIENCE)
    weight = weight_absmax.clamp_min(SMALLEST_SALIENCE)
    return weight.pow(1 - alpha) / activation.pow(alpha)


def transform_gram(
    gram: Tensor,
    channel_scale: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    rotated_scale: Tensor | None = None,
) -> Tensor:
    """Gram of the transformed inputs, T^T G T for T = diag(s) P diag(r), float64 [in_, in_].

    Args:
        gram: x^T x of the untouched inputs, [in_, in_].
        channel_scale: s, [in_]; None for none.
        left: Left factor of P; None, as well as right, for none.
        right: Right factor of P.
        rotated_scale: r, [in_]; None for none.

    Raises:
        ConfigError: Only one factor is given, or the factors do not fit the gram.
    """
    if (left is None) != (right is None):
        raise ConfigError(
            "transform_gram got only one of the two Kronecker factors. Pass left and right, or "
            "None for both."
        )
    result = _scaled_both_ways(gram.to(torch.float64), channel_scale)
    if left is not None and right is not None:
        # G P first; the transpose of (G P)^T P is then P^T G P.
        result = apply_kronecker(result, left, right)
        result = apply_kronecker(result.t(), left, right).t().contiguous()
    return _scaled_both_ways(result, rotated_scale)


def _scaled_both_ways(gram: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return gram
    wide = scale.to(gram.dtype)
    return wide.unsqueeze(1) * gram * wide
