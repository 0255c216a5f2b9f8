"""`stabilitykit report RUN`: write the report of a run, as one HTML file unless asked otherwise."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stabilitykit.cli.command import Outcome, add_run_argument, open_run_folder, verdict_code
from stabilitykit.errors import UsageError

if TYPE_CHECKING:
    from stabilitykit.report.write import Format

STANDARD_OUTPUT = Path("-")
SUMMARY = "write a run's report (HTML, PNG, text or JSON) and print its path"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_run_argument(parser)
    formats = ("html", "png", "text", "json")
    where = "file to write, - for standard output (default: report.* in the run folder)"
    parser.add_argument("--out", metavar="PATH", type=Path, help=where)
    parser.add_argument("--format", choices=formats, help="default: by the suffix of --out, else html")
    parser.add_argument("--png", action="store_true", help="write the image as well, beside the report")


def execute(arguments: argparse.Namespace) -> Outcome:
    """Write the report, and the image if asked for; a live, finished or killed run alike."""
    from stabilitykit.report.write import SUFFIXES, render, write_report

    kind = _format(arguments.format, arguments.out, SUFFIXES)
    run = open_run_folder(arguments.run)
    if arguments.out == STANDARD_OUTPUT:
        page = "" if kind == "png" or arguments.png else render(run, kind)
        if not isinstance(page, str) or not page:
            raise UsageError("--out -: got png, expected html, text or json; an image needs a file")
        return Outcome(text=page, code=verdict_code(run))
    target = arguments.out or run.path / f"report{SUFFIXES[kind]}"
    wanted = {target: kind} | ({target.with_suffix(".png"): "png"} if arguments.png else {})
    try:
        written = [write_report(run, path, format) for path, format in wanted.items()]  # noqa: A001
    except OSError as error:
        raise UsageError(f"{target}: {error.strerror or error}; give another path with --out") from error
    return Outcome(text="".join(f"{path}\n" for path in written), code=verdict_code(run))


def _format(asked: Format | None, out: Path | None, suffixes: Mapping[Format, str]) -> Format:
    """The format asked for, else the one that the file's name tells; they may not differ."""
    suffix = out.suffix.lower() if out is not None else ""
    told = next((kind for kind, own in suffixes.items() if own == suffix), None)
    if asked is not None and told is not None and asked != told:
        raise UsageError(
            f"--out {out}: got --format {asked}, expected {told} by the file's name; leave one of them out"
        )
    return asked or told or "html"
