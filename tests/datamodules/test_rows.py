"""Forms of choices, answers and conversations in public datasets, and what is refused of them."""

from pathlib import Path
from typing import Any

import pytest

from recon.datamodules.questions import Columns, Example, dataset_examples
from recon.errors import ConfigError

SPOKEN = Columns(image=None, conversation="messages")
CHOSEN = Columns(image=None, choices="options")
FREE = Columns(image=None)


def only(folder: Path, columns: Columns, **row: Any) -> Example:
    """The example of a dataset of one row."""
    from datasets import Dataset

    Dataset.from_dict({name: [value] for name, value in row.items()}).save_to_disk(folder)
    (example,) = dataset_examples(str(folder), "train", columns, None, "dataset")
    return example


def said(role: str, *parts: str) -> dict[str, Any]:
    """A turn in parts, as Arrow gives them back: each with all keys."""
    kinds = [
        {"type": "image", "text": None} if p == "" else {"type": "text", "text": p} for p in parts
    ]
    return {"role": role, "content": kinds}


def test_a_conversation_may_be_in_parts(tmp_path: Path) -> None:
    turns = [said("user", "", "what is it ?", "say it"), said("assistant", "red")]
    found = only(tmp_path, SPOKEN, messages=turns)
    assert found == Example((("user", "<image>\nwhat is it ?\nsay it"),), "red")


def test_a_conversation_may_begin_with_a_system_turn(tmp_path: Path) -> None:
    turns = [said("system", "be brief"), said("user", "what ?"), said("assistant", "red")]
    found = only(tmp_path, SPOKEN, messages=turns)
    assert found == Example((("system", "be brief"), ("user", "what ?")), "red")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "the conversation is a str, and must be a list of turns"),
        ({"from": ["human", "gpt"], "value": ["hi", "yo"]}, "the conversation is a dict"),
        (["hi", "yo"], "a turn is a str, and must have role and content"),
        ([{"role": "tool", "content": "hi"}], "with the speaker 'tool'"),
        ([{"role": "user", "content": 3}], "what a turn says is a int"),
        ([{"role": "user", "content": ["hi"]}], "a part of a turn is of type 'str'"),
        (
            [{"role": "user", "content": [{"type": "video", "text": "hi"}]}],
            "a part of a turn is of type 'video'",
        ),
        ([{"role": "system", "content": "hi"}], r"the speakers are \['system'\]"),
        (
            [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " "}],
            "row 0, last turn: the conversation is ''",
        ),
    ],
)
def test_refuses_other_conversations_by_their_type(
    messages: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        only(tmp_path, SPOKEN, messages=messages)


def test_choices_are_a_list(tmp_path: Path) -> None:
    found = only(tmp_path, CHOSEN, question="which ?", options=["red", "blue"], answer="B")
    assert found.choices == ("red", "blue")
    none = only(tmp_path / "none", CHOSEN, question="which ?", options=None, answer="red")
    assert (none.choices, none.answer) == (None, "red")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("['red', 'blue']", "columns.choices is 'options', which holds a str"),
        ({"text": ["red"], "label": ["A"]}, "columns.choices is 'options', which holds a dict"),
        (["red", None], "columns.choices is 'options', where choice 1 is None"),
    ],
)
def test_refuses_choices_that_are_no_list_of_texts(
    options: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        only(tmp_path, CHOSEN, question="which ?", options=options, answer="A")


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        ("which ?", None, "row 0: the answer is None, and what is missing cannot be"),
        ("which ?", " ", "row 0: the answer is ' '"),
        ("which ?", ["red"], "row 0: the answer is a list, and must be a text or a number"),
        (None, "red", "row 0: the question is None"),
    ],
)
def test_refuses_questions_without_words_or_answer(
    question: Any, answer: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        only(tmp_path, FREE, question=question, answer=answer)
    with pytest.raises(ConfigError, match=message):
        only(tmp_path / "c", CHOSEN, question=question, options=["red"], answer=answer)
