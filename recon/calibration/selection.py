"""Salient data selection: which (prompt, step) candidates of the teacher's sampling calibrate best.

A candidate is the network's input at one denoising step of one prompt. Two numbers describe it:
how far the latent moved since the step before, and the norm of its Gram matrix, which bounds how
much a weight error costs there (the Hessian of a linear layer is twice the Gram matrix). Both must
be high. Only these numbers enter `select`, so a pool of any size is streamed.

Source: S²Q-VDiT (arXiv 2508.04016), section on salient data selection, eqs. 3-8.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recon.errors import ConfigError, NumericsError
from recon.quantizers.salience import ranks

Norm = Literal["fro", "spectral"]
Metric = Literal["product", "change", "gram", "random", "uniform", "stratified"]
UNSCORED = ("random", "uniform", "stratified")
"""Metrics whose choice depends on no score: it is known before anything is sampled."""

POWER_ITERATIONS = 20
"""Steps of the power method for the spectral norm; our choice, 20 suffice for a norm."""
SKETCH_BINS = 8
"""Token bins of the sketch that `farthest_point` measures distances in."""


@dataclass(frozen=True)
class SalientSelection:
    """How the calibration samples are chosen: the `sds.*` switches.

    The defaults are the paper's, or where it is silent the reading explained at each field.
    `metric: random` and `metric: uniform` are the controls the paper compares with.

    Raises:
        ConfigError: A number is out of range, or two switches contradict each other.
    """

    top_k: int = 40
    """Samples to keep. Source: the paper, K = 40."""
    metric: Metric = "product"
    """What ranks a candidate: `product` of both scaled scores (the paper, eq. 8), latent `change`
    or `gram` norm alone (its ablation), a seeded `random` draw, `uniform` spacing over the pool,
    or `stratified`: evenly spaced steps, the last among them, and prompts in turn."""
    timesteps: int = 25
    """Distinct steps of `metric: stratified`, from the first to the last. Source: PTQ4DiT at 256²;
    deviates: its code never reaches the last step."""
    source: Literal["latent", "hidden_patch_embed"] = "latent"
    """What x_t is: the `latent` cut into the patches that the network reads, or the tokens after
    the patch embedding. The paper is ambiguous; the latent is our reading."""
    norm: Norm = "fro"
    """Norm of the Gram matrix: Frobenius, or `spectral` by 20 power iterations. The paper writes
    a norm without a name; its timing excludes a singular value decomposition."""
    quota: Literal["none", "per_prompt", "per_step_bin"] = "none"
    """Limit to what one prompt, or one bin of consecutive steps, may contribute. The paper has
    none; without one the choice can gather at the same few steps of all prompts."""
    quota_bins: int = 10
    """Bins of equal width over the steps, for `quota: per_step_bin`."""
    quota_max: int | None = None
    """Most samples of one prompt or bin; null: twice the even share, rounded up."""
    first_step: Literal["drop", "zero"] = "drop"
    """The first step has no step before it: leave it out of the pool, or count its change as 0."""
    diversity: Literal["none", "farthest_point"] = "none"
    """`farthest_point`: of the `diversity_pool` x top_k best candidates keep those farthest apart,
    beginning with the best. Ours, not the paper's."""
    diversity_pool: float = 2.0
    """Size of the short list for `farthest_point`, in multiples of top_k."""

    def __post_init__(self) -> None:
        """Refuse numbers and combinations that cannot select."""
        for field, least in (
            ("top_k", 1),
            ("quota_bins", 1),
            ("diversity_pool", 1.0),
            ("timesteps", 2),
        ):
            value = getattr(self, field)
            if not value >= least:
                raise ConfigError(f"sds.{field} must be at least {least}, got {value}.")
        if self.quota_max is not None and self.quota_max < 1:
            raise ConfigError(
                f"sds.quota_max must be at least 1 or null (twice the even share), got "
                f"{self.quota_max}."
            )
        spreads = self.metric in ("uniform", "stratified")
        if spreads and (self.quota != "none" or self.diversity != "none"):
            raise ConfigError(
                f"sds.metric is {self.metric}, which spreads by itself, but sds.quota is "
                f"{self.quota} and sds.diversity is {self.diversity}. Set both to none, or choose "
                "another metric."
            )


