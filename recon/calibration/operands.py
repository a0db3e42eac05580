"""What one full-precision pass records about the operands of attention products."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.nn import functional

from recon.calibration.statistics import UnitRecord
from recon.layers.quant_attention import probabilities, scaled
from recon.models.capabilities import ReplacesAttention


@contextmanager
def recorded_operands(
    adapter: ReplacesAttention, block: nn.Module, block_name: str, record: UnitRecord, tokens: int
) -> Iterator[None]:
    """Adds query, key, value and softmax of the block's attentions to `record` while it is open.

    The block puts out the same bits: its kernel is called as before, beside a softmax that is
    formed to be looked at.

    Args:
        adapter: Of the block.
        block: In full precision.
        block_name: In the network; the operands' keys begin with it.
        record: Filled in place.
        tokens: How many rows of each operand are kept per forward, over all heads.
    """

    def watching(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        left = scaled(query)
        operands = {
            "query": left,
            "key": key,
            "value": value,
            "probability": probabilities(left, key.float()),
        }
        for operand, tensor in operands.items():
            record.see(f"{name}.{operand}", tensor, tokens=tokens)
        return functional.scaled_dot_product_attention(query, key, value)

    names = adapter.attentions(block_name)
    for name in names:
        adapter.replace_attention(block, name, partial(watching, f"{block_name}.{name}"))
    try:
        yield
    finally:
        for name in names:
            adapter.replace_attention(block, name, None)
