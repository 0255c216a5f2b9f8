"""`stabilitykit report RUN`: write the report of a run, as one HTML file unless asked otherwise."""

from __future__ import annotations

import argparse
from pathlib import Path

from stabilitykit.cli.command import Outcome, add_run_argument, open_run_folder, verdict_code
from stabilitykit.errors import UsageError

SUMMARY = "write a run's report (HTML, PNG, text or JSON) and print its path"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_run_argument(parser)
    formats = ("html", "png", "text", "json")
    parser.add_argument("--out", metavar="PATH", type=Path, help="file to write (default: report.* in the run folder)")
    parser.add_argument("--format", choices=formats, default="html", help="default: html")
    parser.add_argument("--png", action="store_true", help="write the image as well, beside the report")


def execute(arguments: argparse.Namespace) -> Outcome:
    """Write the report, and the image if asked for; a live, finished or killed run alike."""
    from stabilitykit.report.write import SUFFIXES, write_report

    run = open_run_folder(arguments.run)
    target = arguments.out or run.path / f"report{SUFFIXES[arguments.format]}"
    wanted = {target: arguments.format} | ({target.with_suffix(".png"): "png"} if arguments.png else {})
    try:
        written = [write_report(run, path, format) for path, format in wanted.items()]  # noqa: A001
    except OSError as error:
        raise UsageError(f"{target}: {error.strerror or error}; give another path with --out") from error
    return Outcome(text="".join(f"{path}\n" for path in written), code=verdict_code(run))
