"""GPTQ as optimal brain quantisation writes it, column by column."""

import torch
from torch import Tensor


def gptq_by_columns(
    weight: Tensor, gram: Tensor, scales: Tensor, qmin: int, qmax: int, damping: float
) -> Tensor:
    """Codes [out, in_]; scales [out, in_] gives every entry its own scale.

    The inverse Hessian is kept whole and loses a row and a column by Gaussian elimination after
    every column: no Cholesky factor, no blocks.

    Source: Frantar et al., arXiv 2210.17323, eqs. 2 and 3.
    """
    weight = weight.clone()
    in_features = weight.shape[1]
    hessian = gram + damping * gram.diagonal().mean() * torch.eye(in_features, dtype=gram.dtype)
    inverse = torch.linalg.inv(hessian)
    codes = torch.zeros_like(weight)
    for column in range(in_features):
        scale = scales[:, column]
        codes[:, column] = (weight[:, column] / scale).round().clamp(qmin, qmax)
        pivot = inverse[column, column].clone()
        error = (weight[:, column] - codes[:, column] * scale) / pivot
        for later in range(column + 1, in_features):
            weight[:, later] -= error * inverse[column, later]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / pivot
    return codes
