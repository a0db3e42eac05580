"""Salient data selection against brute force. Spec: s2q_vdit.md, section 8.3."""

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from recon.calibration.selection import (
    SalientSelection,
    check_selection,
    gram_norm,
    latent_change,
    min_max,
    rank_correlation,
    salience,
    select,
    sketch,
)
from recon.errors import ConfigError, NumericsError


def pool(prompts: int = 4, steps: int = 9, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(prompts, steps, 2, generator=generator, dtype=torch.float64)


def places(
    scores: Tensor, seed: int = 0, features: Tensor | None = None, **rule: object
) -> list[tuple[int, int]]:
    chosen = select(scores, SalientSelection(**rule), seed, features)  # type: ignore[arg-type]
    return [(choice.prompt, choice.step) for choice in chosen]


def latents(prompts: int = 3, steps: int = 6, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(prompts, steps, 20, 8, generator=generator)
    return noise.cumsum(dim=1) * scale  # over steps


def scored(x: Tensor) -> Tensor:
    prompts, steps = x.shape[:2]
    scores = torch.zeros(prompts, steps, 2, dtype=torch.float64)
    for p, t in itertools.product(range(prompts), range(steps)):
        if t:
            scores[p, t, 0] = latent_change(x[p, t], x[p, t - 1])
        scores[p, t, 1] = gram_norm(x[p, t])
    return scores


# The two scores


def test_latent_change_is_equation_3() -> None:
    current, previous = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 2.0])
    assert float(latent_change(current, previous)) == pytest.approx(4 / 25)


