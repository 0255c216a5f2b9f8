"""Which of a GradScaler's skips deserve a look."""

from __future__ import annotations

from stabilitykit.watch.reading import Reading


class Skips:
    """At the start a scaler skips until it has found its scale; later it was raised too far, or hides a bad loss.

    Args:
        looks: so many skips are odd at most, since a look costs as much as many steps, and a scaler that raises its
            scale every 2,000 steps skips as often; 0 where there is no scaler.
    """

    def __init__(self, looks: int) -> None:
        self._looks = looks
        self._settled = False

    def odd(self, reading: Reading) -> bool:
        """Whether this step was skipped although the one before was not; asked once a step."""
        settled, self._settled = self._settled, reading.stepped
        odd = settled and self._looks > 0 and reading.unused_gradients
        self._looks -= odd
        return odd
