"""Writes a calibration set of conversations: scored if asked for, chosen, teacher-forced."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from recon.calibration import ranks
from recon.calibration.artefact import Fingerprint, Row, Split, write_set
from recon.calibration.selection import (
    SalientSelection,
    check_selection,
    gram_norm,
    select,
    sketch,
)
from recon.datamodules.agreement import agree, attempt
from recon.datamodules.chat import Chat
from recon.datamodules.questions import Example
from recon.errors import ConfigError

SPREADING = ("uniform", "stratified")
"""Metrics over sampling steps, of which conversations have none."""


def check_rule(rule: SalientSelection, count: int, pool: int) -> None:
    """Refuse a rule that conversations cannot be chosen by.

    Raises:
        ConfigError: It spreads over sampling steps, or wants more samples than the pool has.
    """
    if rule.metric in SPREADING or rule.quota == "per_step_bin":
        raise ConfigError(
            f"sds.metric is {rule.metric} and sds.quota is {rule.quota}: they spread over sampling "
            "steps, which conversations do not have. Use metric product, gram or random, and quota "
            "none."
        )
    if count > pool:
        raise ConfigError(
            f"num_samples is {count}, but the pool has {pool} candidates. Raise pool, or lower "
            "num_samples."
        )
    check_selection(_without_steps(rule, count), pool, 1)


def write_conversations(
    folder: Path,
    chat: Chat,
    pool: Sequence[Example],
    held_out: Sequence[Example],
    *,
    count: int,
    rule: SalientSelection | None,
    seed: int,
    fingerprint: Fingerprint,
    device: torch.device,
) -> None:
    """Chooses from the pool and writes the set. All ranks call this with equal arguments.

    Without a rule the first `count` are taken. With one, a candidate's x is the stream that enters
    the first decoder layer, [tokens, channels], answer included, and its score C_quant = ‖xᵀx‖ /
    tokens. Source: S²Q-VDiT, eq. 6. Deviates: C_diff (eq. 3) compares neighbouring sampling steps,
    which there are none of, so that the product (eq. 8) is C_quant alone; and C_quant is divided
    by the number of tokens, the same for all samples in the paper, because otherwise the longest
    conversations would win whatever they hold.

    Raises:
        ConfigError: A sample does not fit the network.
        NumericsError: The stream of a candidate holds NaN or Inf.
    """
    started = time.monotonic()
    if rule is None:
        scores = torch.zeros(0, dtype=torch.float64)
        chosen: list[tuple[int, float | None, str]] = [
            (i, None, "Given: as the seed drew it.") for i in range(count)
        ]
    else:
        scores, sketches = _scored(chat, pool, rule, device)
        both = torch.stack([torch.zeros_like(scores), scores], dim=1)[:, None]
        chosen = [
            (c.prompt, c.score, f"C_quant per token {float(scores[c.prompt]):.4g}, rank {n}.")
            for n, c in enumerate(select(both, _without_steps(rule, count), seed, sketches), 1)
        ]
    places = {index: place for place, (index, _, _) in enumerate(chosen, start=1)}

    def rows() -> Iterator[Row]:
        for index, score, reason in chosen:
            gram = None if rule is None else float(scores[index])
            yield _row(chat, pool[index], "calibration", reason, gram, score)
        for example in held_out:
            yield _row(chat, example, "held_out", "Held out: not calibrated on.")

    facts = {
        "samples": {"calibration": len(chosen), "held_out": len(held_out)},
        "scores": [
            {"question": pool[i].question, "C_quant": float(s), "chosen": places.get(i)}
            for i, s in enumerate(scores)
        ],
        "seconds": round(time.monotonic() - started, 3),
    }
    tensors = ("input_ids", "labels", *chat.adapter.picture_inputs)
    write = lambda: write_set(folder, rows, fingerprint, facts, tensors)  # noqa: E731 - one attempt
    agree(attempt(lambda: write() if ranks.rank() == 0 else None))
    rank_zero_info(
        f"Calibration: {len(chosen)} of {len(pool)} conversations and {len(held_out)} held-out "
        f"ones in {folder}, {time.monotonic() - started:.1f} s."
    )


def _without_steps(rule: SalientSelection, count: int) -> SalientSelection:
    return replace(rule, top_k=count, first_step="zero")


def _row(
    chat: Chat,
    example: Example,
    split: Split,
    reason: str,
    gram: float | None = None,
    score: float | None = None,
) -> Row:
    return Row(
        chat.forced(example),
        prompt=example.question,
        step=None,
        seed=None,
        change=None,
        gram=gram,
        score=score,
        split=split,
        reason=reason,
    )


def _scored(
    chat: Chat, pool: Sequence[Example], rule: SalientSelection, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """C_quant per token [pool] and, if the rule asks for them, sketches [pool, 1, features]."""
    scores = torch.zeros(len(pool), dtype=torch.float64)
    drawn: dict[int, Tensor] = {}

    def score_share() -> None:
        # Dealt by index: what a rank computes for an example depends on the example alone.
        for index in range(ranks.rank(), len(pool), ranks.world()):
            state = chat.adapter.embed(chat.forced(pool[index]), device)
            tokens = chat.adapter.tokens(state)[0]
            scores[index] = (gram_norm(tokens, rule.norm) / len(tokens)).cpu()
            if rule.diversity != "none":
                drawn[index] = sketch(tokens).cpu()

    agree(attempt(score_share))
    # Every number is computed on one rank and is 0 on the others, so the sums are exact.
    scores = ranks.total(scores.to(device)).cpu()
    if rule.diversity == "none":
        return scores, None
    width = max((len(row) for row in drawn.values()), default=0)
    # A rank without an example does not know the width.
    width = int(ranks.maximum(torch.tensor(width, device=device)))
    sketches = torch.zeros(len(pool), 1, width, dtype=torch.float64)
    for index, row in drawn.items():
        sketches[index, 0] = row
    return scores, ranks.total(sketches.to(device)).cpu()
