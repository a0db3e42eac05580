"""Plans of joint searches, against every combination tried."""

from itertools import product

import pytest
import torch
from torch import Tensor

from recon.calibration.search import CoordinateSearch, ProductSearch, SearchPlan, Settings


def toy_error(settings: Settings, seed: int = 0) -> float:
    """An error that depends on every choice made so far, the same for the same choices."""
    text = hash((seed, settings))
    return float(torch.rand((), generator=torch.Generator().manual_seed(text % 2**31)))


def walked(plan: SearchPlan, seed: int) -> tuple[Tensor, list[Settings]]:
    """All steps of a plan, one after the other."""
    errors = torch.full((plan.steps,), torch.nan, dtype=torch.float64)
    visited = []
    for step in range(plan.steps):
        visited.append(plan.settings(step, errors))
        errors[step] = toy_error(visited[-1], seed)
    return errors, visited


@pytest.mark.parametrize(("layers", "steps"), [(1, 5), (2, 30), (3, 155)])
def test_a_product_search_takes_5_30_or_155_steps(layers: int, steps: int) -> None:
    plan = ProductSearch([4] * layers, 5)
    assert plan.steps == steps
    _, visited = walked(plan, 0)
    assert len(set(visited)) == steps
    # Depth first: the parent of every node is the last one of its depth, so it need not run again.
    last: dict[int, Settings] = {}
    for settings in visited:
        assert len(settings) == 1 or last[len(settings) - 1] == settings[:-1]
        last[len(settings)] = settings


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_product_search_finds_the_best_of_all_combinations(seed: int, layers: int) -> None:
    plan = ProductSearch([2] * layers, 3)
    outcome = plan.outcome(walked(plan, seed)[0])
    every = [tuple((c,) * 2 for c in node) for node in product(range(3), repeat=layers)]
    assert outcome.joint_error == min(toy_error(settings, seed) for settings in every)
    assert toy_error(outcome.joint, seed) == outcome.joint_error
    warm: Settings = ()
    for _ in range(layers):  # layer by layer, each the best for itself
        warm = min((((*warm, (c, c))) for c in range(3)), key=lambda s: toy_error(s, seed))
    assert outcome.warm == warm
    assert outcome.joint_error <= outcome.warm_error == toy_error(warm, seed)


def test_equal_errors_keep_the_warm_start() -> None:
    plan = ProductSearch([1, 1], 2)
    outcome = plan.outcome(torch.tensor([2.0, 7, 7, 1, 7, 7], dtype=torch.float64))
    assert outcome.warm == outcome.joint == ((1,), (0,))


@pytest.mark.parametrize("seed", range(6))
def test_the_coordinate_search_moves_one_site_at_a_time_and_only_downhill(seed: int) -> None:
    plan = CoordinateSearch([2, 1], 3, sweeps=2)
    assert plan.steps == 3 * (2 + 2 * 3)
    errors, visited = walked(plan, seed)
    outcome = plan.outcome(errors)
    first = min(((c, c) for c in range(3)), key=lambda s: toy_error((s,), seed))
    second = min(((c,) for c in range(3)), key=lambda s: toy_error((first, s), seed))
    current = [*first, *second]
    assert outcome.warm == (first, second)
    best = toy_error((first, second), seed)
    for site in (0, 1, 2) * 2:
        for candidate in range(3):
            tried = [*current[:site], candidate, *current[site + 1 :]]
            settings = ((tried[0], tried[1]), (tried[2],))
            if toy_error(settings, seed) < best:
                best, kept = toy_error(settings, seed), tried
        current = kept if best < toy_error(((current[0], current[1]), (current[2],)), seed) else (
            current
        )  # fmt: skip
    assert outcome.joint == ((current[0], current[1]), (current[2],))
    assert outcome.joint_error == best <= outcome.warm_error
    assert all(len(settings) == 2 for settings in visited[3:])


def test_a_plan_needs_only_the_errors_before_the_step() -> None:
    plan = CoordinateSearch([2, 2], 3, sweeps=2)
    errors, visited = walked(plan, 3)
    for step in range(plan.steps):
        known = errors.clone()
        known[step:] = torch.nan
        assert plan.settings(step, known) == visited[step]
