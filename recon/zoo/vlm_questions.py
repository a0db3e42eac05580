"""Questions about pictures of the procedural world, with their exact answers.

Five kinds: colour, shape, count, position, comparison. Each question is asked for a short answer
or, with choices, for the letter of the right one. `records` is the data of calibration and test;
its two splits share neither pictures nor wordings.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from PIL import Image

from recon.zoo.vlm_facts import KINDS, TOPICS, random_fact
from recon.zoo.vlm_scenes import Arrangement, photograph, random_arrangement
from recon.zoo.world import Split

LETTERS = "ABCD"
"""Names of the choices."""


@dataclass(frozen=True)
class Question:
    """A question with its answer."""

    kind: str
    question: str
    choices: tuple[str, ...] | None
    """What is chosen from, or None where a short answer is asked for."""
    answer: str
    """What is to be said: a letter where there are choices."""

    @property
    def prompt(self) -> str:
        """What the user says beside the picture: the question, and its choices if it has any."""
        lettered = zip(LETTERS, self.choices or (), strict=False)
        return " ".join([self.question, *(f"{letter} {choice}" for letter, choice in lettered)])


@dataclass(frozen=True)
class Record(Question):
    """A question with its answer and its picture."""

    picture: Image.Image
    """48 x 48 pixels, RGB."""


def records(seed: int, count: int, split: Split) -> Iterator[Record]:
    """`count` questions, each about a picture of its own.

    Kinds go round in shuffled order, half of each with choices. The same arguments give the same
    records.
    """
    rng = random.Random(f"{split} records {seed}")
    turns: list[tuple[str, bool]] = []
    for _ in range(count):
        if not turns:
            turns = list(product(KINDS, (False, True)))
            rng.shuffle(turns)
        kind, with_choices = turns.pop()
        asked = None
        while asked is None:
            arrangement = random_arrangement(rng, split)
            asked = ask(arrangement, kind, rng, split, with_choices=with_choices)
        yield Record(**vars(asked), picture=photograph(arrangement))


def ask(
    arrangement: Arrangement, kind: str, rng: random.Random, split: Split, *, with_choices: bool
) -> Question | None:
    """A random question of the kind, or None where the picture has no answer to the one drawn."""
    topic = rng.choice([each for each in TOPICS if each.kind == kind])
    fact = random_fact(topic, arrangement, rng)
    if fact is None:
        return None
    question = rng.choice(topic.wordings(split)).format(*fact.words)
    if not with_choices:
        return Question(kind, question, None, fact.answer)
    others = [each for each in topic.answers if each != fact.answer]
    choices = [fact.answer, *rng.sample(others, min(len(LETTERS) - 1, len(others)))]
    rng.shuffle(choices)
    return Question(kind, question, tuple(choices), LETTERS[choices.index(fact.answer)])
