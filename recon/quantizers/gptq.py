"""GPTQ: each column's rounding error is compensated in the columns that follow.

Source: Frantar et al., arXiv 2210.17323, algorithm 1.
"""

import logging

import torch
from torch import Tensor

from recon.errors import ConfigError, NumericsError
from recon.quantizers.affine import check_group_size, compute_dtype
from recon.quantizers.spec import QuantSpec

logger = logging.getLogger(__name__)

MAX_DAMPING = 1.0
"""Where retries end: at a full mean diagonal, GPTQ is close to plain rounding anyway."""

_DAMPING_STEP = 10.0
_FIRST_RETRY = 0.01


def gptq_codes(
    weight: Tensor,
    gram: Tensor,
    scale: Tensor,
    spec: QuantSpec,
    block_size: int = 128,
    damping: float = 0.01,
) -> Tensor:
    """Integer codes [out, in_] in a float tensor that keep weight @ x close, not the weight.

    Columns go from first to last (no act-order). With a diagonal gram the codes equal those of
    plain rounding. Columns that no input ever excited are rounded plainly. The factorisation is
    done in float64; should it fail, damping grows tenfold up to 1, and the log says so.

    Args:
        weight: [out, in_].
        gram: Sum or mean of x^T x over the inputs, [in_, in_]; its overall factor has no effect.
        scale: Positive and fixed, [out, 1], [out, groups] or [1, 1].
        spec: Gives the strategy and the ends of the codes.
        block_size: Columns between two updates of all following columns; affects speed only.
        damping: Added to the diagonal, as a share of its mean.

    Raises:
        ConfigError: gram, scale, block_size or damping do not fit.
        NumericsError: weight or gram is not finite, or gram is not positive even when damped.

    Source: arXiv 2210.17323, algorithm 1. Deviates: excited columns only count in the mean
    diagonal, and dead columns keep their rounded weight where the authors' code writes zero: an
    input that was zero in calibration need not be zero later.
    """
    _check(weight, gram, scale, spec, block_size, damping)
    with torch.no_grad():
        dtype = compute_dtype(weight)
        inverse_factor = _inverse_factor(gram.to(torch.float64), damping).to(dtype)
        # Transposed: a column of the weight becomes contiguous, and the loop touches columns.
        columns = weight.to(dtype).t().contiguous()
        scales = scale.to(dtype).t().contiguous()  # [1 or groups, out or 1]
        return _round_columns(columns, inverse_factor, scales, spec, block_size).t().contiguous()


def _round_columns(
    columns: Tensor, inverse_factor: Tensor, scales: Tensor, spec: QuantSpec, block_size: int
) -> Tensor:
    """Codes [in_, out] of the columns [in_, out], which are overwritten.

    Within a block every column updates the rest of the block; behind it, all errors of the block
    are applied in one matrix product.
    """
    in_features = columns.shape[0]
    group_size = spec.group_size or in_features
    found = torch.empty_like(columns)
    diagonal = inverse_factor.diagonal()
    for start in range(0, in_features, block_size):
        end = min(start + block_size, in_features)
        errors = torch.empty_like(columns[start:end])
        for column in range(start, end):
            scale = scales[column // group_size]
            value = columns[column]
            code = (value / scale).round().clamp(spec.qmin, spec.qmax)
            found[column] = code
            error = (value - code * scale) / diagonal[column]
            errors[column - start] = error
            if column + 1 < end:
                row = inverse_factor[column, column + 1 : end]
                columns[column + 1 : end].addr_(row, error, alpha=-1)
        if end < in_features:
            columns[end:].addmm_(inverse_factor[start:end, end:].t(), errors, alpha=-1)
    return found


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """Upper triangular U with U^T U = (gram + damping)^-1, up to a factor that cancels.

    Reversing the order of the columns turns the lower Cholesky factor into an upper one, R R^T =
    gram, and U is R^-1: one factorisation and one triangular solve, where inverting first and
    factorising the inverse needs three and loses digits.

    Raises:
        NumericsError: No damping up to the bound makes the gram positive.
    """
    diagonal = gram.diagonal()
    if bool((diagonal < 0).any()):
        # A negative mean would flip the sign of the whole gram and hide what is wrong.
        raise NumericsError(
            f"The gram's diagonal goes down to {float(diagonal.min()):g}, but sums of squares are "
            "not negative. Check that it is x^T x of this layer's inputs, or set gptq: false."
        )
    dead = diagonal == 0
    if bool(dead.all()):
        return torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    # Division by the mean makes damping relative and the overall factor irrelevant.
    normal = gram / diagonal[~dead].mean()
    normal.diagonal().masked_fill_(dead, 1.0)
    identity = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    tried = damping
    while True:
        reverse = (normal + tried * identity).flip(0, 1)
        lower, info = torch.linalg.cholesky_ex(reverse)
        if int(info) == 0 and bool(torch.isfinite(lower.diagonal()).all()):
            break
        raised = max(tried * _DAMPING_STEP, _FIRST_RETRY)
        if raised > MAX_DAMPING:
            raise NumericsError(
                f"The gram of {gram.shape[0]} inputs is not positive with damping {tried:g} of its "
                f"mean diagonal (asked for {damping:g}, bound {MAX_DAMPING:g}). Check that it is "
                "x^T x of finite inputs, gathered in float32 or float64, or set gptq: false."
            )
        logger.warning("GPTQ: gram not positive with damping %g, retrying with %g.", tried, raised)
        tried = raised
    upper = lower.flip(0, 1)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


def _check(
    weight: Tensor, gram: Tensor, scale: Tensor, spec: QuantSpec, block_size: int, damping: float
) -> None:
    rows, in_features = weight.shape
    if gram.shape != (in_features, in_features):
        raise ConfigError(
            f"gptq_codes got a gram of shape {list(gram.shape)} for a weight with {in_features} "
            f"inputs. Pass x^T x of this layer's own inputs, [{in_features}, {in_features}]."
        )
    check_group_size(in_features, spec)
    groups = in_features // spec.group_size if spec.group_size else 1
    if scale.dim() != 2 or scale.shape[0] not in (1, rows) or scale.shape[1] != groups:
        raise ConfigError(
            f"gptq_codes got a scale of shape {list(scale.shape)}, strategy {spec.strategy} needs "
            f"[{rows}, {groups}]. Compute it with absmax_scale(weight_range(weight, spec), spec)."
        )
    if block_size < 1:
        raise ConfigError(f"gptq_codes: block_size must be at least 1, got {block_size}. Use 128.")
    if not 0 <= damping <= MAX_DAMPING:
        raise ConfigError(
            f"gptq_codes: damping must lie in [0, {MAX_DAMPING:g}], got {damping}. It is a share "
            "of the mean diagonal: 0.01 is the paper's value."
        )
    for name, tensor in (("weight", weight), ("gram", gram)):
        if not bool(torch.isfinite(tensor).all()):
            raise NumericsError(
                f"gptq_codes: the {name} holds NaN or Inf. Look for the first unit whose inputs or "
                "loss are not finite; a gram of half-precision inputs must be summed in float32."
            )
