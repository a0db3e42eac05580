"""What an answer in words says."""

import re
from collections.abc import Mapping, Sequence
from string import ascii_uppercase

END = r"(?=[.:,;)*]|\s*$|\s*\n"
"""Behind a letter that stands alone: a mark, bold type's too, or the end of line or text; open."""
STATED = re.compile(
    rf"\banswer\b(?:\s+is\b)?[\s:*(]*([a-z]){END}|\s+(?:because|since|as)\b)", re.IGNORECASE
)
"""`ANSWER: B`, `The answer is (B).` and their like; a letter before more words may be an article,
unless they give a reason. Source: both formats stand in Q-VLM's paper, whose published parser reads
the first only."""
ALONE = re.compile(rf"[\s*(]*([a-z]){END})", re.IGNORECASE)
"""A letter at the start, with nothing or a mark behind it: `B`, `(b)`, `**B**`, `B. a star`."""
ANOTHER = re.compile(rf"[\s.:,;)*/&]*(?:\b(?:and|or)\b)?[\s*(]*([a-z]){END})", re.IGNORECASE)
"""Directly behind a letter, a further one: `A, B`, `(A) and (B)`."""


def normalised(text: str) -> str:
    """Lower case, single spaces, without marks at either end.

    >>> normalised("  Dark  Red. ")
    'dark red'
    """
    return " ".join(text.lower().split()).strip(" .,:;!?'\"")


def parse_answer(text: str, choices: Sequence[str] | None) -> str | None:
    """The answer a text gives: a letter where there are choices, else the text, normalised.

    Args:
        text: What a model said.
        choices: What it chose from; None for a free answer.

    Returns:
        None where no answer can be read: no letter of a choice, nor a choice in words; or several
        letters.

    >>> parse_answer("The answer is (b).", ["red", "blue"])
    'B'
    >>> parse_answer("Blue", ["red", "blue"])
    'B'
    >>> parse_answer("It depends", ["red", "blue"]) is None
    True
    """
    said = normalised(text)
    if choices is None:
        return said or None
    letters = ascii_uppercase[: len(choices)]
    worded = [letter for letter, c in zip(letters, choices, strict=True) if normalised(c) == said]
    if len(worded) == 1:
        return worded[0]
    named = _letters(text, dict(zip(letters, choices, strict=True)))
    return named.pop() if len(named) == 1 else None


def _letters(text: str, choices: Mapping[str, str]) -> set[str]:
    """Letters of choices that a text states, or begins with, and those listed behind them."""
    begins = ALONE.match(text)
    named = set()
    for found in (*STATED.finditer(text), *([begins] if begins else [])):
        letter, rest = found.group(1).upper(), text[found.end() :]
        if letter not in choices:
            continue
        named.add(letter)
        # `A. B` names one letter where the text of choice A is B.
        another = ANOTHER.match(rest) if normalised(rest) != normalised(choices[letter]) else None
        named |= {another.group(1).upper()} & choices.keys() if another else set()
    return named


def correct(parsed: str | None, answer: str, choices: Sequence[str] | None) -> bool:
    """Whether a parsed answer is the right one, exactly; what could not be parsed is not."""
    return parsed is not None and parsed == (answer if choices else normalised(answer))
