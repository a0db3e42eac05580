from typing import Any

import pytest
import torch
from torch import Tensor

from recon.errors import ConfigError
from recon.losses.reconstruction import relative_error, token_weighted_error, token_weights
from tests.reference.distillation import (
    column_sums_by_loop,
    weighted_error_by_loop,
    weights_by_loop,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_error_equals_equation_10() -> None:
    student, teacher = draw(2, 5, 3), draw(2, 5, 3, seed=1)
    weight = draw(2, 5, seed=2).abs()
    expected = weighted_error_by_loop(student, teacher, weight)
    assert token_weighted_error(student, teacher, weight).item() == pytest.approx(expected)
    plain = torch.nn.functional.mse_loss(student, teacher)
    torch.testing.assert_close(token_weighted_error(student, teacher, None), plain)
    ones = token_weights(weight, 1.0, 1.0)
    torch.testing.assert_close(token_weighted_error(student, teacher, ones), plain)


def test_gradient_reaches_the_student_only() -> None:
    student, teacher, weight = (
        t.requires_grad_() for t in (draw(2, 5, 3), draw(2, 5, 3), draw(2, 5))
    )
    loss = token_weighted_error(student * 2, teacher, weight)
    loss.backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert weight.grad is None
    expected = 2 * 2 * (student * 2 - teacher) * weight.unsqueeze(-1) / student.numel()
    torch.testing.assert_close(student.grad, expected.detach())


def test_half_precision_is_compared_in_float32() -> None:
    teacher = draw(1, 4, 8).bfloat16()
    loss = token_weighted_error(teacher + 0.125, teacher, None)
    assert loss.dtype == torch.float32


def test_weights_equal_equation_11_on_attention_column_sums() -> None:
    heads, tokens = 3, 6
    sums = [
        column_sums_by_loop(draw(heads, tokens, 4, seed=s), draw(heads, tokens, 4, seed=9 + s))
        for s in (0, 1)
    ]
    for row in sums:  # rows of a softmax sum to 1
        assert sum(row) == pytest.approx(heads * tokens)
    salience = torch.tensor(sums)
    weights = token_weights(salience, 0.5, 1.0)
    expected = torch.tensor([weights_by_loop(row, 0.5, 1.0) for row in sums])
    torch.testing.assert_close(weights, expected)
    assert weights.amin(1).tolist() == [0.5, 0.5]
    assert weights.amax(1).tolist() == [1.0, 1.0]
    torch.testing.assert_close(token_weights(salience * 1e-3, 0.5, 1.0), weights)
    # By data index, in any batch: a cached weight is the recomputed one.
    assert torch.equal(token_weights(salience[1:], 0.5, 1.0), weights[1:])


def test_constant_salience_counts_as_one_even_with_rounding_noise() -> None:
    constant = torch.full((1, 4), 30.0)
    assert token_weights(constant, 0.5, 1.0).tolist() == [[1.0] * 4]
    noisy = constant + torch.tensor([[0.0, 2e-6, 0.0, -2e-6]])
    assert token_weights(noisy, 0.5, 1.0).tolist() == [[1.0] * 4]
    assert token_weights(torch.zeros(1, 3), 0.5, 0.9).tolist() == [[1.0] * 3]


def test_streams_are_stretched_apart() -> None:
    salience = draw(2, 8).abs()
    salience[:, :3] += 100  # text tokens own the maximum
    streams = [slice(0, 3), slice(3, None)]
    weights = token_weights(salience, 0.5, 1.0, groups=streams)
    for stream in streams:
        expected = [weights_by_loop(row, 0.5, 1.0) for row in salience[:, stream].tolist()]
        torch.testing.assert_close(weights[:, stream], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert float(token_weights(salience, 0.5, 1.0)[:, 3:].max()) < 0.52
    with_empty = token_weights(salience, 0.5, 1.0, groups=[slice(0, 0), slice(0, 8)])
    assert torch.equal(with_empty, token_weights(salience, 0.5, 1.0))


def test_padded_tokens_get_zero_and_do_not_move_the_ends() -> None:
    salience = draw(3, 6).abs() + 1
    valid = torch.ones(3, 6, dtype=torch.bool)
    valid[0, 4:] = False
    valid[2] = False
    salience[~valid] = 0  # a masked key receives no attention
    weights = token_weights(salience, 0.5, 1.0, valid=valid)
    assert not weights[~valid].any()
    torch.testing.assert_close(weights[:1, :4], token_weights(salience[:1, :4], 0.5, 1.0))
    clipped = token_weights(salience, 0.5, 1.0, valid=valid, clip_percentile=100)
    torch.testing.assert_close(clipped, weights)


def test_clipping_frees_the_others_from_a_sink_token() -> None:
    salience = torch.linspace(0, 1, 101).unsqueeze(0)
    salience[0, 100] = 1000.0
    weights = token_weights(salience, 0.5, 1.0, clip_percentile=99.0)
    assert weights[0, 50].item() == pytest.approx(0.5 + 0.5 * 0.5 / 0.99, abs=1e-3)
    assert weights[0, 100] == 1
    assert float(token_weights(salience, 0.5, 1.0)[0, 99]) < 0.501


def test_relative_error() -> None:
    teacher = draw(2, 5, 3)
    assert relative_error(teacher, teacher).item() == 0
    assert relative_error(torch.zeros_like(teacher), teacher).item() == pytest.approx(1)
    assert relative_error(teacher * 1.1, teacher).item() == pytest.approx(0.01, rel=1e-4)
    assert relative_error(torch.zeros(2), torch.zeros(2)).item() == 0
    assert relative_error(torch.ones(2), torch.zeros(2)).item() > 1e30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_min": 1.5}, r"need 0 <= lambda_min <= lambda_max, got 1\.5 and 1\.0\. The paper"),
        ({"lambda_min": -0.5}, r"need 0 <= lambda_min <= lambda_max, got -0\.5"),
        ({"clip_percentile": 0}, r"clip_percentile must lie in \(0, 100\], got 0\. Use 99\.9"),
        (
            {"valid": torch.ones(1, 3)},
            r"salience of shape \[2, 4\] and a valid mask of shape \[1, 3",
        ),
        ({"salience": torch.ones(4)}, r"salience of shape \[4\] and a valid mask of shape none"),
        ({"groups": [slice(0, 3)]}, r"do not hold each of the 4 tokens exactly once\. Pass one"),
        ({"groups": [slice(0, 3), slice(2, 4)]}, r"do not hold each of the 4 tokens exactly once"),
    ],
)
def test_broken_weight_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    arguments = {"salience": torch.ones(2, 4), "lambda_min": 0.5, "lambda_max": 1.0, **options}
    with pytest.raises(ConfigError, match=message):
        token_weights(**arguments)


def test_shapes_are_never_broadcast() -> None:
    with pytest.raises(ConfigError, match=r"student of shape \[2, 5, 3\] and a teacher of shape"):
        token_weighted_error(draw(2, 5, 3), draw(1, 5, 3), None)
    with pytest.raises(ConfigError, match=r"weights of shape \[5\] for tokens of shape \[2, 5\]"):
        token_weighted_error(draw(2, 5, 3), draw(2, 5, 3), torch.ones(5))
    with pytest.raises(ConfigError, match=r"relative_error got a student of shape \[2, 5\]"):
        relative_error(draw(2, 5), draw(5))
