"""PTQ4DiT (arXiv 2405.16005): image diffusion transformers, balanced, then reconstructed.

The paper in its own order, and where each part stands:

    channel-wise salience balancing, CSB        eqs 3-7     `balancing`
    ρ-guided salience calibration, SSC          eqs 10-14   `recon.quantizers.salience`
    re-parameterisation                         eqs 13, 20  the adapter's `fold`, when exported
    block reconstruction                        §4.3        `unit_loss`, `regularizer`: AdaRound
                                                            and learned activation step sizes

`balance` and `reconstruct` switch the two halves off independently. The authors' code divides
activations at run time; here the same scale stands in front of the quantiser until it is folded,
which changes no number.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from recon.calibration import ranks
from recon.calibration.statistics import UnitRecord
from recon.engine.reconstruction import Reconstruction
from recon.engine.unit import LayerGroup, OpenUnit
from recon.errors import ConfigError
from recon.layers.quant_attention import OPERANDS, QuantAttention
from recon.layers.quant_linear import QuantLinear
from recon.layers.rounding import AdaptiveRounding, rounding_penalty
from recon.layers.static_range import StaticRange
from recon.layers.transform import InputTransform
from recon.losses.reconstruction import token_weighted_error
from recon.quantizers.affine import absmax_scale, fake_quantize_tokens, weight_range
from recon.quantizers.affine import codes as nearest_codes
from recon.quantizers.gptq import gptq_codes
from recon.quantizers.ranges import mse_clip_ratio, mse_zero_points, static_range_errors
from recon.quantizers.salience import Aggregation, aggregate, balance_scale, weight_salience
from recon.quantizers.spec import QuantSpec, Strategy

BALANCED = ("attention_input", "attention_output", "feed_forward_up")
"""Roles of the inputs that are balanced: of q, k and v, of the projection, of the first
feed-forward layer. Source: PTQ4DiT, figure 7 and appendix A."""

PUBLISHED_TOKENS = 256
"""Tokens of DiT-XL/2 at 256², for which the published weight of the regulariser was chosen."""


class PTQ4DiT(Reconstruction):
    """Salience balanced between activations and weights, then rounding learned block by block.

    Args:
        balance: `csb` moves range between activations and weights, `none` does not.
        salience: How the salience of activations is put together over timesteps.
        ssc_over: Rows that SSC weights: one per timestep (paper) or one per sample (code).
        gauge: Whether the scales of a layer are divided by their geometric mean.
        balance_feed_forward_down: Whether the input behind GELU is balanced too. No layer can take
            over its scale, so it stays a multiplication at run time; ours, not the paper's.
        reconstruct: Learn the rounding; false: round to nearest on the same step sizes.
        rounding_start: Where the rounding logits start: at the teacher's `weight` (paper), or
            halfway from there to the codes of `gptq`; ours, for few steps.
        steps: Optimizer steps of each unit. Source: 20,000 in the code.
        lr: Of the rounding logits (Adam, constant). Source: 1e-3, for 20,000 steps.
        rounding_weight: Of the regulariser, a sum over the unit's weights. Source: 0.01.
        lambda_scaling: `tokens` multiplies it by tokens / 256, because the loss is a sum over
            tokens: the balance of the two is then that of the paper at 256². `none`: as the code.
        grid: Ranges tried for each row of a weight and for each fixed activation range. Deviates:
            the code tries 3 percentiles.
        step_size: How fixed activation step sizes are learned, where `activation` has strategy
            tensor: their logarithm, or `absolute` as in the code, whose one rate is 100 times the
            step of a softmax and leaves nothing positive.
        step_lr: Of the activation step sizes (Adam, cosine to 0): 1e-3 for logarithms, 4e-5 is the
            code's for absolute ones.
        range_tokens: Tokens of each sample that fixed ranges are searched on, and GPTQ's start.
            Deviates: the code searches on class 0 behind a quantised prefix; here it is every
            sample's teacher.
        stem_and_head: Grid of the weights outside the blocks: patch convolution, embedder of
            timesteps, last modulation and output. `weight`: that of the blocks (paper); null
            leaves these layers in full precision. Their inputs have the grid `activation`.
            Deviates: `close_outside`.
        **kwargs: Arguments of `Reconstruction`.

    Raises:
        ConfigError: A number is out of range.
    """

    activation_strategies: ClassVar[tuple[Strategy, ...]] = ("token", "tensor")
    asymmetric_weights: ClassVar[bool] = True

    def __init__(
        self,
        balance: Literal["csb", "none"] = "csb",
        salience: Aggregation = "ssc",
        ssc_over: Literal["timestep", "sample"] = "timestep",
        gauge: bool = True,
        balance_feed_forward_down: bool = False,
        reconstruct: bool = True,
        rounding_start: Literal["weight", "gptq"] = "weight",
        steps: int = 20_000,
        lr: float = 1e-3,
        rounding_weight: float = 0.01,
        lambda_scaling: Literal["tokens", "none"] = "tokens",
        grid: int = 80,
        step_size: Literal["log", "absolute"] = "log",
        step_lr: float = 1e-3,
        range_tokens: int = 64,
        stem_and_head: Literal["weight"] | QuantSpec | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        limits = (("steps", steps, 1), ("grid", grid, 2), ("range_tokens", range_tokens, 1))
        for name, value, least in limits:
            if value < least:
                raise ConfigError(f"model.{name} must be at least {least}, got {value}.")
        self.balance, self.salience, self.ssc_over = balance, salience, ssc_over
        self.gauge, self.balance_feed_forward_down = gauge, balance_feed_forward_down
        self.reconstruct, self.rounding_start = reconstruct, rounding_start
        self.steps, self.lr = steps, lr
        self.rounding_weight, self.lambda_scaling, self.grid = rounding_weight, lambda_scaling, grid
        self.step_size, self.step_lr, self.range_tokens = step_size, step_lr, range_tokens
        self.stem_and_head = stem_and_head
        self.outside_weight = self.weight if stem_and_head == "weight" else stem_and_head
        self._tokens = PUBLISHED_TOKENS

    @property
    def wants_rows(self) -> Literal["timestep", "sample"] | None:
        """Maxima of the inputs by timestep (or sample), for SSC."""
        return self.ssc_over if self.balance == "csb" else None

    @property
    def wants_tokens(self) -> int:
        """Some tokens of each sample, for fixed ranges and for GPTQ."""
        fixed = self.activation is not None and self.activation.strategy == "tensor"
        outside = self.reconstruct and self.outside_weight is not None
        return self.range_tokens if fixed or self._starts_at_gptq or outside else 0

    @property
    def _starts_at_gptq(self) -> bool:
        return self.reconstruct and self.rounding_start == "gptq"

    def unit_steps(self, samples: int) -> int:
        """The configured number, whatever the number of samples."""
        return self.steps if self.reconstruct else 1

    # Opening: CSB on SSC's salience, then step sizes --------------------------------------------

    def open_unit(self, unit: OpenUnit) -> dict[str, QuantLinear]:
        """Layers on balanced weights, whose rounding starts there or halfway to GPTQ's codes."""
        return self._layers(unit, lambda group, transform: self._gram(group, unit, transform))

    def foreseen_layers(self, unit: OpenUnit) -> dict[str, QuantLinear]:
        """The same without correlations: GPTQ would take minutes over those of wide inputs."""
        return self._layers(unit, lambda group, transform: None)

    def _layers(
        self,
        unit: OpenUnit,
        gram_of: Callable[[LayerGroup, InputTransform | None], Tensor | None],
    ) -> dict[str, QuantLinear]:
        layers = {}
        for group in unit.groups:
            transform = self._transform(group, unit)
            gram = gram_of(group, transform) if self._starts_at_gptq else None
            for name, module in group.linears.items():
                weight = module.weight.float()
                balanced = weight if transform is None else transform.weight(weight)
                layers[name] = QuantLinear(
                    module,
                    self.weight,
                    self.activation_spec(group.role),
                    transform=transform,
                    rounding=self._rounding(balanced, gram),
                )
        return layers

    def balancing(self, group: LayerGroup, unit: OpenUnit) -> Tensor | None:
        """The diagonal b of B_X for a group's input, [channels]; None where it is not balanced.

        Linears that share the input share b: their salience is the largest over all their rows.
        """
        down = self.balance_feed_forward_down and group.role == "feed_forward_down"
        if self.balance == "none" or not (group.role in BALANCED or down):
            return None
        weight = weight_salience([linear.weight for linear in group.linears.values()])
        activation = aggregate(unit.record.absmax_rows[group.name], weight, self.salience)
        return balance_scale(activation, weight, gauge=self.gauge).float()

    def _transform(self, group: LayerGroup, unit: OpenUnit) -> InputTransform | None:
        scale = self.balancing(group, unit)
        spec = self.activation_spec(group.role)
        static = None
        if spec is not None and spec.strategy == "tensor":
            static = self._searched(unit.record, group.name, spec, scale)
        if scale is None and static is None:
            return None
        return InputTransform(scale, learn_scale=False, static=static)

    def _gram(self, group: LayerGroup, unit: OpenUnit, transform: InputTransform | None) -> Tensor:
        """Sum of x̂ x̂ᵀ over tokens, where x̂ is the balanced input as the grid has it.

        Unquantised inputs would have GPTQ lean on correlations that the grid's noise destroys.
        """
        spec = self.activation_spec(group.role)
        summed = torch.zeros((), dtype=torch.float64)
        for tokens in unit.record.tokens[group.name]:
            seen = tokens if transform is None else transform(tokens)
            if spec is not None and spec.dynamic:
                seen = fake_quantize_tokens(seen, spec)
            summed = summed.to(seen.device) + (seen.T @ seen).double()  # as in every record
        return ranks.total(summed)

    def open_attention(self, name: str, unit: OpenUnit) -> QuantAttention:
        """Products on fixed ranges where activations have them, else on ranges per token.

        The value is that of the teacher: balancing of the projection acts behind the product.
        """
        products = super().open_attention(name, unit)
        if products.activation.strategy == "tensor":
            for operand in OPERANDS:
                found = self._searched(unit.record, f"{name}.{operand}", products.spec(operand))
                products.ranges[operand] = found
        return products

    def _searched(
        self, record: UnitRecord, name: str, spec: QuantSpec, scale: Tensor | None = None
    ) -> StaticRange:
        """The fixed range of what was recorded, times `scale`, that costs the least error."""
        tokens = torch.cat(record.tokens[name])
        factor = torch.ones_like(tokens[0]) if scale is None else scale
        low = float((record.lowest[name] * factor).min())
        high = float((record.highest[name] * factor).max())
        ratios, errors = static_range_errors(tokens * factor, low, high, spec, self.grid)
        best = float(ratios[int(ranks.total(errors).argmin())])
        learn = self.step_size if self.reconstruct else None
        return StaticRange(best * low, best * high, spec, learn)

    def close_outside(self, unit: OpenUnit) -> dict[str, QuantLinear]:
        """Each layer rounded for the error of its own output, on a searched range of its input.

        Deviates from layer_recon.py of the code, which trains stem layers on that error one by one,
        and the two of the head together: here GPTQ lessens it in one pass, and step sizes of
        inputs stay as searched, because latents, times and classes are no streamed tokens. Observed
        on the image teacher, blocks in full precision, 4 bits on fixed ranges: an output error of
        7.5e-3, to nearest 1.4e-2. With `reconstruct` false: to nearest.
        """
        assert self.outside_weight is not None
        (group,) = unit.groups
        transform = self._transform(group, unit)
        gram = self._gram(group, unit, transform) if self.reconstruct else None
        layers = {}
        for name, module in group.linears.items():
            spec, weight = self.activation_spec(group.role), module.weight.float()
            layer = QuantLinear(module, self.outside_weight, spec, transform=transform)
            scale, zero_point = self._row_grid(weight, self.outside_weight)
            codes = self._codes(weight, scale, zero_point, self.outside_weight, gram)
            layer.close(codes, scale, zero_point)
            layers[name] = layer
        return layers

    def _row_grid(self, weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
        """Searched step sizes, and zero-points where the grid has them."""
        if not spec.symmetric:
            return mse_zero_points(weight, spec, self.grid)
        absmax = weight_range(weight, spec) * mse_clip_ratio(weight, spec, self.grid)
        return absmax_scale(absmax, spec), None

    @staticmethod
    def _codes(
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        spec: QuantSpec,
        gram: Tensor | None,
    ) -> Tensor:
        """Signed codes by GPTQ, without correlations to nearest."""
        # Rows shifted by whole steps: what GPTQ passes on from column to column stays the same.
        shifted = weight if zero_point is None else weight + scale * zero_point
        if gram is None:
            return nearest_codes(shifted, scale, spec.signed)
        return gptq_codes(shifted, gram, scale, spec.signed)

    def _rounding(self, weight: Tensor, gram: Tensor | None) -> AdaptiveRounding:
        scale, zero_point = self._row_grid(weight, self.weight)
        codes = None
        if self._starts_at_gptq:
            codes = self._codes(weight, scale, zero_point, self.weight, gram)
        return AdaptiveRounding(weight, scale, self.weight, codes, zero_point)

    # Training: AdaRound on block outputs --------------------------------------------------------

    def unit_loss(self, student: Tensor, teacher: Tensor, sample: int) -> dict[str, Tensor]:
        """Squared error of the block's tokens: a sum over tokens, a mean over channels.

        Source: block_recon.py of the code, whose sum runs over axis 1, the tokens.
        """
        self._tokens = teacher.shape[1]
        return {"mse": self._tokens * token_weighted_error(student, teacher, None)}

    def regularizer(self, unit: OpenUnit, progress: float) -> dict[str, Tensor]:
        """Pulls every rounding to up or down, harder as the unit goes on."""
        if not self.reconstruct:
            return {}
        share = self._tokens / PUBLISHED_TOKENS if self.lambda_scaling == "tokens" else 1.0
        penalty = rounding_penalty((q.rounding for q in unit.layers.values()), progress)
        return {} if penalty is None else {"round": self.rounding_weight * share * penalty}

    def parameter_groups(self, unit: OpenUnit) -> list[dict[str, Any]]:
        """Rounding logits at a constant rate, activation step sizes on a cosine to zero."""
        if not self.reconstruct:
            return []
        logits = [
            layer.rounding.logits
            for layer in unit.layers.values()
            if isinstance(layer.rounding, AdaptiveRounding)
        ]
        groups = [{"name": "rounding", "params": logits, "lr": self.lr, "schedule": lambda _: 1.0}]
        ranges: list[nn.Module | None] = [transform.static for transform in unit.transforms]
        ranges += [products.ranges for products in unit.attentions.values()]
        learned = [p for fixed in ranges if fixed is not None for p in fixed.parameters()]
        if learned:
            groups.append(
                {
                    "name": "step_size",
                    "params": learned,
                    "lr": self.step_lr,
                    "schedule": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
                }
            )
        return groups
