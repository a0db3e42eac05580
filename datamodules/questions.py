"""Questions about pictures, with answers: from the embedded world or a `datasets` folder."""

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any, Protocol, overload

from PIL import Image

from recon.datamodules.rows import MARKER, answer_of, choices_of, pictures_of, text_of, turns_of
from recon.errors import ConfigError
from recon.zoo.world import Split


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the answer."""

    turns: tuple[tuple[str, str], ...]
    """(`user` or `assistant`, text) in order, the first and the last the user's; a `system` turn
    may stand before. A marker `<image>` in a text stands for the next picture, and without any the
    pictures come first in the user's first turn."""
    answer: str
    pictures: tuple[Image.Image, ...] = ()
    kind: str = "all"
    """What accuracies are told apart by."""
    choices: tuple[str, ...] | None = None
    """What the answer, then a letter, is chosen from; None where it is free."""

    @property
    def question(self) -> str:
        """The user's last text."""
        return self.turns[-1][1]

    @property
    def content(self) -> str:
        """Hash of pictures and texts without the answer, blind to case and spaces."""
        digest = hashlib.sha256()
        for picture in self.pictures:
            pixels = picture.convert("RGB")
            digest.update(f"{pixels.size}".encode() + pixels.tobytes())
        for role, text in self.turns:
            digest.update(f"\0{role}\0{' '.join(text.lower().split())}".encode())
        return digest.hexdigest()


class Source(Protocol):
    """Examples that are read one by one; a list is one."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Example]: ...
    def __getitem__(self, index: int, /) -> Example: ...


@dataclass(frozen=True)
class Columns:
    """Which columns of a dataset hold what: the `columns.*` keys.

    Either `conversation` is set, or question and answer. Columns that are null are not read.

    Raises:
        ConfigError: Neither a conversation nor question and answer are named.
    """

    image: str | None = "image"
    """A picture, a list of pictures, or empty for a text alone."""
    question: str | None = "question"
    answer: str | None = "answer"
    """Text; with choices also a choice's number, counted from 0, or its letter."""
    choices: str | None = None
    """List of texts. Source: ScienceQA."""
    hint: str | None = None
    """Text put before the question. Source: ScienceQA."""
    kind: str | None = None
    """What accuracies are told apart by, such as `subject`."""
    conversation: str | None = None
    """List of turns, each with `role` and `content`, or `from` and `value`; the last is the
    answer. What is said is a text, or a list of parts, `{"type": "text", "text": ...}` or
    `{"type": "image"}` for the next picture. Source: LLaVA's conversation files; chat templates."""

    def __post_init__(self) -> None:
        """Refuse a mapping that makes no question."""
        if self.conversation is None and (self.question is None or self.answer is None):
            raise ConfigError(
                "columns names neither a conversation nor both question and answer. Set "
                "columns.conversation, or columns.question and columns.answer."
            )

    def named(self) -> dict[str, str]:
        """Columns that are read, by field."""
        unread = (
            ("question", "answer", "choices", "hint") if self.conversation else ("conversation",)
        )
        return {k: v for k, v in vars(self).items() if v is not None and k not in unread}


def world_examples(split: Split, count: int, seed: int) -> Iterator[Example]:
    """Questions of the embedded world, kinds in turn, half of them with choices."""
    from recon.zoo.vlm_questions import records

    return (
        Example(
            turns=(("user", record.prompt),),
            answer=record.answer,
            pictures=(record.picture,),
            kind=record.kind,
            choices=record.choices,
        )
        for record in records(seed, count, split)
    )


