"""Where an answer ends, and whether a template writes a system turn."""

import json
from pathlib import Path

import pytest
import torch

from recon.datamodules.chat import Chat
from recon.datamodules.questions import Example
from recon.errors import ConfigError
from recon.models.llava import Llava
from recon.types import Sample
from tests.datamodules.tiny_chat import TEMPLATE, examples, picture, write_tiny_chat

LINE_BEHIND = TEMPLATE.replace("'</s> '", "'</s> \n '")
"""Like ChatML's: the template goes on behind the end of a turn."""
NO_END = TEMPLATE.replace("'</s> '", "'\n '")
"""Like LLaVA-1.5's: white space behind the answer, and no end of turn."""


@pytest.mark.parametrize("template", [TEMPLATE, LINE_BEHIND, NO_END])
def test_an_answer_ends_with_the_end_of_turn_whatever_the_template_writes(
    template: str, tmp_path: Path
) -> None:
    folder = write_tiny_chat(tmp_path, template)
    lines_are_tokens(folder)
    sample = Chat(Llava(str(folder))).forced(examples(1)[0])
    assert answer(sample, folder) == "red </s>"
    assert torch.equal(sample["input_ids"][0, -2:], sample["labels"][0, -2:])
    assert (sample["labels"][0, :-2] == -100).all()


def test_an_answer_ends_with_what_generation_ends_with(tmp_path: Path) -> None:
    folder = write_tiny_chat(tmp_path, TEMPLATE.replace("'</s> '", "'hint \n </s> '"))
    chat = Chat(Llava(str(folder)))
    end = chat.processor.tokenizer.convert_tokens_to_ids("hint")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    labels = chat.forced(examples(1)[0])["labels"][0]
    assert chat.processor.tokenizer.decode(labels[labels >= 0]) == "red hint"


def lines_are_tokens(folder: Path) -> None:
    """Has the folder's tokenizer tell line breaks from spaces."""
    file = folder / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["model"]["vocab"]["\n"] = 59
    pattern = {"Regex": "\n|[^\\s]+"}
    stored["pre_tokenizer"] = {
        "type": "Split",
        "pattern": pattern,
        "behavior": "Removed",
        "invert": True,
    }
    file.write_text(json.dumps(stored))


def answer(sample: Sample, folder: Path) -> str:
    """The labelled part of a sample, in words."""
    labels = sample["labels"][0]
    return str(Chat(Llava(str(folder))).processor.tokenizer.decode(labels[labels >= 0]))


SYSTEM = TEMPLATE.replace(
    "{{ 'USER: ' if m['role'] == 'user'",
    "{{ 'hint ' if m['role'] == 'system' else 'USER: ' if m['role'] == 'user'",
)
"""The template of the tiny chat, with a word for the system."""
REFUSING = "{{ raise_exception('no') if messages[0]['role'] == 'system' }}" + TEMPLATE
DROPPING = "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}"


def told() -> Example:
    turns = (("system", "follows colour"), ("user", "what is it ?"))
    return Example(turns, "red", (picture((9, 0, 0)),))


def test_a_system_turn_stands_in_front_and_the_picture_with_the_user(tmp_path: Path) -> None:
    folder = write_tiny_chat(tmp_path, SYSTEM)
    chat = Chat(Llava(str(folder)))
    written = chat.processor.tokenizer.decode(chat.forced(told())["input_ids"][0])
    shown = "<image> " * 4
    assert written == f"hint follows colour USER: {shown}what is it ? ASSISTANT: red </s>"


@pytest.mark.parametrize("template", [TEMPLATE, REFUSING, DROPPING + TEMPLATE])
def test_refuses_a_system_turn_that_the_template_does_not_write(
    template: str, tmp_path: Path
) -> None:
    chat = Chat(Llava(str(write_tiny_chat(tmp_path, template))))
    with pytest.raises(ConfigError, match="begins with a system turn, which the chat template"):
        chat.prompt(told())
