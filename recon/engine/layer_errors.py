"""Error of each quantised layer alone, on the held-out inputs that reach it."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from recon.calibration import ranks
from recon.layers.quant_linear import QuantLinear


class LayerErrors:
    """Relative squared errors ‖Q(x) − W x‖² / ‖W x‖² of linears, summed over tokens and samples.

    x is what reaches the layer behind the quantised layers before it, the same for the layer as it
    was closed and for the one rounded to nearest. So an error is the layer's own, of its weight and
    of its input; those before it are in the unit's error.

    Args:
        teachers: The full-precision linears, by full dotted name.
        layers: The closed layers that stand for them.
        nearest: The same linears rounded to nearest.
    """

    def __init__(
        self,
        teachers: Mapping[str, nn.Linear],
        layers: Mapping[str, QuantLinear],
        nearest: Mapping[str, QuantLinear],
    ) -> None:
        self._teachers, self._layers, self._nearest = teachers, layers, nearest
        self._sums = {name: torch.zeros(3, dtype=torch.float64) for name in layers}

    @contextmanager
    def observed(self, sample: int) -> Iterator[None]:
        """Adds what the closed layers see and put out while the context is open."""
        with ExitStack() as stack:
            for name, layer in self._layers.items():
                handle = layer.register_forward_hook(
                    lambda _module, arguments, output, name=name: self._add(
                        name, arguments[0], output
                    )
                )
                stack.callback(handle.remove)
            yield

    def _add(self, name: str, inputs: Tensor, output: Tensor) -> None:
        teacher = self._teachers[name]
        exact = teacher(inputs)
        product = exact if teacher.bias is None else exact - teacher.bias
        found = [_power(self._nearest[name](inputs) - exact), _power(output - exact)]
        self._sums[name] += torch.stack([*found, _power(product)]).cpu()

    def reduced(self, device: torch.device) -> dict[str, dict[str, float]]:
        """`error_before` (rounded to nearest) and `error_after` of each layer, over all processes.

        A layer whose product is zero throughout has no relative error and is left out.

        Args:
            device: Where the processes reduce.
        """
        sums = ranks.total(torch.stack(list(self._sums.values())).to(device)).tolist()
        return {
            name: {"error_before": nearest / power, "error_after": closed / power}
            for name, (nearest, closed, power) in zip(self._sums, sums, strict=True)
            if power > 0
        }


def _power(values: Tensor) -> Tensor:
    """Sum of squares, float64."""
    return values.float().square().sum(dtype=torch.float64)
