"""What can be asked about a picture of the procedural world, and how it is worded.

The two splits word every topic differently: evaluation has known words in orders that training has
never shown.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from types import MappingProxyType

from recon.zoo.vlm_scenes import OBJECTS, SIDE, SIZES, Arrangement, Object
from recon.zoo.world import COLOURS, SHAPES, Split

CLEAR = 4.0
"""Least distance, pixels, of what is compared in place: nothing is asked that is nearly even."""
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = tuple(str(number) for number in range(OBJECTS[1] + 1))
YES_NO = ("yes", "no")
PLURALS: Mapping[str, str] = MappingProxyType({shape: f"{shape}s" for shape in SHAPES})

EXTREMES: Mapping[str, Callable[[Object], float]] = MappingProxyType(
    {
        "leftmost": lambda each: each.x,
        "rightmost": lambda each: -each.x,
        "topmost": lambda each: each.y,
        "bottommost": lambda each: -each.y,
    }
)
"""Word -> what is least for the object it means."""
RELATIONS: Mapping[str, Callable[[Object, Object], float]] = MappingProxyType(
    {
        "left of": lambda one, other: other.x - one.x,
        "right of": lambda one, other: one.x - other.x,
        "above": lambda one, other: other.y - one.y,
        "below": lambda one, other: one.y - other.y,
    }
)
"""Words -> pixels by which they hold; negative: by which the opposite does."""


@dataclass(frozen=True)
class Fact:
    """Something true of a picture that can be asked for."""

    words: tuple[str, ...]
    """What fills the gaps of the question's wording."""
    answer: str


Facts = Callable[[Arrangement], list[Fact]]
"""Everything of one topic that can be asked about a picture."""


@dataclass(frozen=True)
class Topic:
    """Questions of one form."""

    kind: str
    answers: Sequence[str]
    """All answers, from which choices are drawn."""
    facts: Facts
    train: tuple[str, ...]
    """Wordings of the training split, with gaps."""
    evaluation: tuple[str, ...]
    note: str
    """What stands before the answer where facts are noted down rather than asked for."""

    def wordings(self, split: Split) -> tuple[str, ...]:
        """The split's wordings."""
        return self.train if split == "train" else self.evaluation


def _of_only(asked: str, known: str) -> Facts:
    """Asks for an attribute of the only object of another attribute."""

    def facts(arrangement: Arrangement) -> list[Fact]:
        seen = [getattr(each, known) for each in arrangement.objects]
        return [
            Fact((value,), getattr(each, asked))
            for each, value in zip(arrangement.objects, seen, strict=True)
            if seen.count(value) == 1
        ]

    return facts


def _extreme(arrangement: Arrangement, word: str) -> Object | None:
    """The object that the word means, or None where two come close."""
    order = EXTREMES[word]
    first, second, *_ = sorted(arrangement.objects, key=order)
    return first if order(second) - order(first) >= CLEAR else None


def _of_extreme(asked: str) -> Facts:
    """Asks for an attribute of the object farthest to one side."""

    def facts(arrangement: Arrangement) -> list[Fact]:
        meant = [(word, _extreme(arrangement, word)) for word in EXTREMES]
        return [Fact((word,), getattr(each, asked)) for word, each in meant if each is not None]

    return facts


def _count(attribute: str, words: Mapping[str, str]) -> Facts:
    """Asks for the number of objects of each value of an attribute."""

    def facts(arrangement: Arrangement) -> list[Fact]:
        seen = [getattr(each, attribute) for each in arrangement.objects]
        return [Fact((word,), str(seen.count(value))) for value, word in words.items()]

    return facts


def _quadrants(arrangement: Arrangement) -> list[Fact]:
    """Asks for the quarter of the picture in which an object lies."""
    half = SIDE / 2
    return [
        Fact(
            (each.name,),
            f"{'top' if each.y < half else 'bottom'} {'left' if each.x < half else 'right'}",
        )
        for each in arrangement.objects
        if min(abs(each.x - half), abs(each.y - half)) >= CLEAR / 2
    ]


def _relations(arrangement: Arrangement) -> list[Fact]:
    """Asks whether one object lies to a side of another."""
    return [
        Fact((one.name, words, other.name), _yes_or_no(distance(one, other) > 0))
        for one, other in permutations(arrangement.objects, 2)
        for words, distance in RELATIONS.items()
        if abs(distance(one, other)) >= CLEAR
    ]


def _larger(arrangement: Arrangement) -> list[Fact]:
    """Asks whether one object is larger than another."""
    return [
        Fact((one.name, other.name), _yes_or_no(one.size == "large"))
        for one, other in permutations(arrangement.objects, 2)
        if one.size != other.size
    ]


def _more(arrangement: Arrangement) -> list[Fact]:
    """Asks whether there are more objects of one shape than of another."""
    seen = [each.shape for each in arrangement.objects]
    return [
        Fact((PLURALS[one], PLURALS[other]), _yes_or_no(seen.count(one) > seen.count(other)))
        for one, other in permutations(sorted(set(seen)), 2)
    ]


