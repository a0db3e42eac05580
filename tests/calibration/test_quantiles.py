"""Quantiles from histograms: against sorting, to one bin."""

import pytest
import torch

from recon.calibration.quantiles import two_sided_quantiles

SHARES = (1.0, 0.995, 0.98)


@pytest.mark.parametrize("bins", [256, 2048])
def test_they_are_those_of_sorting_to_one_bin(bins: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5000, 3, generator=generator) * torch.tensor([1.0, 10.0, 0.0])
    tokens[:, 2] = 4.0  # a constant channel
    low, high = tokens.aminmax(dim=0)
    found = two_sided_quantiles(list(tokens.split(700)), low, high, SHARES, bins)
    width = (high - low) / bins
    for share, (below, above) in zip(SHARES, found, strict=True):
        expected = torch.quantile(tokens.double(), torch.tensor([1 - share, share]).double(), dim=0)
        assert ((below - expected[0]).abs() <= 1.5 * width + 1e-4).all()
        assert ((above - expected[1]).abs() <= 1.5 * width + 1e-4).all()
        inside = (tokens >= below) & (tokens <= above)
        assert (inside.double().mean(0) >= 2 * share - 1).all()
    assert torch.equal(torch.stack(found[0]), torch.stack([low, high]))


def test_how_tokens_are_split_changes_nothing() -> None:
    tokens = torch.randn(999, 4, generator=torch.Generator().manual_seed(1))
    low, high = tokens.aminmax(dim=0)
    whole = two_sided_quantiles([tokens], low, high, SHARES)
    parts = two_sided_quantiles(list(tokens.split(10)), low, high, SHARES)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(torch.stack(one), torch.stack(other))