def dataset_examples(path: str, split: str, columns: Columns, seed: int | None, key: str) -> Source:
    """All examples of a local dataset, each read whenever it is asked for.

    Args:
        path: What `Dataset.save_to_disk` wrote, or a folder of files that `load_dataset` reads.
        split: Taken where the dataset has several.
        columns: Which columns hold what.
        seed: Shuffles them; None: as they stand.
        key: Configuration key, for messages.

    Raises:
        ConfigError: Nothing is there, or a mapped column is missing; and on reading an example, its
            row holds something else than it should.
    """
    rows = _opened(path, split, key)
    missing = {f: c for f, c in columns.named().items() if c not in rows.column_names}
    if missing:
        field, column = next(iter(missing.items()))
        raise ConfigError(
            f"columns.{field} is {column!r}, but {key} ({path}) has the columns "
            f"{sorted(rows.column_names)}. Name the one that holds it, or set it to null."
        )
    order = list(range(len(rows)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    return _Rows(rows, order, columns, path)


class Different(Sequence[Example]):
    """The first `count` examples of different content, all of them if None.

    Each is read from the source again whenever it is asked for; kept are only hashes and answers,
    so that pictures fill no memory.

    Args:
        source: Where they come from, with repetitions.
        count: How many are wanted.
        key: What the source is called, for messages.

    Raises:
        ConfigError: There are fewer, or as the source on reading.
    """

    def __init__(self, source: Source, count: int | None, key: str) -> None:
        self._source = source
        self._found: dict[str, tuple[int, str]] = {}
        for index in range(len(source)):
            if len(self._found) == count:
                break
            example = source[index]
            self._found.setdefault(example.content, (index, example.answer))
        if count is not None and len(self._found) < count:
            raise ConfigError(
                f"{count} different examples are asked of {key}, which has {len(self._found)}. Ask "
                "for fewer, or add some."
            )
        self._indices = [index for index, _ in self._found.values()]

    @property
    def contents(self) -> list[str]:
        """`Example.content` of each, without reading."""
        return list(self._found)

    @property
    def asked(self) -> list[str]:
        """Content and answer of each as one text, without reading."""
        return [content + answer for content, (_, answer) in self._found.items()]

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        """Reads one, or all of a slice."""
        if isinstance(index, slice):
            return [self._source[each] for each in self._indices[index]]
        return self._source[self._indices[index]]


def parts(example: Example) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The turns as chat templates take them: role and content, pictures in their places.

    Raises:
        ConfigError: There are not as many pictures as markers.
    """
    pictures = iter(example.pictures)
    markers = sum(text.count(MARKER) for _, text in example.turns)
    if markers not in (0, len(example.pictures)):
        raise ConfigError(
            f"The texts of {example.question!r} have {markers} {MARKER} for "
            f"{len(example.pictures)} pictures. Write one for each, or none: then pictures come "
            "first."
        )
    for role, text in example.turns:
        content: list[dict[str, Any]] = []
        if not markers and role == "user":  # all of them, so that later turns find none left
            content += [{"type": "image", "image": picture} for picture in pictures]
        for place, piece in enumerate(text.split(MARKER)):
            if place:
                content.append({"type": "image", "image": next(pictures)})
            if piece.strip():
                content.append({"type": "text", "text": piece.strip()})
        yield role, content


class _Rows:
    def __init__(self, rows: Any, order: Sequence[int], columns: Columns, path: str) -> None:
        self._rows, self._order, self._columns, self._path = rows, order, columns, path

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int, /) -> Example:
        row = self._order[index]
        return _example(self._rows[row], self._columns, f"{self._path}, row {row}")


def _opened(path: str, split: str, key: str) -> Any:
    from datasets import DatasetDict, load_dataset, load_from_disk  # heavy: only for a dataset

    place = Path(path).expanduser()
    if not place.is_dir():
        raise ConfigError(
            f"{key} is {path!r}, and {place.absolute()} is not a folder. Give a folder that "
            "Dataset.save_to_disk wrote or that load_dataset reads, or null for the embedded "
            "world's questions."
        )
    saved = (place / "dataset_dict.json").exists() or (place / "state.json").exists()
    try:
        rows = load_from_disk(str(place)) if saved else load_dataset(str(place))
    except Exception as error:  # datasets raises whatever Arrow, JSON or the file system raise
        raise ConfigError(
            f"{key} is {path!r}, which datasets cannot open: {error}. Write it with "
            "Dataset.save_to_disk."
        ) from error
    if isinstance(rows, DatasetDict):
        if split not in rows:
            raise ConfigError(
                f"{key} is {path!r}, which has the splits {sorted(rows)} and no {split!r}. Name "
                "one of them."
            )
        return rows[split]
    return rows


def _example(row: Mapping[str, Any], columns: Columns, place: str) -> Example:
    held = {field: row[column] for field, column in columns.named().items()}
    pictures = pictures_of(held.get("image"), place)
    kind = str(held.get("kind", "all"))
    if "conversation" in held:
        turns = turns_of(held["conversation"], place)
        return Example(turns[:-1], turns[-1][1], pictures, kind)
    choices = choices_of(held.get("choices"), columns.choices, place)
    lines = [str(held.get("hint") or "").strip(), text_of(held["question"], "question", place)]
    lines += [f"{ascii_uppercase[i]}. {choice}" for i, choice in enumerate(choices)]
    answer = answer_of(held["answer"], choices, place)
    text = "\n".join(line for line in lines if line)
    return Example((("user", text),), answer, pictures, kind, choices or None)