@dataclass(frozen=True)
class Choice:
    """One selected candidate."""

    prompt: int
    """Index of the prompt."""
    step: int
    """Sampling step, 0 is the first."""
    change: float
    """C_diff, eq. 3."""
    gram: float
    """C_quant, eq. 6."""
    score: float
    """The number the candidate was ranked by, in [0, 1]."""
    reason: str
    """One sentence: why it was chosen."""


# The two scores of a candidate


def latent_change(current: Tensor, previous: Tensor) -> Tensor:
    """C_diff: squared distance to the previous step over the squared norm, float64 scalar.

    Args:
        current: x_t, any shape.
        previous: The same prompt's tensor one sampling step earlier, same shape.

    Raises:
        NumericsError: `current` is zero everywhere: its relative change is not defined.

    Source: S²Q-VDiT, eq. 3, with t-1 read as the previous step in sampling.
    """
    size = current.double().square().sum()  # over all axes
    if size == 0:
        raise NumericsError(
            "A latent is zero everywhere, so its relative change is not defined. Check the "
            "scheduler and the teacher's output."
        )
    return (current.double() - previous.double()).square().sum() / size


def gram_norm(tokens: Tensor, norm: Norm = "fro") -> Tensor:
    """C_quant: norm of the Gram matrix x^T x, float64 scalar.

    The Frobenius norm is taken on the smaller side, ||x^T x|| = ||x x^T||; the spectral norm is
    the largest singular value squared, by power iterations that never form a Gram matrix.

    Args:
        tokens: x, [tokens, channels].
        norm: `fro` or `spectral`.

    Source: S²Q-VDiT, eq. 6.
    """
    x = tokens.double()
    if norm == "fro":
        small = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
        return small.norm()
    # A fixed random start is never orthogonal to the leading direction, as a vector of ones is.
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(x.shape[1], generator=generator, dtype=torch.float64).to(x.device)
    for _ in range(POWER_ITERATIONS):
        vector = x.T @ (x @ vector)
        vector = vector / vector.norm().clamp_min(torch.finfo(torch.float64).tiny)
    return (x @ vector).square().sum()


def sketch(tokens: Tensor) -> Tensor:
    """A short description of a candidate for distances: token-bin means, [SKETCH_BINS x channels].

    Args:
        tokens: [tokens, channels].
    """
    bins = torch.nn.functional.adaptive_avg_pool1d(tokens.double().T[None], SKETCH_BINS)
    return bins.flatten()


def min_max(values: Tensor) -> Tensor:
    """Values scaled to [0, 1] over the whole pool.

    A constant pool becomes ones: a metric that cannot tell candidates apart must leave the
    product, and so the ranking, to the other metric; eq. 7 as written would divide 0 by 0.

    Source: S²Q-VDiT, eq. 7.
    """
    low, high = values.min(), values.max()
    if high <= low:
        return torch.ones_like(values)
    return (values - low) / (high - low)


def salience(change: Tensor, gram: Tensor) -> Tensor:
    """C_sample: product of both scores, each scaled to [0, 1] over the pool.

    Source: S²Q-VDiT, eq. 8.
    """
    return min_max(change) * min_max(gram)


def rank_correlation(one: Tensor, other: Tensor) -> float | None:
    """Spearman's correlation of two scores over the pool; None where one of them is constant.

    A value near 1 says that the product adds nothing to either metric alone.
    """
    both = ranks(torch.stack([one.flatten(), other.flatten()]))
    if bool((both.amax(dim=1) == both.amin(dim=1)).any()):  # over candidates
        return None
    return float(torch.corrcoef(both)[0, 1])


# The choice


def pool_size(rule: SalientSelection, prompts: int, steps: int) -> int:
    """Number of candidates that may be chosen."""
    return prompts * (steps - (rule.first_step == "drop"))


