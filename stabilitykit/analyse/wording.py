"""Numbers and untrusted names as people read them; every sentence of a report is made with these."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

_ESCAPE_SEQUENCE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]{0,500}(?:\x07|\x1b\\)")  # CSI and OSC
NAME_LIMIT = 200  # characters; a name longer than a line tells nobody anything


def count(value: int) -> str:
    """A whole number with thousands separators: `26,597`."""
    return f"{int(value):,}"


def plural(value: int, noun: str) -> str:
    """A number and its noun: `1 step`, `26,597 steps`."""
    return f"{count(value)} {noun}" + ("" if value == 1 else "s")


def number(value: float | None, digits: int = 4) -> str:
    """A measured value, short: `0.0312`, `26,597`, `1.2e-5`, `NaN`, `Inf`; an en dash where there is none."""
    if value is None:
        return "\N{EN DASH}"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Inf" if value > 0 else "-Inf"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return _fixed(value, digits)
    mantissa, exponent = f"{value:.{max(digits - 2, 1)}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def duration(seconds: float) -> str:
    """A span of time: `850 ms`, `12.3 s`, `4 min 10 s`, `3 h 5 min`."""
    if not math.isfinite(seconds):
        return number(seconds)
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, f"{count(hours)} h"), (minutes, f"{minutes} min"), (rest if not hours else 0, f"{rest} s")]
    return " ".join(text for value, text in parts if value)


def factor(decades: float) -> str:
    """A change in powers of ten as a multiple: `\N{MULTIPLICATION SIGN}31`, `\N{MULTIPLICATION SIGN}1.2e7`."""
    return "\N{MULTIPLICATION SIGN}" + number(10.0**decades, 3) if abs(decades) < 300 else f"10^{decades:.0f}"


def printable(text: str, limit: int = NAME_LIMIT) -> str:
    """`text` without what could act on a terminal, a page or an encoder: one line, no control or bidirectional marks.

    Escape sequences are left out, lone surrogates and private characters become `\N{REPLACEMENT CHARACTER}`, and
    what is longer than `limit` is cut in the middle, since both ends of a qualified name carry its meaning.
    """
    text = _ESCAPE_SEQUENCE.sub("", text)
    head = text if len(text) <= 4 * limit else text[: 2 * limit] + text[-2 * limit :]
    clean = "".join(_harmless(character) for character in head)
    if len(clean) <= limit:
        return clean
    half = (limit - 1) // 2
    return clean[: limit - 1 - half] + "\N{HORIZONTAL ELLIPSIS}" + clean[-half:]


def sentence(text: str) -> str:
    """`text` with a capital, as the first line of a report."""
    return text[:1].upper() + text[1:]


def listed(words: Sequence[str], limit: int = 3) -> str:
    """`a, b and c`; beyond `limit`, `a, b, c and 4 more`."""
    if len(words) > limit:
        return f"{', '.join(words[:limit])} and {count(len(words) - limit)} more"
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def _fixed(value: float, digits: int) -> str:
    if abs(value) < 1:
        return f"{value:.{digits - 1}g}"
    whole = len(str(int(abs(value))))
    text = f"{value:,.{max(digits - whole, 0)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _harmless(character: str) -> str:
    if character.isprintable():
        return character
    if character.isspace():
        return " "
    return "" if unicodedata.category(character) == "Cc" else "\N{REPLACEMENT CHARACTER}"