def test_a_latent_of_zeros_is_refused() -> None:
    with pytest.raises(NumericsError, match="zero everywhere"):
        latent_change(torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize("shape", [(30, 6), (6, 30), (7, 7)])
def test_gram_norms_equal_their_definitions_on_either_side(shape: tuple[int, int]) -> None:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[:, 0] *= 4  # a gap below the largest singular value, so that 20 iterations converge
    gram = x.T @ x
    assert float(gram_norm(x)) == pytest.approx(float(torch.linalg.norm(gram)))
    assert float(gram_norm(x)) == pytest.approx(float(torch.linalg.norm(x @ x.T)))
    top = float(torch.linalg.matrix_norm(gram, 2))
    assert float(gram_norm(x, "spectral")) == pytest.approx(top, rel=1e-6)


def test_spectral_norm_of_zeros_is_zero() -> None:
    assert float(gram_norm(torch.zeros(4, 3), "spectral")) == 0.0


def test_min_max_spans_the_unit_interval_and_a_constant_leaves_the_product_to_the_other() -> None:
    values = torch.tensor([2.0, 5.0, 3.0])
    assert min_max(values).tolist() == pytest.approx([0, 1, 1 / 3])
    constant = torch.full((3,), 7.0)
    assert torch.equal(salience(values, constant), min_max(values))
    assert salience(constant, constant).isfinite().all()


def test_rank_correlation_is_spearmans() -> None:
    one, other = torch.tensor([1.0, 2, 2, 5, 9]), torch.tensor([3.0, 1, 4, 4, 8])
    # Mean ranks [1, 2.5, 2.5, 4, 5] and [2, 1, 3.5, 3.5, 5]: Pearson's correlation of those.
    assert rank_correlation(one, other) == pytest.approx(0.7631578947)
    assert rank_correlation(one, one.exp()) == pytest.approx(1)
    assert rank_correlation(one, -one) == pytest.approx(-1)
    assert rank_correlation(one, torch.ones(5)) is None


# The choice


@pytest.mark.parametrize("metric", ["product", "change", "gram"])
@pytest.mark.parametrize("first_step", ["drop", "zero"])
def test_top_k_equals_brute_force(metric: str, first_step: str) -> None:
    scores = pool()
    scores[:, 0, 0] = 0.0
    start = 1 if first_step == "drop" else 0
    cut = scores[:, start:]
    low, high = cut.amin(dim=(0, 1)), cut.amax(dim=(0, 1))
    scaled = (cut - low) / (high - low)
    value = {"product": scaled.prod(dim=-1), "change": scaled[..., 0], "gram": scaled[..., 1]}
    flat = value[metric].flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], i))[:7]
    expected = [(i // cut.shape[1], i % cut.shape[1] + start) for i in order]
    assert places(scores, top_k=7, metric=metric, first_step=first_step) == expected


def test_ties_go_to_the_lower_prompt_then_step() -> None:
    scores = torch.ones(3, 4, 2, dtype=torch.float64)
    assert places(scores, top_k=5) == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]


def test_the_first_step_is_dropped_or_counts_as_no_change() -> None:
    scores = pool()
    scores[:, 0] = torch.tensor([1e9, 1e9])  # would win, were it read
    assert all(step > 0 for _, step in places(scores, top_k=30))
    zero = select(scores, SalientSelection(top_k=36, first_step="zero"))
    firsts = [c for c in zero if c.step == 0]
    assert len(firsts) == 4
    assert all(c.change == 0 and c.score == 0 for c in firsts)


def test_a_dropped_first_step_may_hold_anything() -> None:
    scores = pool()
    scores[:, 0] = torch.nan
    assert len(places(scores, top_k=5)) == 5


def test_scaling_all_latents_leaves_the_ranking() -> None:
    one, other = scored(latents()), scored(latents(scale=8.0))
    assert places(one, top_k=9) == places(other, top_k=9)
    assert torch.allclose(one[:, 1:, 0], other[:, 1:, 0])


def test_streamed_scores_choose_what_scores_in_memory_choose() -> None:
    x = latents()
    at_once = scored(x)
    streamed = torch.zeros_like(at_once)
    for prompt in range(len(x)):  # prompt by prompt, one previous latent in memory
        previous = None
        for step, current in enumerate(x[prompt]):
            change = 0.0 if previous is None else float(latent_change(current, previous))
            streamed[prompt, step] = torch.tensor([change, float(gram_norm(current))])
            previous = current
    assert torch.allclose(streamed, at_once, rtol=1e-6)
    assert places(streamed, top_k=6) == places(at_once, top_k=6)


def test_a_constant_metric_gives_no_nan() -> None:
    scores = pool()
    scores[..., 1] = 3.0
    chosen = select(scores, SalientSelection(top_k=5))
    assert [(c.prompt, c.step) for c in chosen] == places(scores, top_k=5, metric="change")
    assert all(0 <= c.score <= 1 for c in chosen)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_are_refused_by_place(bad: float) -> None:
    scores = pool()
    scores[2, 3, 1] = bad
    with pytest.raises(NumericsError, match="prompt 2, step 3"):
        select(scores, SalientSelection(top_k=5))


def test_quota_per_prompt_is_respected_and_best_of_the_rest_follow() -> None:
    scores = pool()
    scores[0] += 10  # prompt 0 would take the first eight places
    free = places(scores, top_k=6)
    assert {prompt for prompt, _ in free} == {0}
    held = places(scores, top_k=6, quota="per_prompt", quota_max=2)
    assert max(sum(p == prompt for p, _ in held) for prompt in range(4)) == 2
    assert held[:2] == free[:2]


def test_quota_per_step_bin_defaults_to_twice_the_even_share() -> None:
    scores = pool(prompts=10, steps=50)
    scores[:, 40:, :] += 10  # the last two of ten bins would take all places
    chosen = places(scores, top_k=40, quota="per_step_bin")
    count = [sum(step * 10 // 50 == b for _, step in chosen) for b in range(10)]
    assert len(chosen) == 40
    assert max(count) == 8  # 2 x 40 / 10


def test_a_larger_k_only_adds() -> None:
    scores = pool()
    assert places(scores, top_k=12)[:5] == places(scores, top_k=5)


def test_random_is_seeded_and_blind_to_the_scores() -> None:
    one = places(pool(), seed=1, top_k=8, metric="random")
    assert one == places(pool(seed=9), seed=1, top_k=8, metric="random")
    assert one != places(pool(), seed=2, top_k=8, metric="random")
    assert len(set(one)) == 8
    assert all(step > 0 for _, step in one)


def test_uniform_covers_prompts_and_steps_evenly() -> None:
    chosen = places(pool(prompts=10, steps=50), top_k=40, metric="uniform")
    assert len(set(chosen)) == 40
    assert {sum(p == prompt for p, _ in chosen) for prompt in range(10)} == {4}
    assert places(pool(), top_k=32, metric="uniform") == [
        (p, s) for p in range(4) for s in range(1, 9)
    ]


def test_farthest_point_spreads_and_keeps_the_best() -> None:
    scores = pool(prompts=2, steps=11)
    features = torch.zeros(2, 11, 1)
    features[0, 6:], features[1, 6:] = 5.0, 9.0
    best = places(scores, top_k=1)[0]
    chosen = places(
        scores, features=features, top_k=3, diversity="farthest_point", diversity_pool=6.0
    )
    assert chosen[0] == best
    assert {float(features[c]) for c in chosen} == {0.0, 5.0, 9.0}


def test_farthest_point_with_a_quota_still_fills_top_k() -> None:
    scores = pool(prompts=3, steps=9)
    scores[0] += 10
    features = torch.rand(3, 9, 4, generator=torch.Generator().manual_seed(0))
    for factor in (1.0, 1.5, 2.0):
        chosen = places(
            scores, features=features, top_k=9, quota="per_prompt", quota_max=3,
            diversity="farthest_point", diversity_pool=factor,
        )  # fmt: skip
        assert sorted(p for p, _ in chosen) == [0] * 3 + [1] * 3 + [2] * 3


def test_a_sketch_has_one_length_and_tells_candidates_apart() -> None:
    x = latents()
    assert sketch(x[0, 0]).shape == sketch(x[0, 1][:13]).shape == (64,)
    assert not torch.equal(sketch(x[0, 0]), sketch(x[0, 1]))


def test_every_choice_says_why() -> None:
    chosen = select(pool(), SalientSelection(top_k=2, quota="per_prompt"))
    assert chosen[0].reason.startswith("Salience ")
    assert "rank 1 of 32" in chosen[0].reason
    assert chosen[0].reason.endswith("within the quota per_prompt.")
    assert "random" in select(pool(), SalientSelection(top_k=1, metric="random"))[0].reason


# Refusals


def test_k_larger_than_the_pool_names_the_numbers() -> None:
    rule = SalientSelection(top_k=40)
    check_selection(rule, prompts=10, steps=5)
    with pytest.raises(ConfigError, match=r"top_k is 40, but 4 prompts of 10 steps.*only 36"):
        check_selection(rule, prompts=4, steps=10)
    check_selection(dataclasses.replace(rule, first_step="zero"), prompts=4, steps=10)


def test_a_quota_that_starves_top_k_names_the_numbers() -> None:
    rule = SalientSelection(top_k=20, quota="per_prompt", quota_max=4)
    with pytest.raises(ConfigError, match="at most 4 from each of 4 groups lets only 16"):
        check_selection(rule, prompts=4, steps=10)


def test_farthest_point_without_sketches_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs the sketches"):
        select(pool(), SalientSelection(top_k=2, diversity="farthest_point"))


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"top_k": 0}, "sds.top_k must be at least 1, got 0"),
        ({"quota_bins": 0}, "sds.quota_bins must be at least 1, got 0"),
        ({"diversity_pool": 0.5}, "sds.diversity_pool must be at least 1.0, got 0.5"),
        ({"quota_max": 0}, "sds.quota_max must be at least 1 or null"),
        ({"metric": "uniform", "quota": "per_prompt"}, "sds.metric is uniform"),
        ({"metric": "uniform", "diversity": "farthest_point"}, "sds.metric is uniform"),
    ],
)
def test_bad_switches_are_refused(switches: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SalientSelection(**switches)  # type: ignore[arg-type]


def test_the_defaults_are_those_of_the_specification() -> None:
    rule = SalientSelection()
    assert (rule.top_k, rule.source, rule.norm, rule.quota) == (40, "latent", "fro", "none")
    assert (rule.diversity, rule.first_step, rule.metric) == ("none", "drop", "product")
