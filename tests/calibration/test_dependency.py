"""The dependency of neighbouring layers: against loops, and what must not change it."""

import math

import pytest
import torch
from torch import Tensor

from recon.calibration.dependency import (
    conditional_entropy,
    joint_histogram,
    soft_assignment,
    span,
)
from recon.errors import ConfigError
from tests.reference import q_vlm as reference

LEVELS = 5
RANGES = ((-1.5, 0.75), (-2.0, 0.9))


def states(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Hidden states of two layers, the second partly a function of the first."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(*shape, generator=generator)
    return first, 0.7 * first + 0.5 * torch.randn(*shape, generator=generator)


def table(first: Tensor, second: Tensor, literal: bool = False) -> Tensor:
    (low, step), (low2, step2) = RANGES
    return joint_histogram(
        soft_assignment(first, low, step, LEVELS, literal=literal),
        soft_assignment(second, low2, step2, LEVELS, literal=literal),
    )


@pytest.mark.parametrize("literal", [False, True])
def test_histogram_and_entropy_are_those_of_the_loops(literal: bool) -> None:
    first, second = states(0, 3, 7)
    plain = reference.joint_table(
        first.flatten().tolist(), second.flatten().tolist(), RANGES, LEVELS, literal
    )
    found = table(first, second, literal)
    expected = torch.tensor(plain, dtype=torch.float64)
    torch.testing.assert_close(found / 21, expected, rtol=1e-12, atol=1e-15)
    assert float(found.sum()) == pytest.approx(21, rel=1e-12)
    assert float(conditional_entropy(found)) == pytest.approx(
        reference.dependency(plain), rel=1e-11
    )


def test_the_literal_exponent_depends_on_the_units_and_ours_does_not() -> None:
    first, _ = states(1, 50)
    for literal in (False, True):
        ours = soft_assignment(first, -1.5, 0.75, LEVELS, literal=literal)
        scaled = soft_assignment(100 * first, -150, 75, LEVELS, literal=literal)
        assert torch.allclose(ours, scaled) != literal


@pytest.mark.parametrize("seed", range(8))
def test_the_entropy_lies_between_nothing_and_log_m(seed: int) -> None:
    first, second = states(seed, 40)
    spread = 10.0 ** (seed - 4)
    found = float(conditional_entropy(table(spread * first, spread * second, seed % 2 == 0)))
    assert 0 <= found <= math.log(LEVELS) + 1e-12


def test_both_ends_of_the_interval_are_reached() -> None:
    identity = torch.eye(LEVELS, dtype=torch.float64)
    assert float(conditional_entropy(identity[[1, 0, 3, 2, 4]])) == 0  # a function of the bin
    flat = torch.ones(LEVELS, LEVELS, dtype=torch.float64)
    assert float(conditional_entropy(flat)) == pytest.approx(math.log(LEVELS), rel=1e-12)
    assert float(conditional_entropy(0 * flat)) == 0
    # Far from every border between points, the soft assignment is hard.
    first = torch.tensor([0.0, 100.0, 200.0, 100.0])
    hard = soft_assignment(first, 0.0, 100.0, 3, literal=True)
    assert float(conditional_entropy(joint_histogram(hard, hard.flip(-1)))) < 1e-3


def test_batches_add_up_and_repeated_tokens_change_nothing() -> None:
    first, second = states(2, 6, 11, 3)
    whole = table(first, second)
    parts = sum(table(a, b) for a, b in zip(first, second, strict=True))
    assert isinstance(parts, Tensor)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    twice = table(first.repeat(1, 2, 1), second.repeat(1, 2, 1))
    torch.testing.assert_close(
        conditional_entropy(twice), conditional_entropy(whole), rtol=1e-12, atol=0
    )


def test_half_precision_states_are_assigned_in_float64() -> None:
    first = states(3, 9)[0].bfloat16()
    found = soft_assignment(first, -1.5, 0.75, LEVELS)
    assert found.dtype == torch.float64
    assert torch.equal(found, soft_assignment(first.double(), -1.5, 0.75, LEVELS))


def test_a_span_has_as_many_terms_as_pairs() -> None:
    assert span([1.0, 2.0, 4.0], 0, 2) == 3.0
    assert span([1.0, 2.0, 4.0], 1, 1) == 0


def test_a_grid_without_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"positive step and at least 2 levels, got 0\.0"):
        soft_assignment(torch.zeros(3), 0.0, 0.0, 4)


def test_the_entropy_is_differentiable_in_the_hidden_states_and_empty_cells_have_no_gradient() -> (
    None
):
    first, second = (part.double().requires_grad_(True) for part in states(2, 4, 5))
    assert torch.autograd.gradcheck(lambda a, b: conditional_entropy(table(a, b)), (first, second))
    hard = torch.diag(torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)).requires_grad_(True)
    conditional_entropy(hard).backward()
    assert hard.grad is not None
    assert hard.grad.isfinite().all()
