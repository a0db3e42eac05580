"""GPTQ: column by column, the error of rounding is passed on to the columns not yet rounded."""

from recon.engine.reconstruction import Reconstruction
from recon.engine.unit import OpenUnit
from recon.quantizers.gptq import gptq_codes


class GPTQ(Reconstruction):
    """Second-order rounding of each linear on absmax ranges; inputs per token.

    Source: Frantar et al., arXiv 2210.17323: column blocks of 128, damping 0.01, no act-order.
    Deviates: the Hessian is that of the teacher's inputs, so that the pass that records targets
    also records it; the paper's is that of the quantised prefix.
    """

    @property
    def wants_gram(self) -> bool:
        """The Hessian."""
        return True

    def close_unit(self, unit: OpenUnit) -> None:
        """Codes of every layer from its weight and the Gram matrix of its inputs."""
        for group in unit.groups:
            gram = unit.record.gram[group.name]
            for name in group.linears:
                layer = unit.layers[name]
                weight = layer.fold()
                assert layer.rounding is not None
                scale = layer.rounding.scale(weight)
                layer.close(gptq_codes(weight, gram, scale, self.weight), scale)
