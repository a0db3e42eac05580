import random
from collections import Counter
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch

from recon.zoo import vlm_facts, vlm_questions, vlm_scenes
from recon.zoo.vlm_facts import TOPICS, Topic
from recon.zoo.vlm_scenes import Arrangement, Object
from recon.zoo.world import COLOURS, Split

SPLITS: tuple[Split, ...] = ("train", "evaluation")


def thing(colour: str, shape: str, size: str, x: float, y: float) -> Object:
    return Object(colour, shape, size, x, y, radius=sum(vlm_scenes.SIZES[size]) / 2)


SCENE = Arrangement(
    (
        thing("red", "circle", "small", 8, 10),
        thing("red", "ring", "large", 38, 14),
        thing("blue", "circle", "large", 14, 36),
        thing("green", "bar", "small", 32, 42),
    ),
    backdrop=0.25,
    slope=0.1,
    angle=1.0,
)
"""Laid out by hand: a red circle and ring above, a blue circle and a green bar below."""


def topics(kind: str) -> list[Topic]:
    return [topic for topic in TOPICS if topic.kind == kind]


def answers(topic: Topic, arrangement: Arrangement = SCENE) -> dict[tuple[str, ...], str]:
    return {fact.words: fact.answer for fact in topic.facts(arrangement)}


# Pictures


def test_objects_are_inside_apart_and_named_apart() -> None:
    arrangements = vlm_scenes.random_arrangements(0, 200, "train")
    assert {len(each.objects) for each in arrangements} == {2, 3, 4, 5}
    for arrangement in arrangements:
        names = [each.name for each in arrangement.objects]
        assert len(set(names)) == len(names)
        for each in arrangement.objects:
            across, down = each.reach()
            assert across < each.x < 48 - across
            assert down < each.y < 48 - down
        for one, other in combinations(arrangement.objects, 2):
            assert max(abs(one.x - other.x), abs(one.y - other.y)) >= vlm_scenes.APART
            alone = [
                vlm_scenes.draw(Arrangement((each,), 0.2, 0.0, 0.0)) - 0.2 for each in (one, other)
            ]
            both = (alone[0].abs().amax(0) > 0.01) & (alone[1].abs().amax(0) > 0.01)
            assert not both.any()


def test_a_picture_shows_each_object_in_its_colour_at_its_place() -> None:
    picture = np.asarray(vlm_scenes.photograph(SCENE))
    assert picture.shape == (48, 48, 3)
    for each in SCENE.objects:
        # A ring is hollow: its band lies one radius from its centre.
        across = each.radius if each.shape == "ring" else 0
        seen = picture[int(each.y), int(each.x + across)] / 255
        np.testing.assert_allclose(seen, COLOURS[each.colour], atol=0.05)
    assert np.ptp(picture[24, 24]) == 0  # the backdrop is grey


def test_bounding_boxes_are_those_of_the_drawn_shapes() -> None:
    for shape in ("circle", "ring", "bar", "pillar"):
        each = Object("red", shape, "large", 24, 24, 6)
        drawn = vlm_scenes.draw(Arrangement((each,), 0.2, 0.0, 0.0))[0] > 0.55
        across, down = each.reach()
        assert int(drawn.any(dim=0).sum()) == pytest.approx(2 * across, abs=1)
        assert int(drawn.any(dim=1).sum()) == pytest.approx(2 * down, abs=1)


# Answers


def test_attributes_are_asked_of_the_only_object() -> None:
    (colour,) = (answers(topic) for topic in topics("colour"))
    assert colour == {("ring",): "red", ("bar",): "green"}
    (shape,) = (answers(topic) for topic in topics("shape"))
    assert shape == {("blue",): "circle", ("green",): "bar"}


def test_objects_are_counted_by_shape_colour_and_size() -> None:
    by_shape, by_colour, by_size = (answers(topic) for topic in topics("count"))
    assert by_shape == {("circles",): "2", ("rings",): "1", ("bars",): "1", ("pillars",): "0"}
    assert {words: n for words, n in by_colour.items() if n != "0"} == {
        ("red",): "2",
        ("blue",): "1",
        ("green",): "1",
    }
    assert len(by_colour) == len(COLOURS)
    assert by_size == {("small",): "2", ("large",): "2"}


def test_objects_are_named_by_what_no_other_has() -> None:
    assert {words: each.name for words, each in vlm_facts.named(SCENE)} == {
        "ring": "red ring",
        "bar": "green bar",
        "blue object": "blue circle",
        "green object": "green bar",
    }


