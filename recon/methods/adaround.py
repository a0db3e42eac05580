"""AdaRound, block by block: whether each weight is rounded up or down is learned."""

from typing import Any

from torch import Tensor

from recon.engine.reconstruction import Reconstruction
from recon.engine.unit import OpenUnit
from recon.layers.quant_linear import QuantLinear
from recon.layers.rounding import AdaptiveRounding, rounding_penalty
from recon.losses.reconstruction import token_weighted_error
from recon.quantizers.affine import absmax_scale, weight_range
from recon.quantizers.ranges import mse_clip_ratio


class AdaRound(Reconstruction):
    """Learned rounding on fixed step sizes against the teacher's block outputs.

    Args:
        steps: Optimizer steps of each unit.
        lr: Of the rounding logits (Adam, constant).
        rounding_weight: Of the regulariser, summed over the unit's weights.
        **kwargs: Arguments of `Reconstruction`.

    Source: Nagel et al., arXiv 2004.10568, in the block-wise form of BRECQ (arXiv 2102.05426):
    lr 1e-3, weight 0.01, beta 20 to 2 after a fifth of the steps. Step sizes minimise the squared
    error of the weight over a grid.
    """

    def __init__(
        self,
        steps: int = 600,
        lr: float = 1e-3,
        rounding_weight: float = 0.01,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.steps, self.lr, self.rounding_weight = steps, lr, rounding_weight

    def unit_steps(self, samples: int) -> int:
        """The configured number, whatever the number of samples."""
        return self.steps

    def open_unit(self, unit: OpenUnit) -> dict[str, QuantLinear]:
        """Layers whose rounding starts exactly at the teacher's weight."""
        layers = {}
        for group in unit.groups:
            for name, module in group.linears.items():
                weight = module.weight.float()
                absmax = weight_range(weight, self.weight)
                scale = absmax_scale(absmax * mse_clip_ratio(weight, self.weight), self.weight)
                rounding = AdaptiveRounding(weight, scale, self.weight)
                layers[name] = QuantLinear(
                    module, self.weight, self.activation_spec(group.role), rounding=rounding
                )
        return layers

    def unit_loss(self, student: Tensor, teacher: Tensor, sample: int) -> dict[str, Tensor]:
        """Squared error of the block's tokens, summed over channels as in BRECQ."""
        channels = teacher.shape[-1]
        return {"mse": channels * token_weighted_error(student, teacher, None)}

    def regularizer(self, unit: OpenUnit, progress: float) -> dict[str, Tensor]:
        """Pulls every rounding to up or down, harder as the unit goes on."""
        penalty = rounding_penalty((q.rounding for q in unit.layers.values()), progress)
        return {} if penalty is None else {"round": self.rounding_weight * penalty}

    def parameter_groups(self, unit: OpenUnit) -> list[dict[str, Any]]:
        """The rounding logits, at a constant rate."""
        return [
            {
                "name": "rounding",
                "params": self._logits(unit),
                "lr": self.lr,
                "schedule": lambda progress: 1.0,
            }
        ]

    @staticmethod
    def _logits(unit: OpenUnit) -> list[Tensor]:
        roundings = (layer.rounding for layer in unit.layers.values())
        return [r.logits for r in roundings if isinstance(r, AdaptiveRounding)]