def check_selection(rule: SalientSelection, prompts: int, steps: int) -> None:
    """Refuse a rule that the pool cannot satisfy, before any candidate exists.

    Raises:
        ConfigError: top_k is larger than the pool, or than what the quota lets through.
    """
    size = pool_size(rule, prompts, steps)
    if rule.top_k > size:
        without = ", the first of each dropped" if rule.first_step == "drop" else ""
        raise ConfigError(
            f"sds.top_k is {rule.top_k}, but {prompts} prompts of {steps} steps{without} give "
            f"only {size} candidates. Lower top_k, or raise num_prompts or steps."
        )
    if rule.metric == "stratified":
        most = prompts * len(_strata(rule, steps))
        if rule.top_k > most:
            raise ConfigError(
                f"sds.top_k is {rule.top_k}, but {prompts} prompts at {rule.timesteps} of {steps} "
                f"steps give {most} samples. Lower top_k, or raise sds.timesteps or the number of "
                "prompts."
            )
    limit = _quota_limit(rule, prompts)
    groups = Counter(_group(rule, c, steps) for c in _candidates(rule, prompts, steps))
    reachable = sum(min(limit, count) for count in groups.values())
    if rule.quota != "none" and rule.top_k > reachable:
        raise ConfigError(
            f"sds.top_k is {rule.top_k}, but sds.quota {rule.quota} with at most {limit} from each "
            f"of {len(groups)} groups lets only {reachable} through. Raise quota_max or lower "
            "top_k."
        )


