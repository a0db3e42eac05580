"""What one full-precision pass over a unit records about the inputs of its linears."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from recon.calibration import ranks
from recon.errors import NumericsError
from recon.layers.patches import patches


@dataclass
class UnitRecord:
    """Statistics of a unit's input groups, keyed by the group's first linear.

    Operands of attention products have theirs as `<attention>.query` and so on.

    Sums run over all calibration samples and tokens of all processes.
    """

    absmax: dict[str, Tensor] = field(default_factory=dict)
    """Largest magnitude per channel, [channels], float32."""
    absmax_rows: dict[str, Tensor] = field(default_factory=dict)
    """The same apart for each timestep or sample, [rows, channels]; rows are the method's."""
    lowest: dict[str, Tensor] = field(default_factory=dict)
    """Smallest value per channel, [channels]; only where tokens are kept."""
    highest: dict[str, Tensor] = field(default_factory=dict)
    """Largest value per channel, [channels]; only where tokens are kept."""
    tokens: dict[str, list[Tensor]] = field(default_factory=dict)
    """Some tokens of each of this process's samples, [tokens, channels] each."""
    gram: dict[str, Tensor] = field(default_factory=dict)
    """Sum of x xᵀ over tokens, [channels, channels], float64 while recording."""
    salience: dict[int, Tensor] = field(default_factory=dict)
    """Attention column sums S of each of this process's samples, [batch, tokens]."""

    def see(
        self, name: str, inputs: Tensor, *, row: tuple[int, int] | None = None, tokens: int = 0
    ) -> None:
        """Adds the maxima of `inputs` [..., channels], and some of its tokens.

        Args:
            name: Key of the statistics.
            inputs: All tokens of one forward.
            row: Index of the row of `absmax_rows` that this forward belongs to, and their number.
            tokens: How many tokens are kept, evenly spaced, with both ends of every channel.
        """
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        absmax = rows.abs().amax(dim=0)  # over tokens
        known = self.absmax.get(name)
        self.absmax[name] = absmax if known is None else torch.maximum(known, absmax)
        if row is not None:
            table = self.absmax_rows.get(name)
            if table is None:
                table = self.absmax_rows[name] = absmax.new_zeros(row[1], len(absmax))
            table[row[0]] = torch.maximum(table[row[0]], absmax)
        if tokens:
            count = len(rows)
            spaced = torch.linspace(0, count - 1, min(tokens, count), device=rows.device).long()
            self.tokens.setdefault(name, []).append(rows[spaced])
            low, high = rows.aminmax(dim=0)  # over tokens
            before = self.lowest.get(name, low), self.highest.get(name, high)
            self.lowest[name] = torch.minimum(before[0], low)
            self.highest[name] = torch.maximum(before[1], high)

    def reduce(self) -> None:
        """Makes the statistics those of all processes; refuses values that are not finite."""
        for name, absmax in self.absmax.items():
            ranks.maximum(absmax)
            if not absmax.isfinite().all():
                raise NumericsError(
                    f"The input of {name} holds NaN or Inf on the full-precision path. Check the "
                    "teacher's weights and the calibration set; dtype float16 overflows in some "
                    "networks, bfloat16 does not."
                )
        for table in (*self.absmax_rows.values(), *self.highest.values()):
            ranks.maximum(table)
        for lowest in self.lowest.values():
            ranks.maximum(lowest.neg_()).neg_()
        for gram in self.gram.values():
            ranks.total(gram)


@contextmanager
def recorded_inputs(
    linears: Mapping[str, nn.Module],
    record: UnitRecord,
    *,
    with_gram: Iterable[str],
    row: tuple[int, int] | None = None,
    tokens: int = 0,
) -> Iterator[None]:
    """Adds what enters each of `linears` to `record` while the context is open.

    Args:
        linears: The first linear of each input group, by name; of a convolution over patches the
            input is what its patches hold.
        record: Filled in place.
        with_gram: Names whose Gram matrix is wanted too.
        tokens: How many tokens of each forward are kept, evenly spaced, with both ends of every
            channel over all tokens.
        row: Index of the row of `absmax_rows` that this forward belongs to, and their number.
    """
    wanted = set(with_gram)

    def observe(name: str, layer: nn.Module, inputs: Tensor) -> None:
        if isinstance(layer, nn.Conv2d):
            inputs = patches(inputs, (layer.kernel_size[0], layer.kernel_size[1]))
        record.see(name, inputs, row=row, tokens=tokens)
        if name in wanted:
            rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
            # One float32 product per sample, summed in float64: see recon.calibration.ranks.
            gram = (rows.T @ rows).double()
            known = record.gram.get(name)
            record.gram[name] = gram if known is None else known.add_(gram)

    handles = [
        linear.register_forward_pre_hook(
            lambda module, arguments, name=name: observe(name, module, arguments[0])
        )
        for name, linear in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
