"""Answers of the quantised model against the full-precision one's, and against the right ones."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from recon.calibration import ranks
from recon.callbacks.evaluating import Evaluating
from recon.callbacks.evaluation_result import MODELS, Row, report
from recon.callbacks.gathering import gather_rows
from recon.callbacks.parsing import correct, parse_answer
from recon.callbacks.quality import bootstrap_interval
from recon.errors import NumericsError

DEFINITIONS = {
    "accuracy": "share of questions whose greedy answer is the right one, exactly; what cannot be "
    "parsed is wrong",
    "parse_failures": "questions whose answer could not be parsed; none is replaced by a guess",
    "perplexity": "exp of the mean negative log-likelihood of the right answers' tokens, end of "
    "turn included, teacher-forced",
    "kl": "KL divergence from the full-precision model's distribution of the next token to this "
    "model's, nats; mean over the right answers' tokens",
    "kl_median": "that divergence of the median question, a mean over its right answer's tokens",
    "same_answer": "share of questions to which both models say the same text",
}


class AnswerMetrics(Evaluating):
    """Measures greedy answers, and the likelihood of the right ones, of all models.

    Writes `test.json` (or `validate.json`) into the run folder, logs the means and prints a
    table; `recon predict` leaves the quantised model's answers in `predictions`.

    Args:
        show: Print the table.
    """

    def __init__(self, show: bool = True) -> None:
        self.show = show
        self._rows: list[Row] = []

    def begin(self, trainer: Trainer) -> None:
        """See `Evaluating`."""
        self._rows = []

    def look(self, trainer: Trainer, outputs: Any, verb: str) -> None:
        """Measures the batch; distributions are not kept."""
        if isinstance(outputs, Mapping) and isinstance(outputs.get("quantized"), list):
            self._rows += measure(outputs)

    def finish(self, trainer: Trainer, module: LightningModule, verb: str) -> None:
        """Writes `validate.json` or `test.json`, logs and shows the means."""
        if trainer.sanity_checking:
            return
        rows = gather_rows(self._rows, module.device)
        if rows:
            result = summarise(rows)
            report(trainer, module, verb, result, rows, {}, DEFINITIONS, show=self.show)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the batch's answers, one line each."""
        if not isinstance(outputs["quantized"], list):
            return
        said = zip(outputs["question"], outputs["quantized"], strict=True)
        lines = [json.dumps({"question": q, "answer": made["text"]}) for q, made in said]
        folder = Path(trainer.default_root_dir) / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        # Each rank has its own file: two processes must not append to one.
        file = folder / f"answers_rank{ranks.rank()}.jsonl"
        with file.open("a" if batch_idx else "w", encoding="utf-8") as stream:
            stream.write("\n".join(lines) + "\n")


def measure(outputs: Mapping[str, Any]) -> list[Row]:
    """One row per question: each model's answer, and how each pair with full precision agrees.

    Raises:
        NumericsError: A likelihood is NaN or zero.
    """
    models = [name for name in MODELS if name in outputs]
    rows = []
    for index, question in enumerate(outputs["question"]):
        answer, choices = outputs["answer"][index], outputs["choices"][index]
        row: Row = {"question": question, "answer": answer, "kind": outputs["kind"][index]}
        for name in models:
            row[name] = _single(outputs[name][index], answer, choices, question)
        for name in models[1:]:
            pair = "paired" if name == "quantized" else f"paired_{name}"
            row[pair] = _paired(outputs["full_precision"][index], outputs[name][index])
        rows.append(row)
    return rows


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Means by model, over all questions and by kind, and by pair.

    Likelihoods and divergences are means over tokens: long answers count for more.
    """
    result: dict[str, Any] = {}
    for name in MODELS:
        found = [(row["kind"], row[name]) for row in rows if name in row]
        if found:
            result[name] = _accuracies(found)
    for pair in ("paired", "paired_round_to_nearest"):
        pairs = [row[pair] for row in rows if pair in row]
        if pairs:
            tokens = sum(numbers["tokens"] for numbers in pairs)
            result[pair] = {
                "kl": sum(numbers["kl"] for numbers in pairs) / tokens,
                "kl_median": statistics.median(n["kl"] / n["tokens"] for n in pairs),
                "same_answer": sum(numbers["same_answer"] for numbers in pairs) / len(pairs),
                "count": len(pairs),
            }
    return result


def _accuracies(found: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    numbers = [each for _, each in found]
    right = [float(each["correct"]) for each in numbers]
    loss = sum(each["negative_log_likelihood"] for each in numbers)
    by_kind = {
        f"accuracy/{kind}": _mean([float(each["correct"]) for k, each in found if k == kind])
        for kind in sorted({kind for kind, _ in found})
    }
    return {
        "accuracy": _mean(right),
        **(by_kind if len(by_kind) > 1 else {}),
        "accuracy_interval": bootstrap_interval(right),
        "parse_failures": sum(each["parsed"] is None for each in numbers),
        # Capped: a broken model must not break the report of the others.
        "perplexity": math.exp(min(loss / sum(each["tokens"] for each in numbers), 700)),
        "count": len(numbers),
    }


def _single(
    made: Mapping[str, Any], answer: str, choices: Sequence[str] | None, question: str
) -> dict[str, Any]:
    likely: Tensor = made["log_probabilities"]
    loss = -float(likely.gather(1, made["tokens"][:, None]).double().sum())
    if not math.isfinite(loss):
        raise NumericsError(
            f"The log-likelihood of the answer to {question!r} is {loss}. Check the scales of the "
            "quantised layers, or evaluate in a wider dtype."
        )
    parsed = parse_answer(made["text"], choices)
    return {
        "text": made["text"],
        "parsed": parsed,
        "correct": correct(parsed, answer, choices),
        "negative_log_likelihood": loss,
        "tokens": len(likely),
    }


def _paired(reference: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    expected, found = (m["log_probabilities"].double() for m in (reference, made))
    divergence = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="sum")
    return {
        "kl": float(divergence),
        "same_answer": reference["text"] == made["text"],
        "tokens": len(expected),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
