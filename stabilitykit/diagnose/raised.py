"""What an exception is about: the value that the `if` around the raise had looked at."""

from __future__ import annotations

import ast
import linecache
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from stabilitykit.diagnose.graph import Source

Line = tuple[str, int]  # a file and a line in it


@dataclass(frozen=True, slots=True)
class Look:
    """Python read a non-finite value, or a check of one: what it had been, and the lines that led to the reading."""

    source: Source
    lines: Sequence[Line]


def looked_at(error: Exception, looks: Sequence[Look]) -> Source | None:
    """What was last looked at in a condition that the exception was raised under; None where there is no such."""
    tests = set(_tests(error))
    return next((look.source for look in reversed(looks) if not tests.isdisjoint(look.lines)), None)


def _tests(error: Exception) -> Iterator[Line]:
    """The lines of every condition that encloses a line of the traceback."""
    frame = error.__traceback__
    while frame is not None:
        file, line = frame.tb_frame.f_code.co_filename, frame.tb_lineno
        for test, branches in _conditions(file):
            if line in branches:
                yield from ((file, number) for number in test)
        frame = frame.tb_next


@lru_cache(maxsize=64)
def _conditions(file: str) -> Sequence[tuple[range, range]]:
    """The lines of each condition in a file, and those of what is done under it."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return ()
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.While):
            found.append((_lines(node.test, node.test), _lines(node.body[0], [*node.body, *node.orelse][-1])))
        elif isinstance(node, ast.Assert):
            found.append((_lines(node.test, node.test), _lines(node, node)))
    return found


def _lines(first: ast.stmt | ast.expr, last: ast.stmt | ast.expr) -> range:
    return range(first.lineno, (last.end_lineno or last.lineno) + 1)
