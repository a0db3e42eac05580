"""The transform of a layer's input with dense matrices."""

import torch
from torch import Tensor


def kron_by_loop(left: Tensor, right: Tensor) -> Tensor:
    """Kronecker product [a*b, a*b], entry by entry.

    Source: the definition, (L (x) R)[i*b + k, j*b + l] = L[i, j] R[k, l].
    """
    a, b = left.shape[0], right.shape[0]
    result = torch.zeros(a * b, a * b, dtype=left.dtype)
    for i in range(a):
        for j in range(a):
            for k in range(b):
                for m in range(b):
                    result[i * b + k, j * b + m] = left[i, j] * right[k, m]
    return result


def balanced_split_by_search(width: int) -> tuple[int, int]:
    """The pair (p - q, p + q) with the smallest q, by trying every p and q.

    Source: FlatQuant (arXiv 2410.09426), a * b = p^2 - q^2.
    """
    for q in range(width):
        for p in range(q + 1, width + 1):
            if p * p - q * q == width:
                return p - q, p + q
    return 1, width