def select(
    scores: Tensor, rule: SalientSelection, seed: int = 0, features: Tensor | None = None
) -> list[Choice]:
    """The chosen candidates, best first; ties go to the lower prompt, then the lower step.

    Args:
        scores: C_diff and C_quant of every candidate, [prompts, steps, 2]; the change of step 0
            is read only under `first_step: zero`, where it counts as 0.
        rule: The switches.
        seed: Seed of `metric: random`.
        features: Sketches [prompts, steps, features], needed by `diversity: farthest_point`.

    Raises:
        ConfigError: The pool is too small for the rule, or the rule needs features.
        NumericsError: A score of the pool is NaN or infinite.
    """
    prompts, steps, _ = scores.shape
    check_selection(rule, prompts, steps)
    if rule.diversity == "farthest_point" and features is None:
        raise ConfigError("sds.diversity farthest_point needs the sketches of the candidates.")
    value = _ranking_values(scores, rule, seed)
    pool = _candidates(rule, prompts, steps)
    ranked = sorted(pool, key=lambda c: (-float(value[c]), c))
    limit = _quota_limit(rule, prompts)
    if rule.metric == "uniform":
        # The middle of each of top_k equal stretches of the pool, in (prompt, step) order.
        chosen = [pool[(2 * k + 1) * len(pool) // (2 * rule.top_k)] for k in range(rule.top_k)]
    elif rule.metric == "stratified":
        chosen = _stratified(rule, prompts, steps)
    elif features is None or rule.diversity == "none":
        chosen = _take(ranked, rule, steps, rule.top_k, limit)
    else:
        # The quota is widened by the same factor, so that the short list can always fill top_k.
        wanted = math.ceil(rule.diversity_pool * rule.top_k)
        short = _take(ranked, rule, steps, wanted, int(rule.diversity_pool * limit))
        chosen = _farthest(short, features, rule, steps, limit)
    place = {candidate: index + 1 for index, candidate in enumerate(ranked)}
    return [_choice(c, scores, value, rule, place[c], len(pool)) for c in chosen]


Candidate = tuple[int, int]
"""(prompt, step)."""


def _candidates(rule: SalientSelection, prompts: int, steps: int) -> list[Candidate]:
    first = 1 if rule.first_step == "drop" else 0
    return [(prompt, step) for prompt in range(prompts) for step in range(first, steps)]


def _ranking_values(scores: Tensor, rule: SalientSelection, seed: int) -> Tensor:
    """What candidates are ranked by, [prompts, steps] in [0, 1]; the dropped step carries -1."""
    prompts = len(scores)
    first = 1 if rule.first_step == "drop" else 0
    pool = scores[:, first:].double().clone()
    if first == 0:
        pool[:, 0, 0] = 0.0
    bad = (~pool.isfinite()).any(dim=-1).nonzero()  # over the two scores
    if len(bad):
        prompt, step = bad[0].tolist()
        raise NumericsError(
            f"The scores of prompt {prompt}, step {step + first} are {pool[prompt, step].tolist()}"
            ": NaN or Inf in the teacher's latents. Check the weights and the dtype."
        )
    change, gram = pool.unbind(dim=-1)
    if rule.metric in UNSCORED:
        generator = torch.Generator().manual_seed(seed)
        value = torch.rand(change.shape, generator=generator, dtype=torch.float64)
    else:
        by_metric = {"product": salience(change, gram), "change": min_max(change)}
        value = by_metric.get(rule.metric, min_max(gram))
    dropped = torch.full((prompts, first), -1.0, dtype=torch.float64)
    return torch.cat([dropped, value.cpu()], dim=1)


def _group(rule: SalientSelection, candidate: Candidate, steps: int) -> int:
    """The quota group a candidate counts for."""
    if rule.quota == "per_prompt":
        return candidate[0]
    return candidate[1] * rule.quota_bins // steps if rule.quota == "per_step_bin" else 0


def _quota_limit(rule: SalientSelection, prompts: int) -> int:
    if rule.quota == "none":
        return rule.top_k
    groups = prompts if rule.quota == "per_prompt" else rule.quota_bins
    return rule.quota_max if rule.quota_max is not None else 2 * -(-rule.top_k // groups)


def _stratified(rule: SalientSelection, prompts: int, steps: int) -> list[Candidate]:
    """Prompts in turn; each goes on one step further at its next turn, so that none comes twice."""
    places = _strata(rule, steps)
    rounds = (divmod(k, prompts) for k in range(rule.top_k))
    return [(prompt, places[(prompt + turn) % len(places)]) for turn, prompt in rounds]


def _strata(rule: SalientSelection, steps: int) -> list[int]:
    """The distinct steps of `metric: stratified`: evenly spaced, first and last of the pool."""
    first = 1 if rule.first_step == "drop" else 0
    count = min(rule.timesteps, steps - first)
    return [first + round(k * (steps - 1 - first) / max(count - 1, 1)) for k in range(count)]


def _take(
    ranked: list[Candidate], rule: SalientSelection, steps: int, wanted: int, limit: int
) -> list[Candidate]:
    """The best `wanted` candidates with at most `limit` of each quota group."""
    taken: list[Candidate] = []
    used: Counter[int] = Counter()
    for candidate in ranked:
        group = _group(rule, candidate, steps)
        if len(taken) < wanted and (rule.quota == "none" or used[group] < limit):
            taken.append(candidate)
            used[group] += 1
    return taken


def _farthest(
    short: list[Candidate], features: Tensor, rule: SalientSelection, steps: int, limit: int
) -> list[Candidate]:
    """Greedy farthest points of the short list, from its best on; equal distances by rank."""
    points = torch.stack([features[c].double() for c in short])
    nearest = torch.full((len(short),), torch.inf, dtype=torch.float64)
    open_ = torch.ones(len(short), dtype=torch.bool)
    used: Counter[int] = Counter()
    chosen: list[Candidate] = []
    while len(chosen) < rule.top_k:
        index = int(torch.where(open_, nearest, -1.0).argmax())  # first of the largest: best rank
        open_[index] = False
        group = _group(rule, short[index], steps)
        if rule.quota != "none" and used[group] >= limit:
            continue
        used[group] += 1
        chosen.append(short[index])
        nearest = torch.minimum(nearest, (points - points[index]).norm(dim=1))
    return chosen


def _choice(
    candidate: Candidate,
    scores: Tensor,
    value: Tensor,
    rule: SalientSelection,
    rank: int,
    size: int,
) -> Choice:
    prompt, step = candidate
    change, gram = scores[prompt, step].tolist()
    if rule.first_step == "zero" and step == 0:
        change = 0.0
    score = float(value[prompt, step])
    measured = f"latent change {change:.4g}, Gram norm {gram:.4g}"
    how = {
        "product": f"Salience {score:.4g} is rank {rank} of {size} ({measured})",
        "change": f"Latent change {change:.4g} is rank {rank} of {size}",
        "gram": f"Gram norm {gram:.4g} is rank {rank} of {size}",
        "random": f"Drawn at random from {size} candidates ({measured})",
        "stratified": f"Step {step}, one of {rule.timesteps} evenly spaced ones ({measured})",
        "uniform": f"Evenly spaced over {size} candidates ({measured})",
    }[rule.metric]
    if rule.diversity != "none":
        how += ", and it lies far from the others chosen"
    if rule.quota != "none":
        how += f", within the quota {rule.quota}"
    return Choice(prompt, step, change, gram, score, f"{how}.")
