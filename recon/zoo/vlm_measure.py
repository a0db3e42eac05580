"""Measuring the vision-language teacher: greedy answers to questions about held-out pictures."""

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from recon.layers.quant_linear import QuantLinear
from recon.layers.tree import replace
from recon.quantizers.spec import QuantSpec
from recon.zoo.vlm_questions import Record, records
from recon.zoo.vlm_teacher import ask_processor, load


@torch.no_grad()
def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    asked: Sequence[Record],
    batch: int = 64,
) -> list[str]:
    """Greedy answers, in order."""
    said: list[str] = []
    for begin in range(0, len(asked), batch):
        chunk = asked[begin : begin + batch]
        inputs = ask_processor(
            processor, [each.prompt for each in chunk], [each.picture for each in chunk]
        )
        ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        said += processor.batch_decode(ids, skip_special_tokens=True)
    return said


def accuracy(said: Sequence[str], asked: Sequence[Record]) -> dict[str, float]:
    """Share of right answers in [0, 1], letter for letter: of each kind, each form, and of all."""
    right: Mapping[str, list[bool]] = defaultdict(list)
    for answer, each in zip(said, asked, strict=True):
        for group in (each.kind, "with_choices" if each.choices else "short", "all"):
            right[group].append(answer == each.answer)
    return {group: sum(judged) / len(judged) for group, judged in sorted(right.items())}


@contextmanager
def without_layer(model: LlavaForConditionalGeneration, index: int) -> Iterator[None]:
    """While the context is open, decoder layer `index` adds nothing to what it is given."""
    layer = model.model.language_model.layers[index]
    weights = [layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight]
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
        try:
            yield
        finally:
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)


def round_to_nearest(
    model: LlavaForConditionalGeneration, weight_bits: int, activation_bits: int
) -> None:
    """Round the decoder's linears in place: weights per row, inputs per token."""
    weight = QuantSpec(weight_bits)
    activation = QuantSpec(activation_bits, strategy="token", dynamic=True)
    decoder = model.model.language_model.layers
    linears = {name: each for name, each in decoder.named_modules() if isinstance(each, nn.Linear)}
    replace(
        decoder, {name: QuantLinear(each, weight, activation) for name, each in linears.items()}
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what only this teacher's measurement can be told."""
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--split", choices=("train", "evaluation"), default="evaluation")
    parser.add_argument(
        "--bits",
        type=int,
        nargs=2,
        metavar=("WEIGHTS", "INPUTS"),
        help="round the decoder's linears to nearest first",
    )
    parser.add_argument("--ablate", action="store_true", help="also without each decoder layer")


def measure(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Settings and numbers of a teacher folder.

    Args:
        folder: Folder of network and processor.
        given: The options of `add_options`, and `seed`.
    """
    model, processor = load(folder)
    if given.bits is not None:
        round_to_nearest(model, *given.bits)
    asked = list(records(given.seed, given.questions, given.split))
    begin = time.monotonic()
    shares = accuracy(answers(model, processor, asked), asked)
    seconds = (time.monotonic() - begin) / len(asked)
    numbers: dict[str, Any] = {
        **{key: getattr(given, key) for key in ("questions", "split", "seed", "bits")},
        **{key: round(value, 4) for key, value in shares.items()},
        "seconds_per_question": round(seconds, 4),
    }
    if given.ablate:
        numbers["without_layer"] = []
        for index in range(len(model.model.language_model.layers)):
            with without_layer(model, index):
                share = accuracy(answers(model, processor, asked), asked)["all"]
            numbers["without_layer"].append(round(share, 4))
    return numbers
