"""Opening a unit on a few rows of each weight: for timing steps.

Searching step sizes takes as long as there are rows, minutes for a wide block; what a step takes
does not depend on what was found. Layers are those a method foresees: factors of GPTQ, which take
as long for few rows as for all, are left out.
"""

import time
from collections.abc import Callable

from torch import Tensor, nn

from recon.engine.unit import LayerGroup, OpenUnit
from recon.layers.quant_linear import QuantLinear

ROWS = 32
"""Rows of each weight that are opened; twice as many are tried first, for the time of one."""


Open = Callable[[OpenUnit], dict[str, QuantLinear]]


class ThinOpening:
    """Stands for a method's `open_unit`: its layers have found values, repeated over the rows.

    Args:
        open_unit: Of the method.
        foreseen_layers: The same, which may call what stands for `open_unit`.
    """

    def __init__(self, open_unit: Open, foreseen_layers: Open) -> None:
        self._open_unit, self._foreseen_layers = open_unit, foreseen_layers
        self._thin = False
        self.spared = 0.0
        """Seconds that all rows would have taken beyond what was done."""

    def __call__(self, unit: OpenUnit) -> dict[str, QuantLinear]:
        """The layers, as wide as the unit's linears."""
        whole = {name: linear for group in unit.groups for name, linear in group.linears.items()}
        if self._thin or all(linear.out_features <= ROWS for linear in whole.values()):
            return self._open_unit(unit)
        twice, weights_of_twice, _ = self._opened(unit, 2 * ROWS)
        once, weights, layers = self._opened(unit, ROWS)
        rate = max(twice - once, 0.0) / max(weights_of_twice - weights, 1)
        everything = sum(linear.weight.numel() for linear in whole.values())
        self.spared = rate * (everything - weights) - twice
        for name, layer in layers.items():
            _repeat(layer, whole[name])
        return layers

    def _opened(self, unit: OpenUnit, rows: int) -> tuple[float, int, dict[str, QuantLinear]]:
        """Seconds, weights and layers of an opening on the first rows."""
        groups = [
            LayerGroup(
                group.name, group.role, {n: _first(m, rows) for n, m in group.linears.items()}
            )
            for group in unit.groups
        ]
        thin = OpenUnit(unit.unit, groups, unit.teacher_blocks, unit.record)
        started = time.monotonic()
        self._thin = True
        layers = self._foreseen_layers(thin)
        self._thin = False
        seconds = time.monotonic() - started
        weights = sum(
            linear.weight.numel() for group in groups for linear in group.linears.values()
        )
        return seconds, weights, layers


def _first(linear: nn.Linear, rows: int) -> nn.Linear:
    made = nn.Linear(linear.in_features, min(rows, linear.out_features), False, device="meta")
    made.weight = nn.Parameter(linear.weight.detach()[:rows], requires_grad=False)
    return made


def _repeat(layer: QuantLinear, linear: nn.Linear) -> None:
    """Gives a layer on the first rows of `linear` all of them."""
    first, rows = layer.out_features, linear.out_features
    layer.out_features = rows
    layer.teacher_weight = linear.weight.detach()
    assert layer.rounding is not None
    for part in layer.rounding.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.ndim and parameter.shape[0] == first:
                part._parameters[name] = nn.Parameter(_repeated(parameter.detach(), rows))
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.ndim and buffer.shape[0] == first:
                part._buffers[name] = _repeated(buffer, rows)


def _repeated(tensor: Tensor, rows: int) -> Tensor:
    times = -(-rows // tensor.shape[0])
    return tensor.repeat(times, *(1 for _ in tensor.shape[1:]))[:rows].clone()
