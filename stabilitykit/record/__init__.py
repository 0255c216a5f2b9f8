"""Rows into a checksummed log, sealed segments into parquet parts; numpy and bytes, no torch."""

from stabilitykit.record.recorder import Recorder

__all__ = ["Recorder"]
