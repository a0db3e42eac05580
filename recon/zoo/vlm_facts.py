"""What can be asked about a picture of the procedural world, and how it is worded.

The two splits word every topic differently: evaluation has known words in orders that training has
never shown.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from recon.zoo.vlm_scenes import OBJECTS, QUADRANTS, SIDE, SIZES, Arrangement, Object
from recon.zoo.world import COLOURS, SHAPES, Split

CLEAR = 4.0
"""Least distance, pixels, by which an object is the outermost: nothing is asked that is nearly
even."""
NUMBERS = tuple(str(number) for number in range(OBJECTS[1] + 1))
ATTRIBUTES: Mapping[str, Sequence[str]] = MappingProxyType(
    {"colour": tuple(COLOURS), "shape": SHAPES}
)
"""What is asked for -> all answers."""
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
LARGEST: Mapping[str, str] = MappingProxyType({"largest": "large", "smallest": "small"})
"""Word -> the size that one object alone has."""


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

    def wordings(self, split: Split) -> tuple[str, ...]:
        """The split's wordings."""
        return self.train if split == "train" else self.evaluation


def _only(arrangement: Arrangement, attribute: str) -> dict[str, Object]:
    """Values of an attribute that one object alone has -> that object."""
    seen = [getattr(each, attribute) for each in arrangement.objects]
    return {
        value: each
        for each, value in zip(arrangement.objects, seen, strict=True)
        if seen.count(value) == 1
    }


def named(arrangement: Arrangement) -> list[tuple[str, Object]]:
    """Objects with words that mean no other: the only one of a shape, the only one of a colour."""
    shapes = _only(arrangement, "shape")
    colours = _only(arrangement, "colour")
    return [*shapes.items(), *((f"{colour} object", each) for colour, each in colours.items())]


def _of_only(asked: str, known: str) -> Facts:
    """Asks for an attribute of the only object of another attribute."""

    def facts(arrangement: Arrangement) -> list[Fact]:
        meant = _only(arrangement, known)
        return [Fact((value,), getattr(each, asked)) for value, each in meant.items()]

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
    return [
        Fact((name,), each.quadrant)
        for name, each in named(arrangement)
        if min(abs(each.x - SIDE / 2), abs(each.y - SIDE / 2)) >= CLEAR / 2
    ]


def _of_largest(asked: str) -> Facts:
    """Asks for an attribute of the only large or the only small object."""

    def facts(arrangement: Arrangement) -> list[Fact]:
        meant = _only(arrangement, "size")
        return [
            Fact((word,), getattr(meant[size], asked))
            for word, size in LARGEST.items()
            if size in meant
        ]

    return facts


def _most_frequent(asked: str) -> Facts:
    """Asks for the value of an attribute that more objects have than any other."""

    def facts(arrangement: Arrangement) -> list[Fact]:
        counts = Counter(getattr(each, asked) for each in arrangement.objects).most_common(2)
        tied = len(counts) > 1 and counts[0][1] == counts[1][1]
        return [] if tied else [Fact((asked,), counts[0][0])]

    return facts


def _attribute(kind: str, asked: str, facts: Facts, noun: str) -> Topic:
    """Questions for colour or shape of what the noun says."""
    return Topic(
        kind,
        ATTRIBUTES[asked],
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
        evaluation=(
            f"what number of {noun} is in the picture?",
            f"what is the number of {noun} in the picture?",
        ),
    )


def _frequent(asked: str) -> Topic:
    """Questions for the most frequent colour or shape."""
    return Topic(
        "comparison",
        ATTRIBUTES[asked],
        _most_frequent(asked),
        train=(
            "which {} is the most frequent?",
            "what is the most frequent {}?",
            "name the {} of most objects",
        ),
        evaluation=("what {} is the most frequent?", "what is the {} of most objects?"),
    )


TOPICS = (
    _attribute("colour", "colour", _of_only("colour", "shape"), "{}"),
    _attribute("shape", "shape", _of_only("shape", "colour"), "{} object"),
    _number("shape", PLURALS, "{}"),
    _number("colour", {colour: colour for colour in COLOURS}, "{} objects"),
    _number("size", {size: size for size in SIZES}, "{} objects"),
    Topic(
        "position",
        QUADRANTS,
        _quadrants,
        train=("where is the {}?", "in which quarter is the {}?", "name the place of the {}"),
        evaluation=("in what quarter is the {}?", "what is the place of the {}?"),
    ),
    _attribute("position", "colour", _of_extreme("colour"), "{} object"),
    _attribute("position", "shape", _of_extreme("shape"), "{} object"),
    _attribute("comparison", "colour", _of_largest("colour"), "{} object"),
    _attribute("comparison", "shape", _of_largest("shape"), "{} object"),
    _frequent("colour"),
    _frequent("shape"),
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
        *LARGEST,
        *PLURALS.values(),
        *(text for topic in TOPICS for text in (*topic.answers, *topic.train, *topic.evaluation)),
    ]
    spaced = " ".join(texts).replace("{}", " ").replace("?", " ? ").replace(":", " : ")
    return sorted(set(spaced.split()))
