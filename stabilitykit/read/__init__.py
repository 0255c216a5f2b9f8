"""A run folder as tables, without torch."""

from stabilitykit.read.run import Run, open_run

__all__ = ["Run", "open_run"]
