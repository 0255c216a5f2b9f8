"""One door to every output: `write_report` picks the module, renders, and writes in one move."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from stabilitykit.errors import UsageError

if TYPE_CHECKING:
    from stabilitykit.read import Run

Format = Literal["html", "png", "text", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES: dict[Format, str] = {"html": ".html", "png": ".png", "text": ".txt", "json": ".json"}
_MODULES: dict[Format, str] = {"html": "html", "png": "png", "text": "text", "json": "json_text"}


def render(run: Run, format: Format = "html") -> str | bytes:  # noqa: A002 - the word people look for
    """The report as text, or as bytes for `png`; a format's libraries are imported when it is asked for.

    Raises:
        UsageError: there is no such format.
    """
    if format not in _MODULES:
        raise UsageError(f"write_report: got format={format!r}, expected one of {', '.join(FORMATS)}")
    rendered: str | bytes = import_module(f"stabilitykit.report.{_MODULES[format]}").render(run)
    return rendered


def write_report(run: Run, path: str | os.PathLike[str], format: Format = "html") -> Path:  # noqa: A002
    """Render `run` and write it to `path`, whose folder is made if need be; a reader never sees half a file.

    Args:
        run: an opened run, see `open_run`.
        path: where to write; an existing file is replaced.
        format: `html`, `png`, `text` or `json`.

    Returns:
        The path written.

    Raises:
        UsageError: there is no such format.
        OSError: the file cannot be written.
    """
    content = render(run, format)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    return target
