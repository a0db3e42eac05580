"""What the visual encoder is tuned by in Q-VLM (arXiv 2410.08119, section 3.3).

    entropy term   eq. 8    `_entropy`, whose weights `weigh` takes from the network's own error
    error term     eq. 9    `error`
    objective      eq. 10   `terms`

The language model is quantised on its initial ranges and frozen; the gradient passes through it.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recon.calibration import ranks
from recon.calibration.dependency import (
    conditional_entropy,
    joint_histogram,
    rounding_points,
    soft_assignment,
)
from recon.engine import vision, walk
from recon.engine.unit import StageState, Unit
from recon.losses.answers import answer_cross_entropy, relative_distance
from recon.models.capabilities import SeesPictures
from recon.types import State

if TYPE_CHECKING:
    from recon.methods.q_vlm import QVLM

ELEMENTS = 4096
"""Values of a layer's output that enter the entropy of one sample."""


@dataclass(frozen=True)
class Seen:
    """A sample, seen through the quantised network."""

    features: Tensor
    """What its pictures become."""
    hidden: list[Tensor]
    """Behind each block, [1, tokens, channels]; none where the language model was not run."""
    state: State
    """Behind the last of them."""


class VisualEncoderObjective:
    """Losses of the whole quantised network that say something about its visual encoder.

    Args:
        method: Whose streams stand in front of the first block; they are taken to the end.
        adapter: Of its network.
        teacher: The encoder in full precision.
        student: The encoder that is tuned.
    """

    def __init__(
        self,
        method: "QVLM",
        adapter: SeesPictures,
        teacher: vision.VisionNetwork,
        student: vision.VisionNetwork,
    ) -> None:
        self._method, self._tuning, self._adapter = method, method.veo, adapter
        self._frontier, self._device = method.frontier, method.run_device
        self._teacher, self._student = teacher, student
        self._points: list[tuple[float, float]] = []
        self.blocks: list[nn.Module] = []
        """Of the language model, quantised on its initial ranges."""
        for number, name in enumerate(method.adapter.block_names):
            self._quantize(number, name)
        walk.follow(method, len(self.blocks))

    def _quantize(self, number: int, name: str) -> None:
        method = self._method
        walk.follow(method, number)
        opened = walk.trial_unit(method, Unit(name, (name,)))
        parts = [
            self._picked(self._frontier.target(sample), "points", sample)
            for sample in self._frontier.calibration
        ]
        self._points.append(rounding_points(parts, method.levels, method.initial_norm))
        for products in opened.attentions.values():
            products.fold()
        for layer in opened.layers.values():
            layer.close_as_rounded()
            layer.keep_resident(method.adapter.compute_dtype(self._device))
        self.blocks += opened.student_blocks

    def _has_pictures(self, sample: int) -> bool:
        return vision.has_pictures(self._adapter, self._frontier.sample(sample))

    # The objective of a sample: eqs 8 to 10 -------------------------------------------------------

    def terms(self, sample: int, step: int, state: StageState) -> dict[str, Tensor]:
        """Cross-entropy of the answer, λ1 of the entropy and λ2 of the error, those that count.

        A text without a picture says nothing about the encoder and counts as zero.
        """
        if not self._has_pictures(sample):
            return self.nothing()
        tuning, seen = self._tuning, self.see(sample, whole=self._needs_output)
        terms = {}
        if tuning.answer_weight > 0:
            terms["cross_entropy"] = tuning.answer_weight * self._cross_entropy(sample, seen)
        if self._has_entropy:
            terms["entropy"] = tuning.entropy_weight * self._entropy(seen, sample, step, state)
        if tuning.error_weight > 0:
            terms["error"] = tuning.error_weight * self._error(sample, seen)
        return terms

    def nothing(self) -> dict[str, Tensor]:
        """The same terms, all of them zero."""
        has_answer, has_error = self._tuning.answer_weight > 0, self._tuning.error_weight > 0
        has = {"cross_entropy": has_answer, "entropy": self._has_entropy, "error": has_error}
        names = [name for name, counts in has.items() if counts]
        zero = torch.zeros((), device=self._device, requires_grad=True)
        return dict.fromkeys(names, zero)

    @property
    def _has_entropy(self) -> bool:
        return self._tuning.entropy_weight > 0 and len(self.blocks) > 1

    @property
    def _needs_output(self) -> bool:
        """Whether a term reads anything behind the encoder."""
        tuning = self._tuning
        of_output = tuning.error_weight > 0 and tuning.output_share > 0
        return tuning.answer_weight > 0 or self._has_entropy or of_output

    def see(self, sample: int, *, whole: bool = True) -> Seen:
        """A sample that has pictures, through the encoder and, if `whole`, the language model."""
        given, adapter = self._frontier.sample(sample), self._method.adapter
        features = self._student.features(given)
        state, hidden = self._adapter.embed_features(given, features, self._device), []
        for block in self.blocks if whole else ():
            # Only what stands between blocks is kept for the way back.
            state = checkpoint(
                adapter.forward_block, block, state, use_reentrant=False, preserve_rng_state=False
            )
            hidden.append(adapter.tokens(state))
        return Seen(features, hidden, state)

    def _cross_entropy(self, sample: int, seen: Seen) -> Tensor:
        given = self._frontier.sample(sample)
        logits = self._method.adapter.output(given, seen.state, self._device)
        return answer_cross_entropy(logits, given["labels"])

    def _entropy(self, seen: Seen, sample: int, step: int, state: StageState) -> Tensor:
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

    def _error(self, sample: int, seen: Seen) -> Tensor:
        """Relative error of the encoder's output, and η times that of the last block's (eq. 9)."""
        with torch.no_grad():
            features = self._teacher.features(self._frontier.sample(sample))
        error, share = relative_distance(seen.features, features), self._tuning.output_share
        if share > 0:
            error = error + share * relative_distance(seen.hidden[-1], self._target(sample))
        return error

    def _target(self, sample: int) -> Tensor:
        return self._frontier.tokens(self._frontier.state("teacher", sample))

    # Over many samples ----------------------------------------------------------------------------

    def weigh(self, state: StageState) -> None:
        """w_k: how strongly the final error feels each layer's output, over the calibration set.

        Their sum is 1. Where the error feels none of them they stay alike.
        """
        if not self._tuning.entropy_weight or not len(state["influence"]):
            return
        norms = torch.zeros(len(state["influence"]), dtype=torch.float64, device=self._device)
        for sample in filter(self._has_pictures, self._frontier.calibration):
            with torch.enable_grad():
                hidden = self.see(sample).hidden
                error = (hidden[-1] - self._target(sample)).float().norm()
            gradients = torch.autograd.grad(error, hidden[:-1])
            norms += torch.stack([gradient.float().norm() for gradient in gradients]).double()
        total = ranks.total(norms).sum()
        if total > 0:
            state["influence"].copy_(norms / total)

    @torch.no_grad()
    def held_out(self) -> Tensor:
        """Mean cross-entropy and error over the held-out samples of all processes, float32 [2]."""
        sums = torch.zeros(3, dtype=torch.float64, device=self._device)
        for sample in filter(self._has_pictures, self._frontier.held_out):
            seen = self.see(sample)
            losses = (self._cross_entropy(sample, seen), self._error(sample, seen))
            sums += torch.stack([*losses, torch.ones_like(losses[0])]).double()
        ranks.total(sums)
        return (sums[:2] / sums[2]).float()
