"""SmoothQuant: part of the inputs' range is moved into the weights, then round-to-nearest."""

from typing import Any

from recon.engine.reconstruction import Reconstruction
from recon.engine.unit import OpenUnit
from recon.errors import ConfigError
from recon.layers.quant_linear import QuantLinear
from recon.layers.transform import InputTransform
from recon.quantizers.transforms import smoothing_scale


class SmoothQuant(Reconstruction):
    """Inputs times s_j = max|W_j|^(1-alpha) / max|X_j|^alpha, weights divided by it.

    Args:
        alpha: Share of the difficulty moved from inputs to weights, in [0, 1].
        **kwargs: Arguments of `Reconstruction`.

    Source: Xiao et al., arXiv 2211.10438, eq. 4, alpha 0.5. Deviates: the scale is applied to the
    input at run time where the paper folds it into the layer before, which changes no number.
    """

    def __init__(self, alpha: float = 0.5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= alpha <= 1:
            raise ConfigError(f"model.alpha must lie in [0, 1], got {alpha}.")
        self.alpha = alpha

    def open_unit(self, unit: OpenUnit) -> dict[str, QuantLinear]:
        """Round-to-nearest layers behind a fixed channel scale, one per shared input."""
        layers = {}
        for group in unit.groups:
            heaviest = [w.weight.float().abs().amax(dim=0) for w in group.linears.values()]
            weight_absmax = heaviest[0].clone()
            for other in heaviest[1:]:
                weight_absmax = weight_absmax.maximum(other)
            scale = smoothing_scale(unit.record.absmax[group.name], weight_absmax, self.alpha)
            transform = InputTransform(scale, learn_scale=False)
            for name, module in group.linears.items():
                layers[name] = QuantLinear(
                    module, self.weight, self.activation_spec(group.role), transform=transform
                )
        return layers
