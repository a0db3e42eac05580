"""S²Q-VDiT (arXiv 2508.04016): video transformers at W4A6 and W4A4.

The paper in its own order, and where each part stands:

    salient data selection, SDS   eqs 3-8    recon.calibration.selection, chosen in the DataModule
    sparse token distillation     eqs 9-11   `token_weights` and `unit_loss` below
    scale, rotation, clipping     §4, app. A `open_unit`: s, P (shared by q, k, v), θ, φ
    AdamW, cosine, two rates      app. A     `parameter_groups`, `optimizer`
    folding, then GPTQ            app. A     `close_unit`

The authors published no code. What the paper leaves open follows its stated origin, FlatQuant
(arXiv 2410.09426), each point a switch of this class.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from recon.engine import walk
from recon.engine.reconstruction import Reconstruction
from recon.engine.unit import LayerGroup, OpenUnit
from recon.errors import ConfigError
from recon.layers.quant_linear import QuantLinear
from recon.layers.rounding import NearestRounding
from recon.layers.transform import InputTransform
from recon.losses.reconstruction import token_weighted_error, token_weights
from recon.quantizers.gptq import gptq_codes
from recon.quantizers.transforms import (
    KroneckerTransform,
    apply_kronecker,
    kronecker_split,
    smoothing_scale,
    transform_gram,
)


@dataclass(frozen=True)
class SparseTokenDistillation:
    """How attention turns into the weight of a token in the loss (eq. 11)."""

    lambda_min: float = 0.5
    """Weight of the least attended token. Source: §4.4. 1 switches token weights off."""
    lambda_max: float = 1.0
    """Weight of the most attended token. Source: §4.4."""
    norm_over: Literal["joint", "per_stream"] = "joint"
    """Minimum and maximum over all tokens (eq. 11), or over text and video tokens apart."""
    clip_percentile: float | None = None
    """Attention above this percentile counts as the percentile; null: no clipping, as published."""
    loss_tokens: Literal["all", "video"] = "all"
    """Whose error counts."""

    def __post_init__(self) -> None:
        if not 0 <= self.lambda_min <= self.lambda_max:
            raise ConfigError(
                f"std.lambda_min is {self.lambda_min} and std.lambda_max {self.lambda_max}; they "
                "must satisfy 0 <= lambda_min <= lambda_max. The paper's values are 0.5 and 1."
            )


@dataclass(frozen=True)
class Rotation:
    """The Kronecker product applied to every distinct input."""

    kind: Literal["kron_svd", "kron_orth", "none"] = "kron_svd"
    """Trained singular values (FlatQuant), a pure rotation, or nothing."""
    start: Literal["reference", "haar", "identity"] = "reference"
    """`reference`: as FlatQuant's code starts; `haar`: uniformly random."""
    splits: dict[int, tuple[int, int]] | None = None
    """Sizes of the two factors by width, where the most balanced split is not wanted."""


