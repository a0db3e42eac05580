"""GPTQ: column by column, the error of rounding is passed on to the columns not yet rounded."""

from recon.engine import walk
from recon.engine.reconstruction import Reconstruction
from recon.engine.unit import OpenUnit
from recon.quantizers.gptq import gptq_codes


class GPTQ(Reconstruction):
    """Second-order rounding of each linear on absmax ranges; inputs per token.

    The Hessian is that of `inputs`: behind the quantised prefix, as in the paper, or the
    teacher's.

    Source: Frantar et al., arXiv 2210.17323: column blocks of 128, damping 0.01, no act-order.
    Deviates: all linears of a block see the block as it was before any of them was rounded.
    """

    @property
    def wants_gram(self) -> bool:
        """The teacher's Hessian comes with the pass that records targets."""
        return self.inputs == "full_precision"

    def close_unit(self, unit: OpenUnit) -> None:
        """Codes of every layer from its weight and the Gram matrix of its inputs."""
        record = unit.record if self.wants_gram else walk.record_student(self, unit)
        for group in unit.groups:
            gram = record.gram[group.name]
            for name in group.linears:
                layer = unit.layers[name]
                weight = layer.fold()
                assert layer.rounding is not None
                scale = layer.rounding.scale(weight)
                layer.close(gptq_codes(weight, gram, scale, self.weight), scale)