def _same_colour(arrangement: Arrangement) -> list[Fact]:
    """Asks whether the objects farthest to two sides have the same colour."""
    meant = {word: _extreme(arrangement, word) for word in EXTREMES}
    return [
        Fact((one, other), _yes_or_no(first.colour == second.colour))
        for (one, first), (other, second) in permutations(meant.items(), 2)
        if first is not None and second is not None and first is not second
    ]


def _yes_or_no(answer: bool) -> str:
    return YES_NO[0] if answer else YES_NO[1]


def _attribute(asked: str, answers: Sequence[str], facts: Facts, noun: str) -> Topic:
    """Questions for colour or shape of what the noun says."""
    return Topic(
        asked,
        answers,
        facts,
        train=(
            f"what {asked} is the {noun}?",
            f"which {asked} does the {noun} have?",
            f"name the {asked} of the {noun}",
        ),
        evaluation=(
            f"what is the {asked} of the {noun}?",
            f"what {asked} does the {noun} have?",
        ),
        note=f"{asked} {{}}",
    )


def _number(attribute: str, words: Mapping[str, str], noun: str) -> Topic:
    """Questions for the number of what the noun says."""
    return Topic(
        "count",
        NUMBERS,
        _count(attribute, words),
        train=(
            f"how many {noun} are in the picture?",
            f"count the {noun}",
            f"what is the number of {noun}?",
        ),
        evaluation=(f"how many {noun} are there in the picture?", f"name the number of {noun}"),
        note="count {}",
    )


TOPICS = (
    _attribute("colour", tuple(COLOURS), _of_only("colour", "shape"), "{}"),
    _attribute("colour", tuple(COLOURS), _of_extreme("colour"), "{} object"),
    _attribute("shape", SHAPES, _of_only("shape", "colour"), "{} object"),
    _attribute("shape", SHAPES, _of_extreme("shape"), "{} object"),
    _number("shape", PLURALS, "{}"),
    _number("colour", {colour: colour for colour in COLOURS}, "{} objects"),
    _number("size", {size: size for size in SIZES}, "{} objects"),
    Topic(
        "position",
        QUADRANTS,
        _quadrants,
        train=("where is the {}?", "in which corner is the {}?", "name the place of the {}"),
        evaluation=("in what corner is the {}?", "what is the place of the {}?"),
        note="place {}",
    ),
    Topic(
        "position",
        YES_NO,
        _relations,
        train=(
            "is the {} {} the {}?",
            "does the {} lie {} the {}?",
            "the {} is {} the {}: yes or no?",
        ),
        evaluation=("is the place of the {} {} the {}?", "yes or no: does the {} lie {} the {}?"),
        note="{} {} {}",
    ),
    Topic(
        "comparison",
        YES_NO,
        _larger,
        train=(
            "is the {} larger than the {}?",
            "does the {} look larger than the {}?",
            "the {} is larger than the {}: yes or no?",
        ),
        evaluation=(
            "yes or no: is the {} larger than the {}?",
            "yes or no: does the {} look larger than the {}?",
        ),
        note="{} larger than {}",
    ),
    Topic(
        "comparison",
        YES_NO,
        _more,
        train=(
            "are there more {} than {}?",
            "is the number of {} larger than the number of {}?",
            "there are more {} than {}: yes or no?",
        ),
        evaluation=(
            "yes or no: are there more {} than {}?",
            "are more {} than {} in the picture?",
        ),
        note="more {} than {}",
    ),
    Topic(
        "comparison",
        YES_NO,
        _same_colour,
        train=(
            "is the {} object of the same colour as the {} object?",
            "does the {} object have the same colour as the {} object?",
            "the {} object is of the same colour as the {} object: yes or no?",
        ),
        evaluation=(
            "yes or no: does the {} object have the same colour as the {} object?",
            "is the colour of the {} object the same as of the {} object?",
        ),
        note="{} same colour as {}",
    ),
)
"""All forms of question."""
KINDS = tuple(dict.fromkeys(topic.kind for topic in TOPICS))
"""Kinds of question, in a fixed order."""


def random_fact(topic: Topic, arrangement: Arrangement, rng: random.Random) -> Fact | None:
    """A fact of the topic, or None where the picture has none.

    The answer is drawn first, so that no answer is right far more often than others.
    """
    facts = topic.facts(arrangement)
    if not facts:
        return None
    answer = rng.choice(sorted({fact.answer for fact in facts}))
    return rng.choice([each for each in facts if each.answer == answer])


def vocabulary() -> list[str]:
    """All words and marks of all questions, choices and answers, sorted, except letters."""
    texts = [
        *COLOURS,
        *SIZES,
        *PLURALS,
        *EXTREMES,
        *RELATIONS,
        *PLURALS.values(),
        *(text for topic in TOPICS for text in (*topic.answers, *topic.train, *topic.evaluation)),
    ]
    spaced = " ".join(texts).replace("{}", " ").replace("?", " ? ").replace(":", " : ")
    return sorted(set(spaced.split()))
