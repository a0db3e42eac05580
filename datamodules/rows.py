"""What a row of a dataset holds, in the forms that public datasets have."""

from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from PIL import Image

from recon.errors import ConfigError

MARKER = "<image>"
"""Stands in a text for a picture. Source: LLaVA's conversation files."""
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""Names of the speakers in conversation files, and the chat templates' words for them."""


def pictures_of(value: Any, place: str) -> tuple[Image.Image, ...]:
    """A picture, or all of a list, in RGB; none where there is nothing.

    Raises:
        ConfigError: It is something else; names the row `place`.
    """
    found = value if isinstance(value, list | tuple) else [value]
    pictures = [picture for picture in found if picture is not None]
    if not all(isinstance(picture, Image.Image) for picture in pictures):
        raise ConfigError(
            f"{place}: the image column holds a {type(pictures[0]).__name__}. Cast the column to "
            "datasets.Image, or set columns.image to null."
        )
    return tuple(picture.convert("RGB") for picture in pictures)


def text_of(value: Any, field: str, place: str) -> str:
    """A text or a number, in words.

    Raises:
        ConfigError: It is missing or something else; names the key `columns.<field>` and the row.
    """
    if value is None or not str(value).strip():
        raise ConfigError(
            f"{place}: the {field} is {value!r}, and what is missing cannot be asked or scored. "
            f"Drop such rows from the dataset, or name another column in columns.{field}."
        )
    if not isinstance(value, str | int | float):
        raise ConfigError(
            f"{place}: the {field} is a {type(value).__name__}, and must be a text or a number. "
            f"Name another column in columns.{field}, or rewrite this one."
        )
    return str(value).strip()


def choices_of(value: Any, column: str | None, place: str) -> tuple[str, ...]:
    """The choices of a question, none where the row has no list of them.

    Raises:
        ConfigError: It is no list, or one of them is missing; names column and row.
    """
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise ConfigError(
            f"{place}: columns.choices is {column!r}, which holds a {type(value).__name__}, and "
            "must hold a list of texts. Rewrite the column; where it is a list written as text, "
            "ast.literal_eval or json.loads of it is the list."
        )
    if None in value:
        raise ConfigError(
            f"{place}: columns.choices is {column!r}, where choice {list(value).index(None)} is "
            "None. Take missing choices out of the lists."
        )
    return tuple(map(str, value))


def answer_of(value: Any, choices: Sequence[str], place: str) -> str:
    """The answer in words, or with choices the letter of the right one.

    Raises:
        ConfigError: It is missing, or no choice.
    """
    text = text_of(value, "answer", place)
    if not choices:
        return text
    letters = ascii_uppercase[: len(choices)]
    if isinstance(value, int) and 0 <= value < len(choices):
        return letters[value]
    if text in choices:
        return letters[list(choices).index(text)]
    if len(text) == 1 and text.upper() in letters:
        return text.upper()
    raise ConfigError(
        f"{place}: the answer is {value!r}, neither a number nor a letter nor a text of the "
        f"{len(choices)} choices. Check columns.answer and columns.choices."
    )


def turns_of(value: Any, place: str) -> tuple[tuple[str, str], ...]:
    """A conversation's turns: speaker, and text with a marker for each picture.

    Raises:
        ConfigError: It is no list of turns of known speakers in turn, or the answer is missing.
    """
    if not isinstance(value, list | tuple):
        raise ConfigError(
            f"{place}: the conversation is a {type(value).__name__}, and must be a list of turns, "
            "each with role and content, or from and value. Rewrite the column."
        )
    turns = tuple(_turn(turn, place) for turn in value)
    speakers = [role for role, _ in turns]
    spoken = speakers[1:] if speakers[:1] == ["system"] else speakers
    if not spoken or spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise ConfigError(
            f"{place}: the speakers are {speakers}; a conversation alternates, begins with the "
            "user (a system turn may stand before) and ends with the answer. Cut it so."
        )
    text_of(turns[-1][1], "conversation", f"{place}, last turn")
    return turns


def _turn(turn: Any, place: str) -> tuple[str, str]:
    if not isinstance(turn, Mapping):
        raise ConfigError(
            f"{place}: a turn is a {type(turn).__name__}, and must have role and content, or from "
            "and value. Rewrite the column."
        )
    speaker = turn.get("role", turn.get("from"))
    role = SPEAKERS.get(str(speaker))
    if role is None:
        raise ConfigError(
            f"{place}: a turn holds {sorted(turn)} with the speaker {speaker!r}; turns have role "
            f"and content, or from and value, and speakers are {sorted(SPEAKERS)}. Rewrite the "
            "column."
        )
    return role, _said(turn.get("content", turn.get("value")), place)


def _said(content: Any, place: str) -> str:
    """A text, or a list of parts: texts on lines of their own, and markers for pictures."""
    if isinstance(content, str):
        return content.strip()
    if not isinstance(content, list | tuple):
        raise ConfigError(
            f"{place}: what a turn says is a {type(content).__name__}, and must be a text or a "
            "list of parts, each of type text or image. Rewrite the column."
        )
    return "\n".join(_part(part, place) for part in content).strip()


def _part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind == "image":
        return MARKER
    if kind == "text" and isinstance(text, str):
        return text.strip()
    raise ConfigError(
        f"{place}: a part of a turn is of type {kind!r}"
        f"{f' with a text of type {type(text).__name__}' if kind == 'text' else ''}; parts are "
        '{"type": "text", "text": ...}, or {"type": "image"} for the next picture of the image '
        "column. Rewrite the column."
    )
