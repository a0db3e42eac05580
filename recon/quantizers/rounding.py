"""AdaRound: whether each weight is rounded down or up is learned, its scale is not.

Source: Nagel et al., arXiv 2004.10568 (AdaRound); numbers as in BRECQ and PTQ4DiT.
"""

import torch
from torch import Tensor

from recon.errors import ConfigError
from recon.quantizers.affine import compute_dtype
from recon.quantizers.spec import QuantSpec

ZETA = 1.1
"""Upper end of the stretched sigmoid. Source: AdaRound, section 3.2."""

GAMMA = -0.1
"""Lower end of the stretched sigmoid. Source: AdaRound, section 3.2."""

BETA_START = 20.0
"""Exponent of the regulariser before and at the end of the warm-up. Source: BRECQ, PTQ4DiT."""

BETA_END = 2.0
"""Exponent of the regulariser at the end of training. Source: BRECQ, PTQ4DiT."""

WARMUP = 0.2
"""Share of training without a regulariser. Source: BRECQ, PTQ4DiT (quant_sample.py:159)."""


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """Share h in [0, 1] by which each weight is rounded up; reaches 0 and 1 at finite logits.

    Source: AdaRound, eq. 23.
    """
    return (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def initial_logits(weight: Tensor, scale: Tensor) -> Tensor:
    """Logits at which h is the fractional part of weight / scale: training starts unrounded.

    Args:
        weight: [out, in_].
        scale: Positive, [out, 1], [out, groups] or [1, 1].

    Source: PTQ4DiT, adaptive_rounding.py; AdaRound's rectified sigmoid, inverted.
    """
    quotient = _quotient(weight, scale)
    fraction = quotient - quotient.floor()
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def soft_codes(weight: Tensor, scale: Tensor, logits: Tensor, spec: QuantSpec) -> Tensor:
    """Codes clamp(floor(weight / scale) + h, qmin, qmax), not yet integers; differentiable in h.

    Args:
        weight: [out, in_].
        scale: Positive, [out, 1], [out, groups] or [1, 1]. Gets no gradient.
        logits: [out, in_].
        spec: Gives the ends of the codes.

    Source: AdaRound, eq. 22.
    """
    floor = _quotient(weight, scale).floor()
    return (floor + rectified_sigmoid(logits)).clamp(spec.qmin, spec.qmax)


def hard_codes(weight: Tensor, scale: Tensor, logits: Tensor, spec: QuantSpec) -> Tensor:
    """Integer codes in a float tensor: rounded up where h is at least one half.

    Args:
        weight: [out, in_].
        scale: Positive, [out, 1], [out, groups] or [1, 1].
        logits: [out, in_].
        spec: Gives the ends of the codes.

    Source: AdaRound, section 3.2; PTQ4DiT's finished units (logits at least 0).
    """
    floor = _quotient(weight, scale).floor()
    return (floor + (logits >= 0)).clamp(spec.qmin, spec.qmax)


def rounding_regularizer(logits: Tensor, beta: float | Tensor) -> Tensor:
    """Sum of 1 - |2h - 1|^beta over all weights: 0 when every h is 0 or 1.

    A sum, as in the papers; divide by `logits.numel()` for a mean.

    Args:
        logits: Any shape.
        beta: Exponent, at least 1; large values leave the middle flat.

    Source: AdaRound, eq. 24.
    """
    return (1 - (2 * rectified_sigmoid(logits) - 1).abs().pow(beta)).sum()


def beta_schedule(
    progress: float, start: float = BETA_START, end: float = BETA_END, warmup: float = WARMUP
) -> float:
    """Exponent of the regulariser: start until the warm-up ends, then linear down to end.

    Args:
        progress: Share of training done, in [0, 1].
        start: Exponent during the warm-up.
        end: Exponent at progress 1.
        warmup: Share of training, in [0, 1).

    Raises:
        ConfigError: progress or warmup is outside its range.

    Source: BRECQ, PTQ4DiT block_recon.py (its docstring says cosine, the code is linear).
    """
    if not 0 <= warmup < 1:
        raise ConfigError(
            f"beta_schedule's warmup must lie in [0, 1), got {warmup}. It is a share of training: "
            "0.2 is the papers' value."
        )
    if not 0 <= progress <= 1:
        raise ConfigError(
            f"beta_schedule's progress must lie in [0, 1], got {progress}. Divide the step by the "
            "number of steps of the unit."
        )
    remaining = min(1.0, (1 - progress) / (1 - warmup))
    return end + (start - end) * remaining


def _quotient(weight: Tensor, scale: Tensor) -> Tensor:
    """Weight / scale without a graph: AdaRound learns neither of them."""
    dtype = compute_dtype(weight)
    # Row, tensor and group scales alike: a scale has one column per group of inputs.
    blocks = weight.detach().to(dtype).unflatten(-1, (scale.shape[-1], -1))
    return (blocks / scale.detach().to(dtype).unsqueeze(-1)).flatten(-2)
