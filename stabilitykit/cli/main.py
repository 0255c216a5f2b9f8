"""The `stabilitykit` command: picks the sub-command, prints what it gives, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import cast

from stabilitykit import __version__
from stabilitykit.cli.command import UNREADABLE, USAGE, Command
from stabilitykit.errors import StabilityKitError, UnreadableRunError

COMMANDS = ("report", "postmortem")  # modules of this package, in the order of `--help`
EPILOG = (
    "Exit codes: 0 fine, 1 findings (a fault; a run that raised or was killed), 2 usage or bad input, 3 unreadable."
)
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the arguments, those of the process by default.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if "command" not in arguments:
        parser.print_usage(sys.stderr)
        return USAGE
    try:
        outcome = cast("Command", arguments.command).execute(arguments)
        sys.stdout.write(_printable(outcome.text))
        sys.stdout.flush()
    except UnreadableRunError as error:
        return _fail(error, UNREADABLE)
    except StabilityKitError as error:
        return _fail(error, USAGE)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - of ours, or a damage that nobody foresaw: no exit code of a run's
        traceback.print_exc()
        return _fail(f"{arguments.run}: cannot be shown, see above: {error!r}", UNREADABLE)
    return outcome.code


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="stabilitykit", description="Where, when and why a training run first went NaN or Inf.", epilog=EPILOG
    )
    parser.add_argument("--version", action="version", version=f"stabilitykit {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name in COMMANDS:
        command = cast("Command", import_module(f"stabilitykit.cli.{name}"))
        own = commands.add_parser(name, help=command.SUMMARY, description=command.__doc__, epilog=EPILOG)
        command.configure(own)
        own.set_defaults(command=command)
    return parser


def _printable(text: str) -> str:
    """What standard output's encoding can hold of it, a question mark for the rest."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _fail(error: object, code: int) -> int:
    line = " ".join(str(error).split())
    sys.stderr.write(f"stabilitykit: error: {line}\n")
    return code
