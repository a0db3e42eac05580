"""The share of every token's own range that is kept, the same for all linears of an input."""

import torch
from torch import Tensor, nn

from recon.quantizers.affine import clamp_ste, fake_quantize_tokens
from recon.quantizers.spec import QuantSpec


class TokenRange(nn.Module):
    """Quantises each token on a grid of its own, whose range is shrunk by one ratio.

    Args:
        ratio: Share of the range, positive; above 1 the range is wider than the token's.
        spec: Strategy token.
        bounds: Of the logarithm of a learned factor on the ratio; None: nothing is learned.

    Source: Q-VLM's learned ranges, exp(theta) times the searched range, on dynamic ranges.
    """

    ratio: Tensor

    def __init__(
        self, ratio: float, spec: QuantSpec, *, bounds: tuple[float, float] | None = None
    ) -> None:
        super().__init__()
        self.spec, self._bounds = spec, bounds
        self.register_buffer("ratio", torch.tensor(ratio))
        self.log_factor = None if bounds is None else nn.Parameter(torch.zeros(()))

    def move(self, ratio: float) -> None:
        """Takes another ratio."""
        self.ratio.fill_(ratio)

    def clip(self) -> Tensor:
        """Ratios of a token's maximum and minimum that are kept, [2]."""
        ratio = self.ratio
        if self.log_factor is not None and self._bounds is not None:
            ratio = ratio * clamp_ste(self.log_factor, *self._bounds).exp()
        return ratio.expand(2)

    def forward(self, inputs: Tensor) -> Tensor:
        """Inputs [..., channels] on their grids, float32."""
        return fake_quantize_tokens(inputs.float(), self.spec, self.clip())
