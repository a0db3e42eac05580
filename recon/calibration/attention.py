"""How much attention each token receives, exactly and in memory linear in the tokens.

The column sum of token j is S_j = Σ_heads Σ_queries A[head, query, j], with A the softmax of the
attention. A itself, [heads, tokens, tokens], is never formed: the output of attention is O = A V,
so the gradient of the sum of O with respect to V is Aᵀ·1 in every channel, and the backward of a
fused attention kernel gives it.

Source: S²Q-VDiT, eq. 11 (S_j); the gradient form is ours.
"""

import warnings
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from recon.errors import CapabilityMissing

FUSED = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
]
"""Kernels that do not form the attention matrix."""

NO_KERNEL = ("No available kernel", "No viable backend")
"""How torch says, on a GPU and on a CPU, that none of the allowed kernels serves."""

CHUNK = 256
"""Queries at a time where no fused kernel serves: memory batch · heads · 256 · tokens floats."""

_P = ParamSpec("_P")


def column_sums(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    queries: Tensor | None = None,
) -> Tensor:
    """Attention that each key receives, summed over heads and queries: float32 [batch, keys].

    Uses the backward of a fused kernel; where none serves these arguments, softmax over chunks of
    queries. Of a low-precision input only the rounding of the result of each head shows (about
    5e-3 in bfloat16).

    Args:
        query: [batch, heads, queries, channels], as the attention call gets it.
        key: [batch, key_heads, keys, channels]; key_heads divides heads (grouped queries).
        attn_mask: Boolean (True: attend) or additive, broadcastable to [batch, heads, queries,
            keys].
        is_causal: Queries attend to keys up to their own place.
        scale: Factor of the logits; 1/sqrt(channels) if None.
        queries: Bool [batch, queries]; False leaves a query out of the sum (padding).
    """
    with torch.inference_mode(False), torch.enable_grad():
        mask = None if attn_mask is None else _plain(attn_mask)
        query, key = _plain(query), _plain(_expand_groups(query, key))
        try:
            return _by_gradient(query, key, mask, is_causal, scale, queries)
        except RuntimeError as error:
            # The only way to learn that no fused kernel serves is to ask for one.
            if not str(error).startswith(NO_KERNEL):
                raise
    return column_sums_chunked(
        query, key, attn_mask, is_causal=is_causal, scale=scale, queries=queries
    )


def column_sums_chunked(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    queries: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """The same as `column_sums`, by an explicit float32 softmax over chunks of queries.

    Args:
        query: As for `column_sums`.
        key: As for `column_sums`.
        attn_mask: As for `column_sums`.
        is_causal: As for `column_sums`.
        scale: As for `column_sums`.
        queries: As for `column_sums`.
        chunk: Queries at a time.
    """
    batch, _, n_queries, channels = query.shape
    n_keys = key.shape[-2]
    scale = channels**-0.5 if scale is None else scale
    keep = _kept(query, queries)
    total = torch.zeros(batch, n_keys, dtype=torch.float32, device=query.device)
    with torch.no_grad():
        columns = _expand_groups(query, key).float().transpose(-1, -2)
        for start in range(0, n_queries, chunk):
            rows = slice(start, min(start + chunk, n_queries))
            logits = (query[:, :, rows].float() * scale) @ columns
            if is_causal:
                attn_mask = _causal(rows, n_keys, query.device)
                logits = _masked(logits, attn_mask, slice(None))
            elif attn_mask is not None:
                logits = _masked(logits, attn_mask, rows)
            # A query that may attend to nothing gives 0/0; it attends to nothing.
            attention = logits.softmax(-1).nan_to_num(0.0)
            total += (attention * keep[:, None, rows, None]).sum((1, 2))  # over heads, queries
    return total


class AttentionColumnSums(TorchFunctionMode):
    """Within it, scaled-dot-product calls leave their column sums behind.

    ```
    with AttentionColumnSums(tokens=n) as attention, torch.no_grad():
        after = adapter.forward_block(block, before)
    S = attention.sums()  # float32 [batch, n]
    ```

    The calls themselves are made unchanged, so the block's output is bit for bit what it is
    without. Queries and keys are seen as the kernel gets them: after normalisation and rotary
    embedding. Only calls with `tokens` queries and as many keys count, which leaves out
    cross-attention to a text of another length.

    Args:
        tokens: Tokens the block attends over.
        queries: Bool [batch, tokens]; False leaves a query out of the sum (padding).
    """

    def __init__(self, tokens: int, queries: Tensor | None = None) -> None:
        super().__init__()
        self.tokens = tokens
        self.queries = queries
        self._found: list[Tensor] = []
        self._other: list[tuple[int, int]] = []

    def __torch_function__(
        self,
        func: Callable[_P, Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is nn.functional.scaled_dot_product_attention:
            self._see(*args, **kwargs)
        return result

    def sums(self) -> Tensor:
        """Column sums of the block's one attention over its tokens: float32 [batch, tokens].

        Raises:
            CapabilityMissing: The block made no such call, or several.
        """
        if len(self._found) != 1:
            raise CapabilityMissing(
                f"The block made {len(self._found)} scaled-dot-product calls over its "
                f"{self.tokens} tokens, and others with (queries, keys) = {self._other}; token "
                "weights need exactly one. Use the native attention processor of the family "
                "(torch scaled_dot_product_attention), or set token_weights: none."
            )
        return self._found[0]

    def _see(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        shape = (query.shape[-2], key.shape[-2])
        if shape != (self.tokens, self.tokens):
            self._other.append(shape)
            return
        self._found.append(
            column_sums(
                query, key, attn_mask, is_causal=is_causal, scale=scale, queries=self.queries
            )
        )


def _by_gradient(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    queries: Tensor | None,
) -> Tensor:
    # The numbers in V do not matter. Its width must be that of the keys: with a narrower V the
    # fused kernels refuse and attention falls back to one that forms the whole matrix.
    value = torch.zeros_like(key).requires_grad_()
    with warnings.catch_warnings(), sdpa_kernel(FUSED):
        warnings.simplefilter("ignore")  # each kernel that does not serve warns
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, is_causal=is_causal, scale=scale
        )
    rows = _kept(query, queries)[:, None, :, None].to(out.dtype)
    (gradient,) = torch.autograd.grad(out, value, rows.expand_as(out).contiguous())
    return gradient[..., 0].float().sum(1)  # over heads


def _plain(tensor: Tensor) -> Tensor:
    """The tensor without history; a copy if autograd may not keep it."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _expand_groups(query: Tensor, key: Tensor) -> Tensor:
    """Keys repeated for every query head of their group: no fused kernel of a CPU groups."""
    groups = query.shape[1] // key.shape[1]
    return key if groups == 1 else key.repeat_interleave(groups, dim=1)


def _kept(query: Tensor, queries: Tensor | None) -> Tensor:
    """1 for queries that count, 0 for the others: float32 [batch, queries]."""
    if queries is None:
        return torch.ones(query.shape[0], query.shape[2], device=query.device)
    return queries.to(device=query.device, dtype=torch.float32)


def _causal(rows: slice, n_keys: int, device: torch.device) -> Tensor:
    """Bool [rows, keys]: the key does not come after the query."""
    places = torch.arange(rows.start, rows.stop, device=device)
    return places[:, None] >= torch.arange(n_keys, device=device)


def _masked(logits: Tensor, mask: Tensor, rows: slice) -> Tensor:
    if mask.dim() > 1 and mask.shape[-2] > 1:  # else it broadcasts over queries
        mask = mask[..., rows, :]
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, -torch.inf)
    return logits + mask.float()
