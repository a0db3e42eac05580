"""Builds a salient calibration set: sample, score, agree over the ranks, choose, write."""

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from recon import errors
from recon.calibration import ranks
from recon.calibration.artefact import Fingerprint, Row, write_set
from recon.calibration.selection import (
    UNSCORED,
    Choice,
    SalientSelection,
    rank_correlation,
    select,
)
from recon.datamodules.agreement import agree, attempt
from recon.datamodules.candidates import Branches, Candidates, Trajectory
from recon.datamodules.prompts import noise_seed
from recon.models.adapter import ModelAdapter


@dataclass(frozen=True)
class Plan:
    """What calibration samples; a pure function of the configuration."""

    calibration: tuple[str, ...]
    """Prompts that candidates come from."""
    held_out: tuple[str, ...]
    """Prompts of the held-out samples."""
    held_out_samples: int
    steps: int
    guidance: float
    seed: int
    branches: Branches
    rule: SalientSelection

    def held_out_places(self) -> list[tuple[int, int]]:
        """(held-out prompt, step) of each held-out sample.

        One is drawn from each of as many equal stretches of the pool in (step, prompt) order, so
        that the samples are uniform over the steps for any seed.
        """
        count, pool = self.held_out_samples, len(self.held_out) * self.steps
        rng = random.Random(self.seed)
        drawn = []
        for k in range(count):
            place = rng.randrange(k * pool // count, (k + 1) * pool // count)
            drawn.append((place % len(self.held_out), place // len(self.held_out)))
        return drawn

    def trajectories(self) -> list[Trajectory]:
        """All prompts to sample, calibration first."""
        first = 1 if self.rule.first_step == "drop" else 0
        keep = [set(range(first, self.steps)) for _ in self.calibration]
        if self.rule.metric in UNSCORED and self.rule.diversity == "none":
            unscored = torch.ones(len(self.calibration), self.steps, 2)
            keep = [set() for _ in self.calibration]
            for choice in select(unscored, self.rule, self.seed):
                keep[choice.prompt].add(choice.step)
        keep += [set() for _ in self.held_out]
        for prompt, step in self.held_out_places():
            keep[len(self.calibration) + prompt].add(step)
        return [
            Trajectory(index, prompt, noise_seed("calibration", self.seed, index), keep[index])
            for index, prompt in enumerate((*self.calibration, *self.held_out))
            # A held-out prompt of which no sample is drawn need not be sampled.
            if keep[index]
        ]


def build(
    folder: Path,
    adapter: ModelAdapter,
    plan: Plan,
    fingerprint: Fingerprint,
    device: torch.device,
) -> None:
    """Sample, select and write a calibration set. All ranks call this with equal arguments.

    The ranks must see the same run folder: the samples that one spills, rank 0 reads.

    Raises:
        ConfigError: The run folder cannot be written.
        NumericsError: The teacher's sampling gave NaN or Inf; nothing is left behind.
    """
    started = time.monotonic()
    scratch = folder.with_name(f"{folder.name}.scratch")
    agree(attempt(lambda: _fresh(scratch) if ranks.rank() == 0 else None))
    expected = sum(len(t.keep) for t in plan.trajectories())
    candidates = Candidates(adapter, plan.rule, plan.branches, scratch, plan.steps, expected)
    try:
        # Whether a set is built or reused must not move the random state that training sees.
        with isolate_rng():
            scores, sketches = _score(candidates, adapter, plan, device)
        choices = select(scores[: len(plan.calibration)], plan.rule, plan.seed, sketches)
        facts = _details(plan, scores, choices, time.monotonic() - started)
        rows = _Rows(candidates, plan, scores, choices)
        write = lambda: write_set(folder, rows, fingerprint, facts)  # noqa: E731 - one attempt
        agree(attempt(lambda: write() if ranks.rank() == 0 else None))
    finally:
        if ranks.rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
    rank_zero_info(
        f"Calibration: {len(choices)} of {len(plan.calibration)} x {plan.steps} candidates and "
        f"{plan.held_out_samples} held-out samples in {folder}, "
        f"{time.monotonic() - started:.1f} s."
    )


@dataclass(frozen=True)
class _Rows:
    """The rows of the set, read from the scratch folder one at a time."""

    candidates: Candidates
    plan: Plan
    scores: Tensor
    choices: list[Choice]

    def __call__(self) -> Iterator[Row]:
        by_index = {t.index: t for t in self.plan.trajectories()}
        for choice in self.choices:
            source = by_index[choice.prompt]
            yield Row(
                self.candidates.sample(choice.prompt, choice.step),
                prompt=source.prompt,
                step=choice.step,
                seed=source.seed,
                change=choice.change,
                gram=choice.gram,
                score=choice.score,
                split="calibration",
                reason=choice.reason,
            )
        for prompt, step in self.plan.held_out_places():
            source = by_index[len(self.plan.calibration) + prompt]
            change, gram = self.scores[source.index, step].tolist()
            yield Row(
                self.candidates.sample(source.index, step),
                prompt=source.prompt,
                step=step,
                seed=source.seed,
                change=change,
                gram=gram,
                score=None,
                split="held_out",
                reason="Held out: drawn uniformly over the steps of a prompt not calibrated on.",
            )


def _score(
    candidates: Candidates, adapter: ModelAdapter, plan: Plan, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Scores [prompts, steps, 2] and sketches of all prompts, the same on every rank."""
    prompts = len(plan.calibration) + len(plan.held_out)
    scores = torch.zeros(prompts, plan.steps, 2, dtype=torch.float64)
    sketches: dict[int, Tensor] = {}
    # Dealt by index: what a rank computes for a prompt depends on the prompt alone.
    share = plan.trajectories()[ranks.rank() :: ranks.world()]

    def sample_share() -> None:
        if not share:
            return
        pipeline = adapter.pipeline(device)
        started = time.monotonic()
        for done, trajectory in enumerate(share, start=1):
            scores[trajectory.index], drawn = candidates.run(pipeline, trajectory, plan.guidance)
            if drawn is not None:
                sketches[trajectory.index] = drawn
            each = (time.monotonic() - started) / done
            rank_zero_info(
                f"Calibration: prompt {done} of {len(share)} sampled, {each:.1f} s each, "
                f"{each * (len(share) - done):.0f} s left."
            )

    with torch.no_grad():
        agree(attempt(sample_share))
    # Every number is computed on one rank and is 0 on the others, so the sums are exact.
    scores = ranks.total(scores.to(device)).cpu()
    return scores, _gather_sketches(sketches, plan, device)


def _gather_sketches(
    sketches: dict[int, Tensor], plan: Plan, device: torch.device
) -> Tensor | None:
    if plan.rule.diversity == "none":
        return None
    width = next((s.shape[1] for s in sketches.values()), 0)
    # A rank without a prompt does not know the width.
    width = int(ranks.maximum(torch.tensor(width, device=device)))
    joined = torch.zeros(len(plan.calibration), plan.steps, width, dtype=torch.float64)
    for index, drawn in sketches.items():
        if index < len(plan.calibration):
            joined[index] = drawn
    return ranks.total(joined.to(device)).cpu()


def _details(plan: Plan, scores: Tensor, choices: list[Choice], seconds: float) -> dict[str, Any]:
    """What `calibration.json` says beside the fingerprint."""
    first = 1 if plan.rule.first_step == "drop" else 0
    place = {(choice.prompt, choice.step): rank for rank, choice in enumerate(choices, start=1)}
    pool = scores[: len(plan.calibration), first:]
    histogram = Counter(choice.step for choice in choices)
    return {
        "prompts": {"calibration": list(plan.calibration), "held_out": list(plan.held_out)},
        "samples": {"calibration": len(choices), "held_out": plan.held_out_samples},
        "histogram": {str(step): histogram[step] for step in range(plan.steps)},
        "rank_correlation": rank_correlation(pool[..., 0], pool[..., 1]),
        "seconds": round(seconds, 3),
        "scores": [
            {
                "prompt": prompt,
                "step": step,
                "C_diff": float(scores[prompt, step, 0]),
                "C_quant": float(scores[prompt, step, 1]),
                "chosen": place.get((prompt, step)),
            }
            for prompt in range(len(plan.calibration))
            for step in range(first, plan.steps)
        ],
    }


def _fresh(scratch: Path) -> None:
    """An empty scratch folder; what a killed run left in it goes."""
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    except OSError as error:
        raise errors.ConfigError(
            f"The run folder {scratch.parent} cannot be written: {error.strerror}. Set "
            "trainer.default_root_dir to a folder that can."
        ) from error
