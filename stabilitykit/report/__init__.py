"""A run rendered as HTML, PNG, terminal text or JSON, each by `render(run)` of one module."""

from stabilitykit.report.write import FORMATS, write_report

__all__ = ["FORMATS", "write_report"]
