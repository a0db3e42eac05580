from pathlib import Path

import torch
from torch import Tensor

from recon.calibration.operands import recorded_operands
from recon.calibration.statistics import UnitRecord
from recon.models.dit import DiT
from tests.models.tiny import tiny_image_sample, write_tiny_dit

TOKENS = 6


@torch.no_grad()
def test_operands_are_recorded_and_the_block_puts_out_the_same_bits(tmp_path: Path) -> None:
    adapter = DiT(str(write_tiny_dit(tmp_path)))
    (name, *_), record = adapter.block_names, UnitRecord()
    block = adapter.block(name, "cpu")
    states = [adapter.embed(tiny_image_sample(adapter.config, 2, seed), "cpu") for seed in (0, 1)]
    projected: dict[str, list[Tensor]] = {}
    handles = [
        block.get_submodule(f"attn1.{linear}").register_forward_hook(
            lambda _, __, output, linear=linear: projected.setdefault(linear, []).append(output)
        )
        for linear in ("to_q", "to_k", "to_v")
    ]
    expected = [adapter.forward_block(block, state)["hidden_states"] for state in states]
    projected.clear()
    with recorded_operands(adapter, block, name, record, TOKENS):
        found = [adapter.forward_block(block, state)["hidden_states"] for state in states]
    for handle in handles:
        handle.remove()
    after = [adapter.forward_block(block, state)["hidden_states"] for state in states]
    for one, two, three in zip(expected, found, after, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert len(record.tokens[f"{name}.attn1.query"]) == 2  # nothing is recorded any more

    heads, channels = 2, 16
    query, key, value = (
        torch.cat(projected[n]).unflatten(-1, (heads, channels)).transpose(1, 2)
        for n in ("to_q", "to_k", "to_v")
    )
    query = query / channels**0.5
    softmax = (query @ key.mT).softmax(-1)
    plain = {"query": query, "key": key, "value": value, "probability": softmax}
    for operand, tensor in plain.items():
        own = f"{name}.attn1.{operand}"
        rows = tensor.reshape(-1, tensor.shape[-1])
        torch.testing.assert_close(record.lowest[own], rows.amin(0))
        torch.testing.assert_close(record.highest[own], rows.amax(0))
        assert [t.shape for t in record.tokens[own]] == [(TOKENS, rows.shape[-1])] * 2
        torch.testing.assert_close(record.tokens[own][0][0], rows[0])
