"""The live half's front door: attach() and the Monitor, where watching, recording and diagnosing meet."""

from stabilitykit.monitor.attach import attach
from stabilitykit.monitor.monitor import Monitor

__all__ = ["Monitor", "attach"]
