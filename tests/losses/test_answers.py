"""Terms of the visual encoder's objective, against libraries and plain arithmetic."""

import pytest
import torch

from recon.errors import ConfigError
from recon.losses.answers import answer_cross_entropy, relative_distance


def test_the_cross_entropy_is_that_of_the_next_tokens_of_the_answer() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 6, 9, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[5, -100, -100, 2, 7, -100]])
    shares = logits[0].softmax(-1)
    expected = -(shares[2, 2].log() + shares[3, 7].log()) / 2
    assert float(answer_cross_entropy(logits, labels)) == pytest.approx(float(expected), rel=1e-6)


def test_labels_without_an_answer_are_refused() -> None:
    with pytest.raises(ConfigError, match="labels name no token of an answer"):
        answer_cross_entropy(torch.zeros(1, 3, 4), torch.tensor([[1, -100, -100]]))


def test_the_distance_is_relative_and_moves_only_what_was_found() -> None:
    found = torch.tensor([[3.0, 0.0]], requires_grad=True)
    expected = torch.tensor([[0.0, 4.0]], requires_grad=True)
    distance = relative_distance(found, expected)
    assert distance.item() == pytest.approx(5 / 4)
    distance.backward()
    assert found.grad is not None
    assert found.grad.tolist() == [[pytest.approx(3 / 20), pytest.approx(-4 / 20)]]
    assert expected.grad is None
    # Where nothing is wrong there is nothing to gain.
    same = torch.ones(2, requires_grad=True)
    relative_distance(same, torch.ones(2)).backward()
    assert same.grad is not None
    assert torch.equal(same.grad, torch.zeros(2))
