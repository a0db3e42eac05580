import math

import pytest
import torch
from torch import Tensor

from recon.errors import ConfigError
from recon.quantizers.salience import (
    aggregate,
    balance_scale,
    ranks,
    spearman,
    timestep_weights,
    weight_salience,
)
from tests.reference import ptq4dit


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def close(found: Tensor, expected: list[float], tolerance: float = 1e-10) -> None:
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_the_golden_vector_of_the_specification() -> None:
    table = torch.tensor([[8.0, 1, 2, 4], [2, 1, 4, 8]])
    weight = torch.tensor([1.0, 4, 2, 3])
    close(spearman(table, weight), [-0.8, -0.2])
    close(timestep_weights(table, weight), [0.6457, 0.3543], 1e-4)
    salience = aggregate(table, weight, "ssc")
    close(salience, [5.8739, 1, 2.7087, 5.4174], 1e-4)
    plain = balance_scale(salience, weight, gauge=False)
    close(plain, [0.4126, 2, 0.8593, 0.7442], 1e-3)
    close(balance_scale(salience, weight), [0.4841, 2.3466, 1.0082, 0.8731], 1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_every_step_equals_the_restated_equations(seed: int) -> None:
    tokens, weights = draw(5, 30, 16, seed=seed), [draw(8, 16, seed=9), draw(3, 16, seed=10)]
    tokens[..., 3] = 0.25 * tokens[..., 2].sign()  # ties between timesteps and channels
    table = tokens.abs().amax(dim=1)
    close(table[0], ptq4dit.activation_salience(tokens[0].tolist()))
    weight = weight_salience(weights)
    close(weight, ptq4dit.weight_salience(torch.cat(weights).tolist()))
    expected = ptq4dit.calibrated_salience(table.tolist(), weight.tolist())
    close(aggregate(table, weight, "ssc"), expected)
    scale = balance_scale(weight.new_tensor(expected), weight, gauge=False)
    close(scale, ptq4dit.balancing(expected, weight.tolist()))


def test_balancing_changes_no_product_and_gives_both_sides_one_salience() -> None:
    x, weight = draw(50, 12, seed=1), draw(7, 12, seed=2)
    activation = x.abs().amax(dim=0)
    scale = balance_scale(activation, weight_salience([weight]), gauge=False)
    torch.testing.assert_close((x * scale) @ (weight / scale).t(), x @ weight.t())
    moved = (x * scale).abs().amax(dim=0)
    torch.testing.assert_close(moved, weight_salience([weight / scale]))
    gauged = balance_scale(activation, weight_salience([weight]))
    assert float(gauged.log().mean()) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(gauged / gauged[0], scale / scale[0])


def test_ranks_of_ties_are_shared() -> None:
    close(ranks(torch.tensor([3.0, 1, 3, 2, 3])), [4, 1, 4, 2, 4])
    values = torch.tensor([2.0, 2, 5, 1, 2, 7, 1])
    close(ranks(values), ptq4dit.average_ranks(values.tolist()))


def test_a_constant_vector_correlates_with_nothing() -> None:
    assert float(spearman(torch.ones(6), torch.arange(6.0))) == 0
    table = torch.stack([torch.ones(4), torch.tensor([1.0, 2, 3, 4])])
    found = timestep_weights(table, torch.tensor([4.0, 3, 2, 1]))
    close(found, ptq4dit.softmax_of_minus([0.0, -1.0]))
    even = aggregate(table, torch.ones(4), "ssc")
    close(even, table.mean(dim=0).tolist())


def test_a_dead_channel_has_a_finite_scale() -> None:
    activation, weight = torch.tensor([1.0, 0, 3]), torch.tensor([2.0, 1, 0])
    scale = balance_scale(activation, weight, gauge=False)
    close(scale, [math.sqrt(2), math.sqrt(1e5), math.sqrt(1e-5 / 3)])
    assert bool(balance_scale(activation, weight).isfinite().all())


def test_rows_of_one_timestep_may_be_repeated_in_its_maximum_and_not_as_rows() -> None:
    table, weight = draw(3, 8, seed=5).abs(), draw(8, seed=6).abs()
    repeated = torch.cat([table, table[:1]])
    assert not torch.allclose(aggregate(repeated, weight, "ssc"), aggregate(table, weight, "ssc"))
    eta = timestep_weights(table, weight)
    spread = 2 * float(spearman(table, weight).abs().max())
    assert float(eta.max() / eta.min()) <= math.exp(spread) + 1e-12


def test_the_other_aggregations() -> None:
    table, weight = torch.tensor([[1.0, 5], [2, 2], [9, 0]]), torch.ones(2)
    close(aggregate(table, weight, "mean"), [4, 7 / 3])
    close(aggregate(table, weight, "max"), [9, 5])
    close(aggregate(table, weight, "midpoint"), [2, 2])
    with pytest.raises(ConfigError, match=r"salience is 'median', which is none of ssc"):
        aggregate(table, weight, "median")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has no rows"):
        aggregate(table[:0], weight, "max")
