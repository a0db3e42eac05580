"""Reconstruction errors of a unit's output, plain or weighted by the salience of tokens.

Everything is computed in float32 or wider: the error is a small difference of large numbers.
"""

import torch
from torch import Tensor

from recon.errors import ConfigError

CONSTANT_SPAN = 16 * torch.finfo(torch.float32).eps
"""Salience whose span is below this share of its maximum counts as constant: it is the rounding
noise of a float32 column sum, which eq. 11 would stretch over the whole range of weights."""


def token_weighted_error(student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
    """Mean squared error in which each token counts by its weight, a scalar.

    The square is averaged over channels, weighted per token, and averaged over tokens and batch.
    Padded tokens carry weight 0 and still count in the number of tokens, so that a valid token
    counts alike in every sample. The gradient reaches the student only.

    Args:
        student: [batch, tokens, channels].
        teacher: [batch, tokens, channels].
        weight: Not negative, [batch, tokens]; None counts all tokens alike.

    Raises:
        ConfigError: The shapes do not fit.

    Source: S²Q-VDiT, eq. 10. Deviates: mean over channels where the paper has the sum, a constant
    factor 1/channels.
    """
    _check_shapes("token_weighted_error", student, teacher)
    difference = _wide(student) - _wide(teacher.detach())
    square = difference.square().mean(-1)  # over channels
    if weight is None:
        return square.mean()
    if weight.shape != square.shape:
        raise ConfigError(
            f"token_weighted_error got weights of shape {list(weight.shape)} for tokens of shape "
            f"{list(square.shape)}. Pass one weight per sample and token."
        )
    return (square * weight.detach()).mean()


def token_weights(
    salience: Tensor,
    lambda_min: float,
    lambda_max: float,
    *,
    groups: list[slice] | None = None,
    clip_percentile: float | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Weight of each token [batch, tokens]: salience, stretched to [lambda_min, lambda_max].

    Minimum and maximum are those of the valid tokens of one sample (and one group). Constant
    salience gives 1, padded tokens get 0. No gradient.

    Args:
        salience: Not negative, [batch, tokens]; its overall factor has no effect.
        lambda_min: Weight of the least salient token, at least 0.
        lambda_max: Weight of the most salient token, at least lambda_min.
        groups: Slices of tokens (streams) that are stretched apart and together hold every token
            once; None stretches all tokens jointly.
        clip_percentile: In (0, 100]; salience above this percentile counts as the percentile, so
            that a few sink tokens do not press all others to lambda_min. None clips nothing.
        valid: Boolean, [batch, tokens]; false marks padding. None means no padding.

    Raises:
        ConfigError: A range is broken, a shape does not fit, or the groups miss or repeat tokens.

    Source: S²Q-VDiT, eq. 11. Deviates: 1 for constant salience, where the equation divides by zero;
    groups, clipping and padding are switches of ours.
    """
    _check_weight_arguments(salience, lambda_min, lambda_max, groups, clip_percentile, valid)
    salience = _wide(salience.detach())
    if valid is None:
        valid = torch.ones_like(salience, dtype=torch.bool)
    weights = torch.empty_like(salience)
    for tokens in groups or [slice(None)]:
        share = _stretch(salience[:, tokens], valid[:, tokens], clip_percentile)
        weights[:, tokens] = torch.where(
            share.isnan(), 1.0, lambda_min + (lambda_max - lambda_min) * share
        )
    return weights.masked_fill(~valid, 0.0)


def _stretch(salience: Tensor, valid: Tensor, clip_percentile: float | None) -> Tensor:
    """Salience mapped to [0, 1] per sample; NaN where the sample's salience is constant."""
    if salience.shape[1] == 0:
        return salience
    infinity = float("inf")
    low = salience.masked_fill(~valid, infinity).amin(1, keepdim=True)  # over tokens
    if clip_percentile is None:
        high = salience.masked_fill(~valid, -infinity).amax(1, keepdim=True)
    else:
        known = salience.masked_fill(~valid, float("nan"))
        high = known.nanquantile(clip_percentile / 100, dim=1, keepdim=True)
    span = high - low
    share = (torch.minimum(salience, high) - low) / span
    # Written as "not larger" so that samples without a valid token (NaN) land here as well.
    return share.masked_fill(~(span > CONSTANT_SPAN * high.abs()), float("nan"))


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance over the teacher's squared norm, a scalar: 0 is exact, 1 as bad as zero.

    An all-zero teacher gives 0 for an all-zero student and a very large number otherwise.

    Raises:
        ConfigError: The shapes differ.
    """
    _check_shapes("relative_error", student, teacher)
    reference = _wide(teacher.detach())
    distance = (_wide(student) - reference).square().sum()
    norm = reference.square().sum()
    return distance / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def error_and_power(student: Tensor, teacher: Tensor, weight: Tensor | None) -> Tensor:
    """Σ_t ω_t ‖student_t - teacher_t‖² and Σ_t ω_t ‖teacher_t‖², float64 [2].

    Their quotient over all samples is the block objective J_B. Differentiable in the student.

    Args:
        student: [batch, tokens, channels].
        teacher: [batch, tokens, channels].
        weight: ω, not negative, [batch, tokens]; None counts all tokens alike.

    Raises:
        ConfigError: The shapes differ.

    Source: Q-VLM (arXiv 2410.08119), eq. 3, normalised; ω as in MBQ (arXiv 2412.19509).
    """
    _check_shapes("error_and_power", student, teacher)
    reference = _wide(teacher.detach())
    squares = torch.stack([(_wide(student) - reference).square(), reference.square()]).sum(-1)
    if weight is not None:
        squares = squares * weight
    return squares.flatten(1).double().sum(1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _check_shapes(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        # Broadcasting would give a number, and a wrong one.
        raise ConfigError(
            f"{name} got a student of shape {list(student.shape)} and a teacher of shape "
            f"{list(teacher.shape)}. Compare outputs of the same unit on the same rows."
        )


def _check_weight_arguments(
    salience: Tensor,
    lambda_min: float,
    lambda_max: float,
    groups: list[slice] | None,
    clip_percentile: float | None,
    valid: Tensor | None,
) -> None:
    if not 0 <= lambda_min <= lambda_max:
        raise ConfigError(
            f"Token weights need 0 <= lambda_min <= lambda_max, got {lambda_min} and {lambda_max}. "
            "The paper uses 0.5 and 1."
        )
    if clip_percentile is not None and not 0 < clip_percentile <= 100:
        raise ConfigError(
            f"token_weights: clip_percentile must lie in (0, 100], got {clip_percentile}. Use 99.9 "
            "to tame sink tokens, or leave it out."
        )
    if salience.dim() != 2 or (valid is not None and valid.shape != salience.shape):
        mask = "none" if valid is None else list(valid.shape)
        raise ConfigError(
            f"token_weights got salience of shape {list(salience.shape)} and a valid mask of shape "
            f"{mask}. Both are [batch, tokens]."
        )
    if groups is None:
        return
    count = salience.shape[1]
    covered = sorted(token for part in groups for token in range(*part.indices(count)))
    if covered != list(range(count)):
        raise ConfigError(
            f"token_weights: the groups {groups} do not hold each of the {count} tokens exactly "
            "once. Pass one slice per stream, in total all tokens, or None for joint weights."
        )
