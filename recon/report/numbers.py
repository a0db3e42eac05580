"""Numbers as they are read, beside the exact ones."""

import json
import re
from typing import Any

from markupsafe import Markup, escape

MISSING = "–"


def number(value: float | None, form: str = ".4g") -> Markup:
    """A number in `form`, and exactly in the `value` of its element; a dash for None.

    >>> print(number(0.0019881, ".2e"))
    <data value="0.0019881">1.99 × 10<sup>−3</sup></data>
    >>> print(number(1269760, ",d"))
    <data value="1269760">1,269,760</data>
    """
    if value is None:
        return Markup(MISSING)
    shown = str(escape(format(value, form))).replace("-", "−")
    shown = re.sub(r"e([+−])0*(\d+)$", _power, shown)
    return Markup(f'<data value="{escape(repr(value))}">{shown}</data>')


def _power(found: re.Match[str]) -> str:
    sign = "" if found[1] == "+" else "−"
    return f" × 10<sup>{sign}{found[2]}</sup>"


def measure(value: float | int | str | None) -> Markup:
    """A value of an evaluation in about four digits; counts whole, text as it is.

    >>> print(measure(0.98642738), measure(39.7539331))
    <data value="0.98642738">0.9864</data> <data value="39.7539331">39.75</data>
    """
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, int):
        return number(value, ",d")
    if value == 0:
        return number(value, ".0f")
    if value is None or 1e-3 <= abs(value) < 10:
        return number(value, ".4f")
    return number(value, ".2e" if abs(value) < 1e-3 else ",.2f")


def tick(value: float) -> str:
    """A number on an axis, short."""
    text = f"{value:.3g}"
    if "e" in text:
        digits, _, power = text.partition("e")
        exponent = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        text = f"10{exponent}" if digits == "1" else f"{digits}·10{exponent}"
    return text.replace("-", "−")


def setting(value: Any) -> str:
    """A setting as YAML would have it, on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def size(value: int) -> Markup:
    """Bytes in the largest binary unit that leaves a whole part, and exactly in the element.

    >>> print(size(1269760))
    <data value="1269760">1.21 MiB</data>
    """
    amount, unit = float(value), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    shown = f"{amount:.3g}" if amount < 1000 else f"{amount:.0f}"
    return Markup(f'<data value="{value}">{shown} {unit}</data>')