class S2QVDiT(Reconstruction):
    """Block-wise distillation of scales, rotations and clips, tokens weighted by attention.

    Args:
        epochs: Passes over the calibration samples, per unit. Source: app. A.
        transform_lr: Of channel scales and rotations. Source: app. A.
        clip_lr: Of weight and activation clips. Source: app. A.
        weight_decay: AdamW's, on rotations. On clips and scales it is 0: 0.01 alone would move a
            clip from 0.982 to 0.969 of the range in 600 steps.
        lr_floor: Share of each rate that the cosine ends at. Source: QuantVGGT (the group's code).
        alpha: SmoothQuant exponent of the start value of s; both 0.3 and 0.5 are in the ancestors.
        scale_order: Whether s scales the channels before the rotation (FlatQuant) or after it
            (QuantVGGT). After it, s starts from the root mean square of the rotated channels, not
            from their largest magnitude, which one recording pass cannot know.
        learn_scale: Whether s is learned.
        learn_weight_clip: Whether weight clips are learned.
        learn_activation_clip: Whether activation clips are learned.
        clip_start: Logit at which clips start; 4 keeps 0.982 of a range. Source: FlatQuant.
        loss_norm: `self` divides each loss by its own value, as FlatQuant does.
        gptq: Round with GPTQ after folding; false: to nearest.
        gptq_inputs: Inputs of GPTQ's Hessian: the teacher's, or those behind the quantised prefix
            (one more forward per sample). The paper is silent; FlatQuant takes the latter.
        gptq_damping: Share of the mean diagonal added to the Hessian. Source: GPTQ.
        std: Sparse token distillation.
        rotation: The Kronecker transforms.
        inputs: What units are trained on; `full_precision` is the same x for teacher and student
            of eq. 10.
        **kwargs: Arguments of `Reconstruction`.

    Raises:
        ConfigError: A number is out of range.
    """

    def __init__(
        self,
        epochs: int = 15,
        transform_lr: float = 5e-3,
        clip_lr: float = 5e-2,
        weight_decay: float = 0.01,
        lr_floor: float = 1e-3,
        alpha: float = 0.5,
        scale_order: Literal["before_rotation", "after_rotation"] = "before_rotation",
        learn_scale: bool = True,
        learn_weight_clip: bool = True,
        learn_activation_clip: bool = True,
        clip_start: float = 4.0,
        loss_norm: Literal["none", "self"] = "none",
        gptq: bool = True,
        gptq_inputs: Literal["full_precision", "quantised"] = "full_precision",
        gptq_damping: float = 0.01,
        std: SparseTokenDistillation = SparseTokenDistillation(),
        rotation: Rotation = Rotation(),
        inputs: Literal["full_precision", "quantised", "mix"] = "full_precision",
        **kwargs: Any,
    ) -> None:
        super().__init__(inputs=inputs, **kwargs)
        if epochs < 1:
            raise ConfigError(f"model.epochs must be at least 1, got {epochs}.")
        self.epochs, self.transform_lr, self.clip_lr = epochs, transform_lr, clip_lr
        self.weight_decay, self.lr_floor, self.alpha = weight_decay, lr_floor, alpha
        self.scale_order = scale_order
        self.learn_scale, self.learn_weight_clip = learn_scale, learn_weight_clip
        self.learn_activation_clip = learn_activation_clip
        self.gptq, self.gptq_inputs, self.gptq_damping = gptq, gptq_inputs, gptq_damping
        self.clip_start, self.loss_norm = clip_start, loss_norm
        self.std, self.rotation = std, rotation
        self._token_weights: dict[int, Tensor] = {}

    @property
    def wants_gram(self) -> bool:
        """GPTQ's Hessian is the Gram matrix of the inputs, moved through the transform."""
        return (
            self.gptq and self.gptq_inputs == "full_precision"
        ) or self.scale_order == "after_rotation"

    @property
    def wants_attention(self) -> bool:
        """Equal weights need no attention."""
        return self.std.lambda_min != self.std.lambda_max

    def check(self) -> None:
        """Adds to the base: every width must have a split."""
        super().check()
        widths = set()
        for block in self.adapter.block_names[:1]:
            for name, (_, width) in self.adapter.linear_shapes(block).items():
                widths.add(width)
                self._split(width, name)
        unknown = set(self.rotation.splits or {}) - widths
        if unknown:
            raise ConfigError(
                f"model.rotation.splits names the widths {sorted(unknown)}, but the linears are "
                f"{sorted(widths)} wide. Remove them, or name one of these."
            )

    def unit_steps(self, samples: int) -> int:
        """Every sample `epochs` times."""
        return math.ceil(self.epochs * samples / self.batch_size)

    # Opening: s, P, θ, φ ----------------------------------------------------------------------

    def open_unit(self, unit: OpenUnit) -> dict[str, QuantLinear]:
        """Layers with a shared transform per distinct input and learnable clips."""
        self._token_weights = {
            sample: self.token_weights(unit, sample) for sample in unit.record.salience
        }
        layers = {}
        for group in unit.groups:
            transform = self._transform(group, unit)
            for name, module in group.linears.items():
                rounding = NearestRounding(
                    module.out_features,
                    self.weight,
                    learn_clip=self.learn_weight_clip,
                    clip_start=self.clip_start,
                )
                layers[name] = QuantLinear(
                    module,
                    self.weight,
                    self.activation_spec(group.role),
                    transform=transform,
                    rounding=rounding,
                    learn_activation_clip=self.learn_activation_clip,
                    clip_start=self.clip_start,
                )
        return layers

    def _transform(self, group: LayerGroup, unit: OpenUnit) -> InputTransform:
        weight = torch.cat([linear.weight.float() for linear in group.linears.values()])
        activation = unit.record.absmax[group.name]
        width = activation.numel()
        scale = smoothing_scale(activation, weight.abs().amax(dim=0), self.alpha)
        if self.rotation.kind == "none":
            return InputTransform(scale, learn_scale=self.learn_scale)
        kronecker = KroneckerTransform(
            width,
            split=self._split(width, group.name),
            trained_singular_values=self.rotation.kind == "kron_svd",
            start=self.rotation.start,
            generator=self.generator("rotation", group.name),
        )
        if self.scale_order == "before_rotation":
            return InputTransform(scale, kronecker, learn_scale=self.learn_scale)
        left, right, *inverse = (f.detach().to(weight.device) for f in kronecker.all_factors())
        gram = transform_gram(unit.record.gram[group.name].to(weight.device), None, left, right)
        turned = apply_kronecker(weight, *inverse)
        scale = smoothing_scale(
            gram.diagonal().sqrt().float(), turned.abs().amax(dim=0), self.alpha
        )
        return InputTransform(None, kronecker, rotated_scale=scale, learn_scale=self.learn_scale)

    def _split(self, width: int, name: str) -> tuple[int, int]:
        split = (self.rotation.splits or {}).get(width)
        try:
            return kronecker_split(width, split)
        except ConfigError as error:
            raise ConfigError(f"{error} (input of {name}, model.rotation.splits)") from error

    # Training: eqs 9-11 -----------------------------------------------------------------------

    def token_weights(self, unit: OpenUnit, sample: int) -> Tensor:
        """λ of every token, [batch, tokens], from the teacher's attention column sums (eq. 11)."""
        std, state = self.std, self.frontier.state("teacher", sample)
        streams = self.adapter.token_streams(state)
        return token_weights(
            unit.record.salience[sample],
            std.lambda_min,
            std.lambda_max,
            groups=list(streams.values()) if std.norm_over == "per_stream" else None,
            clip_percentile=std.clip_percentile,
        )

    def unit_loss(self, student: Tensor, teacher: Tensor, sample: int) -> dict[str, Tensor]:
        """L_quant = 1/n Σ_j λ_j ‖f_FP(x)_j − f_Q(x)_j‖² (eq. 10), a mean over channels."""
        weight = self._token_weights.get(sample)
        if self.std.loss_tokens == "video":
            video = self.adapter.token_streams(self.frontier.state("teacher", sample))["video"]
            student, teacher = student[:, video], teacher[:, video]
            weight = None if weight is None else weight[:, video]
        error = token_weighted_error(student, teacher, weight)
        return {"token_error": error if self.loss_norm == "none" else error / error.detach()}

    def parameter_groups(self, unit: OpenUnit) -> list[dict[str, Any]]:
        """Scales, rotations and clips, each on a cosine from its rate to the floor."""
        named: dict[str, list[Tensor]] = {"scale": [], "rotation": [], "clip": []}
        for name, parameter in self.quantizers.named_parameters():
            last = name.rsplit(".", 1)[-1]
            scales = ("channel_scale", "rotated_scale")
            kind = "clip" if "clip" in last else "scale" if last in scales else "rotation"
            named[kind].append(parameter)
        rates = {"scale": self.transform_lr, "rotation": self.transform_lr, "clip": self.clip_lr}
        return [
            {
                "name": kind,
                "params": parameters,
                "lr": rates[kind],
                "weight_decay": self.weight_decay if kind == "rotation" else 0.0,
                "schedule": self._cosine,
            }
            for kind, parameters in named.items()
            if parameters
        ]

    def _cosine(self, progress: float) -> float:
        return self.lr_floor + (1 - self.lr_floor) * (1 + math.cos(math.pi * progress)) / 2

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """AdamW. Source: app. A."""
        return torch.optim.AdamW(groups, fused=True)

    # Closing: fold, then round once -----------------------------------------------------------

    def close_unit(self, unit: OpenUnit) -> None:
        """Folds s, P and the clips (float64), then rounds each weight once."""
        if not self.gptq:
            super().close_unit(unit)
            return
        teachers = self.gptq_inputs == "full_precision"
        record = unit.record if teachers else walk.record_student(self, unit)
        for group in unit.groups:
            gram = record.gram[group.name]
            folded: Tensor | None = None
            for name in group.linears:
                layer = unit.layers[name]
                weight = layer.fold()
                assert layer.rounding is not None
                transform = layer.transform
                if folded is None and transform is not None:
                    folded = transform.folded_gram(gram)
                scale = layer.rounding.scale(weight)
                codes = gptq_codes(
                    weight,
                    gram if folded is None else folded,
                    scale,
                    self.weight,
                    damping=self.gptq_damping,
                )
                layer.close(codes, scale)