def test_places_are_quarters_of_the_picture_and_who_is_outermost() -> None:
    quadrants, colours, shapes = (answers(topic) for topic in topics("position"))
    assert quadrants == {
        ("ring",): "northeast",
        ("bar",): "southeast",
        ("blue object",): "southwest",
        ("green object",): "southeast",
    }
    assert colours == {
        ("leftmost",): "red",
        ("rightmost",): "red",
        ("topmost",): "red",
        ("bottommost",): "green",
    }
    assert shapes == {
        ("leftmost",): "circle",
        ("rightmost",): "ring",
        ("topmost",): "circle",
        ("bottommost",): "bar",
    }


def test_sizes_and_frequencies_are_compared() -> None:
    *of_size, colour, shape = topics("comparison")
    assert [answers(topic) for topic in of_size] == [{}, {}]  # two are large and two are small
    assert answers(colour) == {("colour",): "red"}
    assert answers(shape) == {("shape",): "circle"}
    three = Arrangement(SCENE.objects[1:], 0.2, 0, 0)
    assert [answers(topic, three) for topic in of_size] == [
        {("smallest",): "green"},
        {("smallest",): "bar"},
    ]
    assert answers(colour, three) == answers(shape, three) == {}  # all occur once


def test_nothing_is_asked_that_is_nearly_even() -> None:
    near = Arrangement(
        (thing("red", "bar", "small", 23.5, 10), thing("blue", "ring", "small", 26, 30)), 0.2, 0, 0
    )
    asked = {fact.words for topic in TOPICS for fact in topic.facts(near)}
    assert ("leftmost",) not in asked
    assert ("topmost",) in asked
    quadrants = answers(topics("position")[0], near)
    assert ("bar",) not in quadrants  # on the middle line
    assert ("ring",) in quadrants


# Questions


def test_choices_are_different_answers_and_the_letter_is_that_of_the_right_one() -> None:
    rng = random.Random(0)
    for kind in vlm_facts.KINDS:
        for _ in range(40):
            asked = vlm_questions.ask(SCENE, kind, rng, "train", with_choices=True)
            if asked is None:  # of a topic that the scene has no fact of
                assert kind == "comparison"
                continue
            assert asked.choices is not None
            assert len(set(asked.choices)) == len(asked.choices) == 4
            chosen = asked.choices[vlm_questions.LETTERS.index(asked.answer)]
            right = {
                fact.answer
                for topic in topics(kind)
                for fact in topic.facts(SCENE)
                for wording in topic.train
                if wording.format(*fact.words) == asked.question
            }
            assert right == {chosen}
            letters = "ABCD"[: len(asked.choices)]
            parts = [f"{a} {b}" for a, b in zip(letters, asked.choices, strict=True)]
            assert asked.prompt == f"{asked.question} {' '.join(parts)}"


def test_records_go_round_all_kinds_and_forms_and_are_reproducible() -> None:
    asked = list(vlm_questions.records(5, 20, "train"))
    counts = Counter((each.kind, each.choices is not None) for each in asked)
    assert counts == {(kind, form): 2 for kind in vlm_facts.KINDS for form in (True, False)}
    assert list(vlm_questions.records(5, 20, "train")) == asked
    assert list(vlm_questions.records(6, 20, "train")) != asked
    assert all(each.prompt == each.question for each in asked if each.choices is None)


def test_a_kind_whose_facts_the_picture_lacks_is_not_asked() -> None:
    alike = Arrangement(
        (thing("red", "bar", "small", 23, 10), thing("red", "ring", "small", 25, 31)), 0.2, 0, 0
    )
    rng = random.Random(0)
    asked = [vlm_questions.ask(alike, "shape", rng, "train", with_choices=False) for _ in range(9)]
    assert asked == [None] * 9


# Splits


def test_no_set_of_objects_and_no_wording_is_in_both_splits() -> None:
    names = {}
    for split in SPLITS:
        arrangements = vlm_scenes.random_arrangements(0, 300, split)
        names[split] = {frozenset(e.name for e in each.objects) for each in arrangements}
        assert all(vlm_scenes.split_of(list(each)) == split for each in names[split])
    assert not names["train"] & names["evaluation"]
    for topic in TOPICS:
        assert not set(topic.train) & set(topic.evaluation)


def test_evaluation_uses_no_word_that_training_lacks() -> None:
    def words(wordings: Callable[[Topic], tuple[str, ...]]) -> set[str]:
        texts = [text for topic in TOPICS for text in wordings(topic)]
        return set(" ".join(texts).replace("?", " ?").replace(":", " :").split())

    assert words(lambda topic: topic.evaluation) <= words(lambda topic: topic.train)


def test_pictures_of_other_seeds_and_splits_differ() -> None:
    drawn = [
        vlm_scenes.pixels(vlm_scenes.random_arrangements(seed, 1, split)[0])
        for seed in (0, 1)
        for split in SPLITS
    ]
    assert not any(torch.equal(one, other) for one, other in combinations(drawn, 2))
