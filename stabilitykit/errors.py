"""The toolkit's own exceptions: few types, one root, each message ends in what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stabilitykit.schema import Diagnosis


class StabilityKitError(Exception):
    """The root of everything the toolkit raises on purpose."""


class UsageError(StabilityKitError, ValueError):
    """An argument, option or call that cannot be right; the message says what was expected."""


class RunFolderError(StabilityKitError, OSError):
    """A run folder that cannot be used: it holds another run, or cannot be written."""


class UnreadableRunError(StabilityKitError, OSError):
    """A path that is no run folder, or one written by a newer major schema."""


class NonFiniteError(StabilityKitError, ArithmeticError):
    """A step went non-finite; the message is the verdict.

    Attributes:
        diagnosis: the whole finding, or None when no diagnosis could be made.
        report: path of the HTML report that a child process renders, empty when none was asked for.
    """

    def __init__(self, message: str, diagnosis: Diagnosis | None = None, report: str = "") -> None:
        super().__init__(message)
        self.diagnosis = diagnosis
        self.report = report
