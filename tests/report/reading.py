"""What a reader of the page gets: its tables with exact numbers, its references, its text."""

from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "link", "img", "br", "path", "rect", "circle"}
REFERENCES = {"src", "href", "srcset", "xlink:href", "poster", "action", "data"}

Cell = str | list[float]


class Page(HTMLParser):
    """Tables, references and elements of a page.

    A cell is the list of its exact numbers where it holds some, else its text.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[Cell]]] = []
        self.references: list[str] = []
        self.values: list[float] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.words = ""
        self._text, self._numbers = "", list[float]()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given: dict[str, Any] = dict(attributes)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self.references += [str(v) for k, v in given.items() if k in REFERENCES]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._text, self._numbers = "", []
        elif tag == "data":
            self.values.append(float(given["value"]))
            self._numbers.append(float(given["value"]))

    def handle_endtag(self, tag: str) -> None:
        if tag in VOID:
            return
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self._numbers or self._text.strip())
            self._text, self._numbers = "", []

    def handle_data(self, data: str) -> None:
        self._text += data
        if self.open[-1:] != ["style"]:
            self.words += data

    def table(self, first: str) -> dict[Any, list[Cell]]:
        """The rows behind the head of the table whose first head is `first`, by first cell."""
        (found,) = [rows for rows in self.tables if rows[0][0] == first]
        return {tuple(row[0]) if isinstance(row[0], list) else row[0]: row[1:] for row in found[1:]}
