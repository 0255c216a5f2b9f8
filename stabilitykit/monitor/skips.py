"""Which of a GradScaler's skips deserve a look."""

from __future__ import annotations

from stabilitykit.watch.reading import Reading


class Skips:
    """At the start a scaler skips until it has found its scale; later it was raised too far, or hides a bad loss.

    Args:
        scaled: whether there is a scaler.
    """

    def __init__(self, *, scaled: bool) -> None:
        self._scaled = scaled
        self._settled = False

    def odd(self, reading: Reading) -> bool:
        """Whether this step was skipped although the one before was not; asked once a step."""
        settled, self._settled = self._settled, reading.stepped
        return settled and self._scaled and reading.unused_gradients
