"""Answers: what is read from a text, and the numbers of a report against direct computation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from recon.callbacks.answers import measure, summarise
from recon.callbacks.parsing import correct, parse_answer
from recon.errors import NumericsError

CHOICES = ("a star", "a ring", "no shape")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("C.", "C"),
        ("B. a ring", "B"),
        ("ANSWER: C.", "C"),
        ("The answer is B.", "B"),
        ("the answer is (a)\nBECAUSE: it is red", "A"),
        ("A ring", "B"),
        ("a  star.", "A"),
        ("The answer is a shape", None),
        ("D", None),  # there is no fourth choice
        ("Because", None),
        ("", None),
        ("B. None of the answers.", "B"),
        ("B\n\nExplanation: the ring is red.", "B"),
        ("**B**", "B"),
        ("**B.** a ring", "B"),
        ("The answer is **B** because it is round.", "B"),
        ("The answer is B because it is round.", "B"),
        ("The answer is A since it is red.", "A"),
        ("**Answer:** B", "B"),
        ("B. The answer is Z.", "B"),  # no choice is stated, and one stands in front
        ("Answers: B", None),
        # several letters
        ("The answer is B. No, the answer is C.", None),
        ("A. But the answer is C.", None),
        ("A, B", None),
        ("(A) and (B)", None),
        ("The answer is A or B.", None),
        ("A\nB", None),
        ("**A** or **B**", None),
        # articles
        ("B. A ring", "B"),
        ("B, a ring", "B"),
        ("A ring is round", None),
    ],
)
def test_letters_are_read_from_both_formats_and_never_guessed(
    text: str, expected: str | None
) -> None:
    assert parse_answer(text, CHOICES) == expected


def test_a_letter_may_be_the_text_of_a_choice() -> None:
    assert parse_answer("A. B", ("B", "C")) == "A"
    assert parse_answer("A. C", ("B", "D", "E")) is None


def test_short_answers_match_exactly_but_for_case_and_marks() -> None:
    assert correct(parse_answer(" Dark  Red. ", None), "dark red", None)
    assert not correct(parse_answer("red", None), "dark red", None)
    assert parse_answer(" . ", None) is None
    assert not correct(None, "", None)
    assert correct("A", "A", CHOICES)


def made(text: str, logits: Tensor, tokens: list[int]) -> dict[str, Any]:
    return {
        "text": text,
        "log_probabilities": logits.log_softmax(dim=-1),
        "tokens": torch.tensor(tokens),
    }


def outputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, 7, generator=generator)

    tokens = [[1, 2], [3], [4, 5, 6]]
    said = {
        "full_precision": ["red", "B", "2"],
        "round_to_nearest": ["blue", "it depends", "2"],
        "quantized": ["red", "A", ""],
    }
    return {
        "question": ["colour ?", "which ?", "count ?"],
        "answer": ["red", "B", "2"],
        "kind": ["colour", "shape", "count"],
        "choices": [None, CHOICES, None],
        **{
            name: [made(t, draw(len(k)), k) for t, k in zip(texts, tokens, strict=True)]
            for name, texts in said.items()
        },
    }


def test_the_report_counts_and_measures() -> None:
    batch = outputs()
    result = summarise(measure(batch))
    assert result["full_precision"]["accuracy"] == 1
    assert result["full_precision"]["parse_failures"] == 0
    assert result["round_to_nearest"]["accuracy"] == pytest.approx(1 / 3)
    assert result["round_to_nearest"]["parse_failures"] == 1
    quantized = result["quantized"]
    assert (quantized["accuracy/colour"], quantized["accuracy/shape"]) == (1, 0)
    assert (quantized["parse_failures"], quantized["count"]) == (1, 3)
    assert result["paired"]["same_answer"] == pytest.approx(1 / 3)
    assert result["paired_round_to_nearest"]["same_answer"] == pytest.approx(1 / 3)
    # by hand, token by token
    losses, divergences, means = [], [], []
    for reference, found in zip(batch["full_precision"], batch["quantized"], strict=True):
        p, q = reference["log_probabilities"].double(), found["log_probabilities"].double()
        for row, token in enumerate(found["tokens"].tolist()):
            losses.append(-float(q[row, token]))
            terms = (math.exp(p[row, k]) * float(p[row, k] - q[row, k]) for k in range(7))
            divergences.append(sum(terms))
        means.append(sum(divergences[-len(found["tokens"]) :]) / len(found["tokens"]))
    assert quantized["perplexity"] == pytest.approx(math.exp(sum(losses) / 6))
    assert result["paired"]["kl"] == pytest.approx(sum(divergences) / 6)
    assert result["paired"]["kl_median"] == pytest.approx(sorted(means)[1])


def test_a_model_is_at_no_distance_from_itself() -> None:
    batch = outputs()
    batch["quantized"] = batch["full_precision"]
    paired = summarise(measure(batch))["paired"]
    assert paired["kl"] == 0
    assert paired["same_answer"] == 1


def test_refuses_likelihoods_that_are_not_finite() -> None:
    batch = outputs()
    batch["quantized"][0] = made("red", torch.full((2, 7), math.nan), [1, 2])
    with pytest.raises(NumericsError, match=r"log-likelihood of the answer to 'colour \?' is nan"):
        measure(batch)
