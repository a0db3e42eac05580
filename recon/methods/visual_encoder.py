"""The visual encoder in Q-VLM (arXiv 2410.08119, section 3.3): quantised first, and tuned.

    entropy term   eq. 8    `_entropy`, whose weights `_weigh` takes from the network's own error
    error term     eq. 9    `_error`
    objective      eq. 10   `terms`

The language model is quantised on its initial ranges and frozen while the encoder is tuned; the
gradient passes through it. Nothing of it stays: what the stage leaves are the encoder's layers and
tuned tensors. The paper names neither trainables nor rates nor weights, and has no guard: those
are ours.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recon.calibration import ranks
from recon.calibration.dependency import (
    conditional_entropy,
    joint_histogram,
    rounding_points,
    soft_assignment,
)
from recon.engine import keep_best, vision, walk
from recon.engine.activation_sites import ActivationSites
from recon.engine.unit import StageState, Unit
from recon.errors import ConfigError
from recon.layers.quant_linear import QuantLinear
from recon.losses.answers import answer_cross_entropy, relative_distance
from recon.types import State

if TYPE_CHECKING:
    from recon.methods.q_vlm import QVLM

Part = Literal["act_ranges", "norms", "weight_scales", "weights"]

ELEMENTS = 4096
"""Values of a layer's output that enter the entropy of one sample."""


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
    weights, weights. Ranges and step sizes are there where the encoder is quantised."""
    epochs: int = 10
    """Passes over the calibration set. Source: Q-VLM, implementation details."""
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
        for name in ("error_weight", "output_share", "lr", "weight_lr", "clip"):
            self._refuse_below(name, 0.0)
        if not self.params:
            raise ConfigError(
                "model.veo.params is empty. Name what learns: act_ranges, norms, weight_scales or "
                "weights; or set model.veo.enabled: false."
            )

    def _refuse_below(self, name: str, least: float) -> None:
        if getattr(self, name) < least:
            raise ConfigError(
                f"model.veo.{name} must be at least {least}, got {getattr(self, name)}."
            )


@dataclass(frozen=True)
class _Seen:
    """A sample, seen through the quantised network."""

    features: Tensor
    """What its pictures become."""
    hidden: list[Tensor]
    """Behind each block, [1, tokens, channels]."""
    state: State
    """Behind the last one."""


class VisualEncoderStage:
    """The visual encoder while its stage is open.

    Args:
        method: Whose streams stand in front of the first block.
        sites: Makes the ranges.
        power: Of the distance that rounding points minimise.

    Raises:
        ConfigError: No sample has a picture to calibrate on, or to judge the tuning by.
    """

    def __init__(self, method: "QVLM", sites: ActivationSites, power: float) -> None:
        self._method, self._tuning, self._power = method, method.veo, power
        self._frontier, self._device = method.frontier, method.run_device
        self._adapter = vision.sees_pictures(
            method.adapter, "The visual encoder is to be quantised or tuned", "leave it as it is"
        )
        vision.refuse_texts(method, self._adapter, held_out=self._tuning.enabled)
        self._teacher = vision.VisionNetwork(self._adapter, self._device)
        groups = self._teacher.groups() if method.quantize_vision else []
        record = self._teacher.record(method, groups)
        self.layers = method.open_vision(groups, record, sites, learning=True)
        for name, layer in self.layers.items():
            method.quantizers[name.replace(".", "/")] = layer
        for name, tensor in self._started().items():
            method.tuned[name.replace(".", "/")] = nn.Parameter(tensor.float().clone())
        self._student = vision.VisionNetwork(
            self._adapter, self._device, self.layers, method.tuned_tensors()
        )
        self._over: bool | None = None
        self._points: list[tuple[float, float]] = []
        self._blocks = self._quantized_blocks() if self._tuning.enabled else []

    def _has_pictures(self, sample: int) -> bool:
        return vision.has_pictures(self._adapter, self._frontier.sample(sample))

    def _started(self) -> dict[str, Tensor]:
        """The teacher's tensors that learn as they are, by full name."""
        wanted = self._tuning.params if self._tuning.enabled else ()
        found: dict[str, Tensor] = {}
        if "norms" in wanted:
            found |= self._teacher.parameters(self._adapter.vision_norms())
        if "weights" in wanted and not self.layers:
            groups = self._adapter.vision_groups()
            found |= self._teacher.parameters(tuple(n for g in groups for n in g.linears))
        return found

    def _quantized_blocks(self) -> list[nn.Module]:
        """The language model on its initial ranges; takes the teacher's stream to its end."""
        method, blocks = self._method, []
        for number, name in enumerate(method.adapter.block_names):
            walk.follow(method, number)
            opened = walk.trial_unit(method, Unit(name, (name,)))
            parts = [
                self._picked(self._frontier.target(sample), "points", sample)
                for sample in self._frontier.calibration
            ]
            self._points.append(rounding_points(parts, method.levels, self._power))
            _close(opened.layers.values())
            for products in opened.attentions.values():
                products.fold()
            for layer in opened.layers.values():
                layer.keep_resident(method.adapter.compute_dtype(self._device))
            blocks += opened.student_blocks
        walk.follow(method, len(blocks))
        return blocks

    # What learns ----------------------------------------------------------------------------------

    @property
    def parts(self) -> dict[str, list[Tensor]]:
        """What learns, by the name of its learning rate; what linears share stands there once."""
        found: dict[str, dict[Tensor, None]] = {"encoder": {}, "encoder weights": {}}
        norms = tuple(f"{name}." for name in self._adapter.vision_norms())
        for name, tensor in self._method.tuned_tensors().items():
            inside = name.removeprefix(f"{self._adapter.vision_name}.")
            found["encoder" if inside.startswith(norms) else "encoder weights"][tensor] = None
        for layer in self.layers.values():
            for name, parameter in layer.named_parameters():
                kind = "encoder weights" if name == "teacher_weight" else "encoder"
                found[kind][parameter] = None
        return {kind: list(parameters) for kind, parameters in found.items()}

    @property
    def _learned(self) -> list[Tensor]:
        return [parameter for parameters in self.parts.values() for parameter in parameters]

    def state(self) -> dict[str, Tensor]:
        """What the stage keeps: weights of the entropy, held-out results, the best so far."""
        if not self._tuning.enabled:
            return {"feature_error": torch.zeros(())}
        pairs = len(self._blocks) - 1
        results = torch.full((self._tuning.epochs + 1, 2), torch.inf)
        influence = torch.full((pairs,), 1 / max(pairs, 1))
        best = keep_best.best_so_far(self._learned)
        return {"influence": influence, "held_out": results, **best}

    # The objective: eqs 8 to 10 -------------------------------------------------------------------

    def terms(self, sample: int, step: int, state: StageState) -> dict[str, Tensor]:
        """Cross-entropy of the answer, λ1 of the entropy and λ2 of the error, of one sample.

        A text without a picture says nothing about the encoder and counts as zero, as every sample
        does once tuning has stopped.
        """
        tuning = self._tuning
        entropy = tuning.entropy_weight > 0 and len(self._blocks) > 1
        if self._over or not self._has_pictures(sample):
            names = [
                "cross_entropy",
                *["entropy"] * entropy,
                *["error"] * (tuning.error_weight > 0),
            ]
            zero = torch.zeros((), device=self._device, requires_grad=True)
            return dict.fromkeys(names, zero)
        seen = self._see(sample)
        terms = {"cross_entropy": self._cross_entropy(sample, seen)}
        if entropy:
            terms["entropy"] = tuning.entropy_weight * self._entropy(seen, sample, step, state)
        if tuning.error_weight > 0:
            terms["error"] = tuning.error_weight * self._error(sample, seen)
        return terms

    def _see(self, sample: int) -> _Seen:
        given, adapter = self._frontier.sample(sample), self._method.adapter
        features = self._student.features(given)
        state, hidden = self._adapter.embed_features(given, features, self._device), []
        for block in self._blocks:
            # Only what stands between blocks is kept for the way back.
            state = checkpoint(
                adapter.forward_block, block, state, use_reentrant=False, preserve_rng_state=False
            )
            hidden.append(adapter.tokens(state))
        return _Seen(features, hidden, state)

    def _cross_entropy(self, sample: int, seen: _Seen) -> Tensor:
        given = self._frontier.sample(sample)
        logits = self._method.adapter.output(given, seen.state, self._device)
        return answer_cross_entropy(logits, given["labels"])

    def _entropy(self, seen: _Seen, sample: int, step: int, state: StageState) -> Tensor:
        """Σ w_k D(k, k + 1) of the quantised network's hidden states (eq. 8).

        Deviates: with the sign that lowers the entropy, as the text says; of one sample.
        """
        method = self._method
        shares = [
            soft_assignment(
                self._picked(hidden, "entropy", step, sample),
                *points,
                method.levels,
                literal=method.eq5_literal,
            )
            for hidden, points in zip(seen.hidden, self._points, strict=True)
        ]
        found = [conditional_entropy(joint_histogram(a, b)) for a, b in pairwise(shares)]
        return (state["influence"] * torch.stack(found)).sum()

    def _picked(self, values: Tensor, *purpose: object) -> Tensor:
        """Some of all values, at the same places for the same purpose."""
        count = values.numel()
        generator = self._method.generator("visual encoder", *purpose)
        places = torch.randint(count, (min(ELEMENTS, count),), generator=generator)
        return values.flatten()[places.to(values.device)]

    def _error(self, sample: int, seen: _Seen) -> Tensor:
        """Relative error of the encoder's output, and η times that of the last block's (eq. 9)."""
        output = relative_distance(seen.hidden[-1], self._target(sample))
        return self._feature_error(sample, seen.features) + self._tuning.output_share * output

    def _target(self, sample: int) -> Tensor:
        return self._frontier.tokens(self._frontier.state("teacher", sample))

    def _feature_error(self, sample: int, features: Tensor) -> Tensor:
        with torch.no_grad():
            expected = self._teacher.features(self._frontier.sample(sample))
        return relative_distance(features, expected)

    def _weigh(self, state: StageState) -> None:
        """w_k: how strongly the final error feels each layer's output, over the calibration set.

        Their sum is 1. Where the error feels none of them they stay alike.
        """
        if not self._tuning.entropy_weight or not len(state["influence"]):
            return
        norms = torch.zeros(len(state["influence"]), dtype=torch.float64, device=self._device)
        for sample in filter(self._has_pictures, self._frontier.calibration):
            with torch.enable_grad():
                hidden = self._see(sample).hidden
                error = (hidden[-1] - self._target(sample)).float().norm()
            gradients = torch.autograd.grad(error, hidden[:-1])
            norms += torch.stack([gradient.float().norm() for gradient in gradients]).double()
        total = ranks.total(norms).sum()
        if total > 0:
            state["influence"].copy_(norms / total)

    # Guard and early stop -------------------------------------------------------------------------

    def begin(self, step: int, state: StageState) -> dict[str, float]:
        """Before each epoch: looks at the held-out samples, and weighs the entropy anew.

        Returns:
            What was seen, to be logged; empty within an epoch and once tuning has stopped.
        """
        epoch, within = divmod(step, self._method.encoder_epoch)
        if within and self._over is not None:
            return {}
        self._over = self._ended(state)  # read from the device once an epoch
        if within or self._over:
            return {}
        found = self._look(epoch, state)
        self._over = self._ended(state)
        if not self._over:
            self._weigh(state)
        return found

    @torch.no_grad()
    def _look(self, epoch: int, state: StageState) -> dict[str, float]:
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        for sample in filter(self._has_pictures, self._frontier.held_out):
            seen = self._see(sample)
            losses = (self._cross_entropy(sample, seen), self._error(sample, seen))
            sums += torch.stack([*losses, torch.ones_like(losses[0])]).double()
        ranks.total(sums)
        # Stored finite: infinity stands for what was not looked at.
        state["held_out"][epoch] = (sums[:2] / sums[2]).float().nan_to_num(nan=torch.inf).clamp(
            max=torch.finfo(torch.float32).max
        )  # fmt: skip
        value = self._values(state)[epoch]
        keep_best.remember(state, self._learned, torch.tensor(value, device=self._device))
        cross_entropy, error = state["held_out"][epoch].tolist()
        return {"held_out_cross_entropy": cross_entropy, "held_out_error": error}

    def _values(self, state: StageState) -> list[float]:
        """Cross-entropy and λ2 of the error before each epoch; inf where either got worse.

        The entropy is left out: its weights differ from epoch to epoch.
        """
        rows: list[list[float]] = state["held_out"].tolist()
        looked = [row for row in rows if not math.isinf(row[0])]
        start = looked[0] if looked else rows[0]
        return [
            row[0] + self._tuning.error_weight * row[1]
            if row[0] <= start[0] and row[1] <= start[1]
            else math.inf
            for row in looked
        ]

    def _ended(self, state: StageState) -> bool:
        values = self._values(state)
        return bool(values) and len(values) - 1 - _best(values) >= self._tuning.patience

    # The end of the stage -------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, state: StageState) -> dict[str, float]:
        """Mean relative error of the features over the calibration set, where nothing is tuned."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for sample in filter(self._has_pictures, self._frontier.calibration):
            error = self._feature_error(
                sample, self._student.features(self._frontier.sample(sample))
            )
            sums += torch.stack([error, torch.ones_like(error)]).double()
        wrong, count = ranks.total(sums)
        state["feature_error"].copy_(wrong / count)
        return {"feature_error": float(state["feature_error"])}

    def close(self, state: StageState) -> dict[str, Any]:
        """Keeps the best of what was tuned, or nothing of it, and lets all streams start behind it.

        Returns:
            What was found; plain values.
        """
        found: dict[str, Any] = {}
        tuned = self._method.tuned_tensors()
        if self._tuning.enabled:
            if not self._over:
                self._look(self._tuning.epochs, state)
            found = self._judge(state)
            keep_best.assign(self._learned, keep_best.remembered(state, len(self._learned)))
            tuned = tuned if found["accepted"] else {}
        else:
            found["feature_error"] = float(state["feature_error"])
        _close(self.layers.values())
        vision.settle(self._method, self.layers, tuned)
        self._frontier.restart()
        return found

    def _judge(self, state: StageState) -> dict[str, Any]:
        values, rows = self._values(state), state["held_out"].tolist()
        best = _best(values)
        names = ("cross_entropy", "error")
        before, after = (dict(zip(names, rows[epoch], strict=True)) for epoch in (0, best))
        if best == 0:
            rank_zero_info(
                "Tuning the visual encoder lowered neither cross-entropy nor error on held-out "
                f"samples without raising the other ({before} before it); it is left as it was."
            )
        return {
            "accepted": best > 0,
            "epoch": best,
            "epochs": len(values) - 1,
            "before": before,
            "after": after,
            "influence": state["influence"].tolist(),
        }


def _close(layers: Iterable[QuantLinear]) -> None:
    for layer in layers:
        weight = layer.fold()
        assert layer.rounding is not None
        layer.close(*layer.rounding.close(weight))


def _best(values: list[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)
