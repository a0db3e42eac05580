"""What an answer in words says."""

import re
from collections.abc import Sequence
from string import ascii_uppercase

STATED = re.compile(r"answer(?:\s+is)?\s*:?\s*\(?([a-z])(?=[.:,;)]|\s*$|\s*\n)", re.IGNORECASE)
"""`ANSWER: B`, `The answer is (B).` and their like; a letter before more words may be an article.
Source: both formats stand in Q-VLM's paper, whose published parser reads the first only."""
ALONE = re.compile(r"\s*\(?([A-Za-z])\)?(?:[.:,)]|\s*$)")
"""A letter at the start, with nothing or a mark behind it: `B`, `(b)`, `B. a star`."""


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
        None where no answer can be read: no letter of a choice, nor a choice in words.

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
    found = STATED.search(text) or ALONE.match(text)
    letter = found.group(1).upper() if found else None
    return letter if letter is not None and letter in letters else None


def correct(parsed: str | None, answer: str, choices: Sequence[str] | None) -> bool:
    """Whether a parsed answer is the right one, exactly; what could not be parsed is not."""
    return parsed is not None and parsed == (answer if choices else normalised(answer))
