"""Attention column sums against an explicit softmax. Source: S²Q-VDiT, eq. 11."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from recon.calibration.attention import AttentionColumnSums, column_sums, column_sums_chunked
from recon.errors import CapabilityMissing
from recon.models.cogvideox import CogVideoX
from tests.models.tiny import tiny_sample, write_tiny_cogvideox

FUNCTIONS = {"gradient": column_sums, "chunked": column_sums_chunked}


def reference(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    queries: Tensor | None = None,
) -> Tensor:
    """S_j = Σ_h Σ_i A[h, i, j] in float64, A formed."""
    query, key = query.double(), key.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = (
            logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        )
    attention = logits.softmax(-1).nan_to_num(0.0)
    if queries is not None:
        attention = attention * queries[:, None, :, None]
    return attention.sum((1, 2))


def heads(
    n: int = 37, n_keys: int | None = None, h: int = 4, kv: int | None = None, d: int = 16
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(2, h, n, d, generator=generator)
    return query, 2 * torch.randn(2, kv or h, n_keys or n, d, generator=generator)


@pytest.fixture(params=FUNCTIONS)
def sums(request: pytest.FixtureRequest) -> Any:
    return FUNCTIONS[request.param]


def near(found: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=1e-6)


def test_column_sums_are_those_of_the_softmax(sums: Any) -> None:
    query, key = heads()
    found = sums(query, key)
    near(found, reference(query, key))
    torch.testing.assert_close(found.sum(-1), torch.full((2,), 4.0 * 37))  # ΣS = H·n


def test_column_sums_in_bfloat16(sums: Any) -> None:
    query, key = (tensor.bfloat16() for tensor in heads())
    near(sums(query, key), reference(query, key), rtol=1e-2)


def test_every_channel_of_the_gradient_is_the_column_sum() -> None:
    query, key = heads()
    value = torch.randn_like(key).requires_grad_()
    out = functional.scaled_dot_product_attention(query, key, value)
    (gradient,) = torch.autograd.grad(out.sum(), value)
    for channel in gradient.unbind(-1):
        near(channel.sum(1), reference(query, key), rtol=2e-6)


def test_grouped_queries(sums: Any) -> None:
    query, key = heads(h=6, kv=2)
    found = sums(query, key)
    near(found, reference(query, key))
    torch.testing.assert_close(found.sum(-1), torch.full((2,), 6.0 * 37))


@pytest.mark.parametrize("kind", ["key padding", "full", "additive", "two-dimensional"])
def test_masks(sums: Any, kind: str) -> None:
    query, key = heads(h=4, kv=2)
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(2, 4, 37, 37, generator=generator) > 0.3
    mask = {
        "key padding": torch.arange(37)[None, None, None]
        < torch.tensor([30, 37])[:, None, None, None],
        "full": keep,
        "additive": torch.where(keep, 0.0, -3.0),
        "two-dimensional": keep[0, 0],
    }[kind]
    found = sums(query, key, mask)
    near(found, reference(query, key, mask), rtol=2e-6)
    if kind == "key padding":
        assert (found[0, 30:] == 0).all()


def test_padded_queries_are_left_out_also_if_they_attend_to_nothing(sums: Any) -> None:
    query, key = heads()
    real = torch.arange(37)[None] < torch.tensor([30, 37])[:, None]
    near(sums(query, key, queries=real), reference(query, key, queries=real))
    mask = real[:, None, :, None] & real[:, None, None, :]
    found = sums(query, key, mask, queries=real)
    near(found, reference(query, key, mask, queries=real))
    torch.testing.assert_close(found.sum(-1), 4.0 * real.sum(-1).float())


def test_causal_scaled_and_rectangular_calls(sums: Any) -> None:
    query, key = heads()
    causal = torch.ones(37, 37, dtype=torch.bool).tril()
    near(sums(query, key, is_causal=True), reference(query, key, causal))
    near(sums(query, key, scale=0.1), reference(query, key, scale=0.1))
    query, key = heads(n=37, n_keys=50)
    near(sums(query, key), reference(query, key))


@pytest.mark.parametrize("chunk", [1, 10, 37, 100])
def test_chunks_of_any_size_agree(chunk: int) -> None:
    query, key = heads()
    mask = torch.rand(37, 37, generator=torch.Generator().manual_seed(1)) > 0.3
    near(column_sums_chunked(query, key, mask, chunk=chunk), reference(query, key, mask))
    causal = column_sums_chunked(query, key, is_causal=True, chunk=chunk)
    near(causal, column_sums(query, key, is_causal=True), rtol=2e-6)


def test_the_gradient_is_taken_by_a_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("fell back to chunks")

    monkeypatch.setattr("recon.calibration.attention.column_sums_chunked", fail)
    for kv in (4, 2):
        query, key = heads(h=4, kv=kv)
        column_sums(query, key)
        column_sums(query, key, torch.ones(37, 37, dtype=torch.bool))
        column_sums(query.bfloat16(), key.bfloat16())


def test_where_no_fused_kernel_serves_chunks_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recon.calibration.attention.FUSED", [])
    query, key = heads()
    near(column_sums(query, key), reference(query, key))


def test_under_no_grad_and_inference_mode() -> None:
    query, key = heads()
    mask = torch.ones(37, 37, dtype=torch.bool).tril()
    expected = reference(query, key, mask)
    with torch.no_grad():
        near(column_sums(query, key, mask), expected)
    with torch.inference_mode():
        near(column_sums(query * 1, key * 1, mask & mask), expected)
    assert not column_sums(query.requires_grad_(), key).requires_grad


@pytest.mark.parametrize("rotary", [False, True])
def test_a_block_shows_its_sums_and_its_output_is_unchanged(tmp_path: Path, rotary: bool) -> None:
    adapter = CogVideoX(str(write_tiny_cogvideox(tmp_path, rotary=rotary)))
    state = adapter.embed(tiny_sample(adapter.config, 2), "cpu")
    block = adapter.block("transformer_blocks.0", "cpu")
    expected = adapter.forward_block(block, state)
    real = adapter.attention_tokens(state)
    with AttentionColumnSums(real.shape[1], real) as attention, torch.no_grad():
        after = adapter.forward_block(block, state)
    assert all(torch.equal(after[key], expected[key]) for key in expected)
    assert attention.sums().shape == real.shape
    assert not attention.sums().requires_grad
    torch.testing.assert_close(attention.sums().sum(-1), torch.full((2,), 2.0 * real.shape[1]))
    near(attention.sums(), explicit_sums(block, adapter, state), rtol=2e-6)
    # another hold on the same block, outside the context: nothing is left behind
    adapter.forward_block(block, state)
    assert attention.sums().shape == real.shape


def explicit_sums(block: Any, adapter: CogVideoX, state: dict[str, Tensor]) -> Tensor:
    """Column sums from the block's parts: modulation, projections, norms, rotary embedding."""
    from diffusers.models.embeddings import apply_rotary_emb

    video, text, *_ = block.norm1(
        state["hidden_states"], state["encoder_hidden_states"], state["temb"]
    )
    hidden = torch.cat([text, video], dim=1)
    parts = []
    for linear, norm in (
        (block.attn1.to_q, block.attn1.norm_q),
        (block.attn1.to_k, block.attn1.norm_k),
    ):
        part = norm(linear(hidden).unflatten(-1, (2, 16)).transpose(1, 2))
        if "rotary_cos" in state:
            rotary = (state["rotary_cos"][0], state["rotary_sin"][0])
            turned = apply_rotary_emb(part[:, :, text.shape[1] :], rotary)
            part = torch.cat([part[:, :, : text.shape[1]], turned], dim=2)
        parts.append(part)
    return reference(*parts)


def test_no_call_or_several_calls_are_refused() -> None:
    query, key = heads()
    with AttentionColumnSums(37) as attention:
        functional.scaled_dot_product_attention(query, *heads(n=5, h=4)[1:] * 2)
    with pytest.raises(CapabilityMissing, match=r"made 0 scaled-dot-product .* = \[\(37, 5\)\]"):
        attention.sums()
    with AttentionColumnSums(37) as attention:
        for _ in range(2):
            functional.scaled_dot_product_attention(query, key, key)
    with pytest.raises(CapabilityMissing, match="made 2 scaled-dot-product calls over its 37 tok"):
        attention.sums()


def test_grouped_calls_and_masks_are_seen() -> None:
    query, key = heads(h=4, kv=2)
    mask = torch.ones(37, 37, dtype=torch.bool).tril()
    with AttentionColumnSums(37) as attention:
        functional.scaled_dot_product_attention(query, key, key, attn_mask=mask, enable_gqa=True)
    near(attention.sums(), reference(query, key, mask))
