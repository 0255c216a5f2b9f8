"""`stabilitykit postmortem RUN`: how a run ended, what went wrong first, and what to do, in the terminal."""

from __future__ import annotations

import argparse
import shutil
import sys

from stabilitykit.cli.command import Outcome, add_run_argument, open_run_folder, verdict_code

SUMMARY = "say how a run ended, what went wrong first, and what to do about it"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_run_argument(parser)
    parser.add_argument("--json", action="store_true", help="for machines: one JSON object")


def execute(arguments: argparse.Namespace) -> Outcome:
    """Render the post-mortem, coloured when standard output is a terminal."""
    from stabilitykit.report import json_text, text

    run = open_run_folder(arguments.run)
    if arguments.json:
        return Outcome(text=json_text.render(run), code=verdict_code(run))
    terminal = sys.stdout.isatty()
    page = text.render_for_terminal(run, shutil.get_terminal_size().columns) if terminal else text.render(run)
    return Outcome(text=page, code=verdict_code(run))
