import pytest
import torch

from recon.zoo.muon import Muon, orthogonalised


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (2, 32, 8)])
def test_singular_values_move_near_one(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrices))
    assert float(values.min()) > 0.3
    assert float(values.max()) < 1.3


def test_the_direction_is_that_of_the_polar_factor() -> None:
    matrix = torch.randn(1, 12, 20, generator=torch.Generator().manual_seed(1))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(matrix).flatten()
    assert float(torch.cosine_similarity(found, (left @ right).flatten(), dim=0)) > 0.97


def test_it_solves_a_least_squares_problem_and_scales_as_adamw() -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(8, 8))
    other = torch.nn.Parameter(torch.zeros(8, 8))  # same shape, no gradient
    wanted = torch.randn(8, 8)
    optimizer = Muon([weight, other], lr=0.1, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=300)
    for step in range(300):
        optimizer.zero_grad()
        (weight - wanted).square().sum().backward()
        optimizer.step()
        schedule.step()
        if step == 0:
            assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.02, rel=0.3)
    torch.testing.assert_close(weight.detach(), wanted, atol=0.05, rtol=0)
    assert not other.detach().any()
