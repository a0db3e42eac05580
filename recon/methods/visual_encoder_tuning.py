"""How the visual encoder is tuned in Q-VLM (arXiv 2410.08119, section 3.3).

The paper names neither what learns nor rates nor weights, and has no guard: those are ours.
"""

from dataclasses import dataclass
from typing import Literal

from recon.errors import ConfigError

Part = Literal["act_ranges", "norms", "weight_scales", "rounding", "weights"]


@dataclass(frozen=True)
class VisualEncoderTuning:
    """How the visual encoder is tuned.

    Raises:
        ConfigError: A number is out of range.
    """

    enabled: bool = False
    """Whether it is. Source: the paper tunes it; ours leaves it to be asked for."""
    params: tuple[Part, ...] = ("act_ranges", "norms")
    """What learns: shares of the ranges of activations, scales and shifts of norms, step sizes of
    weights, offsets of their rounding (SignRound, not in the paper), weights themselves. Ranges,
    step sizes and rounding are there where the encoder is quantised."""
    epochs: int = 10
    """Passes over the calibration set. Source: Q-VLM, implementation details."""
    answer_weight: float = 1.0
    """Of L_reg, the cross-entropy of the answers. With `answer_weight`, `entropy_weight` and
    `output_share` 0 the encoder is fitted to the teacher's features, and the language model is not
    run."""
    entropy_weight: float = 0.01
    """λ1. Source: quant_modules.py."""
    error_weight: float = 1.0
    """λ2."""
    output_share: float = 1.0
    """η: of the network's output in the error term, beside the encoder's."""
    lr: float = 1e-3
    """Of ranges, norms and step sizes (Adam, cosine to 0)."""
    weight_lr: float = 1e-5
    """Of weights."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    patience: int = 3
    """Epochs without a better result on held-out samples after which nothing is tuned any more."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name, least in (("epochs", 1), ("patience", 1), ("entropy_weight", 0.0)):
            self._refuse_below(name, least)
        for name in ("answer_weight", "error_weight", "output_share", "lr", "weight_lr", "clip"):
            self._refuse_below(name, 0.0)
        if not (self.answer_weight or self.error_weight):
            raise ConfigError(
                "model.veo.answer_weight and error_weight are both 0: held-out answers and errors "
                "judge the tuning. Raise one, or set model.veo.enabled: false."
            )
        if not self.params:
            raise ConfigError(
                "model.veo.params is empty. Name what learns: act_ranges, norms, weight_scales, "
                "rounding or weights; or set model.veo.enabled: false."
            )

    def _refuse_below(self, name: str, least: float) -> None:
        if getattr(self, name) < least:
            raise ConfigError(
                f"model.veo.{name} must be at least {least}, got {getattr(self, name)}."
            )
