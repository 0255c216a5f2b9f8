"""What a command is: a module of this package with SUMMARY, `configure` and `execute`; it neither prints nor exits."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from stabilitykit.errors import UsageError

if TYPE_CHECKING:
    from stabilitykit.read import Run

FINE, FINDINGS, USAGE, UNREADABLE = range(4)  # exit codes


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command leaves to `main`: text for standard output, and the exit code."""

    text: str
    code: int


class Command(Protocol):
    """One sub-command; its heavy imports belong into `execute`, so that `--help` stays instant."""

    SUMMARY: str

    @staticmethod
    def configure(parser: argparse.ArgumentParser) -> None:
        """Add the command's arguments."""

    @staticmethod
    def execute(arguments: argparse.Namespace) -> Outcome:
        """Do it."""


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """The run folder, first argument of most commands."""
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder, as given to attach(run_dir=...)")


def open_run_folder(path: Path) -> Run:
    """The run at `path`.

    Raises:
        UsageError: there is no such folder.
        UnreadableRunError: it is no run folder, or one of a newer version.
    """
    from stabilitykit.read import open_run

    if not path.is_dir():
        raise UsageError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}, expected a run folder")
    return open_run(path)


def verdict_code(run: Run) -> int:
    """FINDINGS for a fault, or a run that raised or was killed; FINE otherwise."""
    from stabilitykit.analyse.findings import analyse

    return FINDINGS if analyse(run).level in {"fault", "ended"} else FINE
