"""What a quantiser is, apart from how it is computed."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from recon.errors import ConfigError

Strategy = Literal["tensor", "channel", "group", "token"]
ScaleDenominator = Literal["qmax", "half_range"]

MIN_BITS = 2
MAX_BITS = 8


@dataclass(frozen=True)
class QuantSpec:
    """Description of one integer quantiser, in the words of compressed-tensors.

    | strategy | shape of the scale | for |
    |---|---|---|
    | tensor | [1, 1] | weights, static activations |
    | channel | [out, 1]; [channels] of activations | weights, static activations |
    | group | [out, in_ / group_size] | weights |
    | token | [..., 1], from the token itself | activations |

    Raises:
        ConfigError: A field breaks the rule written below it.
    """

    num_bits: int = 4
    """Bits of one code, in [2, 8]; codes lie in [-2^(bits-1), 2^(bits-1) - 1], of an asymmetric
    quantiser in [0, 2^bits - 1]."""

    strategy: Strategy = "channel"
    """What shares one scale: the tensor, an output row, a group of inputs of a row, or a token."""

    group_size: int | None = None
    """Input channels that share a scale, at least 1; only with strategy group."""

    dynamic: bool = False
    """Whether the range is taken from the data at run time: always with strategy token, only
    there."""

    scale_denominator: ScaleDenominator = "qmax"
    """Scale of a range: qmax is absmax / (2^(bits-1) - 1), the papers' rule; half_range is
    absmax / ((2^bits - 1) / 2), the rule of compressed-tensors and torchao, lossless on export."""

    symmetric: bool = True
    """Whether zero is the middle of the range. False, with a zero-point, only for activations with
    strategy tensor or channel, and for weights with strategy channel, which native files hold:
    asymmetric int4 weights do not reload in transformers."""

    def __post_init__(self) -> None:
        """Refuse what no quantiser here can compute."""
        if not MIN_BITS <= self.num_bits <= MAX_BITS:
            raise ConfigError(
                f"QuantSpec.num_bits must lie in [{MIN_BITS}, {MAX_BITS}], got {self.num_bits}. "
                "Choose a width in that range, or leave the layer unquantised."
            )
        if self.strategy not in get_args(Strategy):
            raise ConfigError(
                f"QuantSpec.strategy is {self.strategy!r}, which is none of "
                f"{', '.join(get_args(Strategy))}. Choose channel or group for weights, token for "
                "activations."
            )
        if self.scale_denominator not in get_args(ScaleDenominator):
            raise ConfigError(
                f"QuantSpec.scale_denominator is {self.scale_denominator!r}, which is none of "
                f"{', '.join(get_args(ScaleDenominator))}. Choose half_range for models to be "
                "exported, qmax for the papers' numbers."
            )
        if not self.symmetric and self.strategy not in ("tensor", "channel"):
            raise ConfigError(
                f"QuantSpec.symmetric is false, but strategy {self.strategy} has no zero-point "
                "here. Set symmetric: true, or strategy: tensor or channel for a static range of "
                "activations, channel for weights."
            )
        self._check_group_size()
        self._check_dynamic()

    def _check_group_size(self) -> None:
        if self.strategy == "group" and (self.group_size is None or self.group_size < 1):
            raise ConfigError(
                f"QuantSpec.group_size is {self.group_size}, and strategy group needs at least 1. "
                "Set group_size to a divisor of the layer's inputs, or set strategy: channel."
            )
        if self.strategy != "group" and self.group_size is not None:
            raise ConfigError(
                f"QuantSpec.group_size is {self.group_size}, which strategy {self.strategy} does "
                "not use. Remove group_size, or set strategy: group."
            )

    def _check_dynamic(self) -> None:
        if self.strategy == "token" and not self.dynamic:
            raise ConfigError(
                "QuantSpec.dynamic is false, but strategy token takes the range of each token at "
                "run time. Set dynamic: true, or set strategy: tensor for a static range."
            )
        if self.strategy != "token" and self.dynamic:
            raise ConfigError(
                f"QuantSpec.dynamic is true, but strategy {self.strategy} has a fixed range. "
                "Set dynamic: false, or set strategy: token."
            )

    @property
    def signed(self) -> "QuantSpec":
        """The symmetric quantiser of as many codes.

        An asymmetric one is this one on values shifted by the zero-point, a whole number of steps.
        """
        return replace(self, symmetric=True)

    @property
    def qmin(self) -> int:
        """Smallest code: -2^(bits-1), or 0 of an asymmetric quantiser."""
        return -(1 << (self.num_bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code, 2^bits - 1 above the smallest."""
        return self.qmin + (1 << self.num_bits) - 1

    @property
    def denominator(self) -> float:
        """What a range's absmax is divided by to give the scale."""
        if self.scale_denominator == "half_range":
            return (self.qmax - self.qmin) / 2
        return float(self.qmax)
