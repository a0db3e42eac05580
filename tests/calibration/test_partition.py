"""Cutting a chain into blocks: hand examples, the rule step by step, every partition tried."""

import random
from collections.abc import Callable

import pytest

from recon.calibration.partition import fixed_partition, greedy_partition, optimal_partition
from recon.errors import ConfigError
from tests.reference import q_vlm as reference


def sizes(blocks: list[range]) -> list[int]:
    assert [layer for block in blocks for layer in block] == list(range(blocks[-1].stop))
    return [len(block) for block in blocks]


@pytest.mark.parametrize(
    ("dependency", "threshold", "expected"),
    [
        ([2.0, 0.0, 2.0], 1.0, [2, 2]),
        ([0.5, 0.5, 0.5], 1.0, [1, 1, 1, 1]),
        ([3.0, 3.0, 0.1, 3.0, 3.0], 1.0, [3, 3]),
        ([1.0, 1.0], 1.0, [1, 1, 1]),  # equal does not exceed
        ([], 1.0, [1]),
    ],
)
def test_hand_examples(dependency: list[float], threshold: float, expected: list[int]) -> None:
    assert sizes(greedy_partition(dependency, threshold, 3)) == expected
    assert sizes(optimal_partition(dependency, threshold, 3)) == expected


def test_greedy_and_optimum_part_where_looking_ahead_pays() -> None:
    dependency = [1.1, 1.2, 3.0]  # greedy takes the first three and leaves 3.0 outside
    assert sizes(greedy_partition(dependency, 1.0, 3)) == [3, 1]
    assert sizes(optimal_partition(dependency, 1.0, 3)) == [1, 3]


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_the_rule_layer_by_layer(seed: int) -> None:
    draw = random.Random(seed)
    dependency = [draw.uniform(0, 2) for _ in range(draw.randrange(1, 12))]
    largest = draw.randrange(1, 5)
    found = greedy_partition(dependency, 1.0, largest)
    assert [list(block) for block in found] == reference.greedy(dependency, 1.0, largest)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("price", [0.0, 0.004])
def test_the_optimum_is_the_best_of_all_partitions(seed: int, price: float) -> None:
    draw = random.Random(seed)
    dependency = [draw.uniform(0, 2) for _ in range(draw.randrange(1, 9))]
    found = optimal_partition(dependency, 1.0, 3, candidates=5, price=price)
    sizes(found)
    score = reference.gain(found, dependency, 1.0, 5, price)
    every = reference.every_partition(len(dependency) + 1, 3)
    best = max(reference.gain(blocks, dependency, 1.0, 5, price) for blocks in every)
    assert score == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("rule", [greedy_partition, optimal_partition])
def test_the_extremes_of_the_threshold(rule: Callable[..., list[range]]) -> None:
    dependency = [0.3, 1.2, 0.8, 0.1, 2.0, 0.4]
    assert sizes(rule(dependency, float("inf"), 3)) == [1] * 7
    assert sorted(sizes(rule(dependency, -1e6, 3))) in ([1, 3, 3], [2, 2, 3])
    assert sizes(greedy_partition(dependency, float("-inf"), 3)) == [3, 3, 1]


def test_a_price_makes_blocks_smaller() -> None:
    dependency = [2.0] * 5
    assert sizes(optimal_partition(dependency, 1.0, 3, price=0.0)) == [3, 3]
    assert max(sizes(optimal_partition(dependency, 1.0, 3, price=0.05))) == 2
    assert sizes(optimal_partition(dependency, 1.0, 3, price=1.0)) == [1] * 6


def test_fixed_blocks() -> None:
    assert sizes(fixed_partition(8, 3)) == [3, 3, 2]
    assert sizes(fixed_partition(4, 1)) == [1] * 4


def test_blocks_without_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least 1 layer, got 0"):
        fixed_partition(4, 0)
    with pytest.raises(ConfigError, match="must not be negative, got -1"):
        optimal_partition([1.0], 1.0, 3, price=-1)
