"""How often tensors are recorded: within a budget of time, and at every step once loss or gradient norm leap up."""

from __future__ import annotations

import math

from stabilitykit.config import CADENCES

SETTLED = 20  # steps a series must have before anything can be out of the ordinary
WATCHED = 5  # steps recorded after a departure
PAUSE = 100  # steps from one departure to the next that is heeded: a jumpy series costs no more


class Cadence:
    """Decides for each step whether its tensors are recorded.

    Attributes:
        recording: whether the current step's are.
        spent: seconds of watching in the current step, as far as known.
    """

    def __init__(self, fixed: int | None, budget: float) -> None:
        """`fixed`: the cadence asked for; None: the densest one with which watching takes `budget` of a step's time.

        The sentinel is part of that; where it takes most of it, half of the budget is left for recording.
        """
        self.recording = False
        self.spent = 0.0
        self._fixed, self._budget = fixed, budget
        self._plain = self._recorded = 0.0  # seconds of a step that is not recorded, and of one that is
        self._sentinel = 0.0  # seconds of watching in a step that is not recorded
        self._ended = 0
        self._loss, self._grad_norm = _Past(), _Past()
        self._heed_from = self._dense_until = 0

    @property
    def every(self) -> int:
        """The cadence in force."""
        if self._fixed:
            return self._fixed
        return 1 if self._ended < self._dense_until else self._affordable()

    def begin(self, step: int) -> bool:
        """A step starts; whether to record it."""
        self.spent = 0.0
        self.recording = step % self.every == 0
        return self.recording

    def end(self, seconds: float, loss: float, grad_norm: float) -> None:
        """A step is over: `seconds` is the user's function with our hooks in it."""
        total = seconds + self.spent
        if self.recording:
            self._recorded = total if not self._recorded else 0.8 * self._recorded + 0.2 * total
        else:
            self._plain = total if not self._plain else 0.9 * self._plain + 0.1 * total
            self._sentinel = self.spent if not self._sentinel else 0.9 * self._sentinel + 0.1 * self.spent
        self._ended += 1
        departed = self._loss.departs(loss) | self._grad_norm.departs(grad_norm)
        if departed and self._ended >= self._heed_from:
            self._dense_until, self._heed_from = self._ended + WATCHED, self._ended + PAUSE

    def _affordable(self) -> int:
        if not self._plain or not self._recorded:
            return 1 if self._ended == 0 else 2  # the second step is left out, to know what one costs without
        allowed = self._budget * (self._plain - self._sentinel)
        left = max(allowed - self._sentinel, allowed / 2, 1e-9)
        wanted = max(self._recorded - self._plain, 0.0) / left
        return next((cadence for cadence in CADENCES if cadence >= wanted), CADENCES[-1])


class _Past:
    """Mean and spread of a series' logarithm, the recent past counting more."""

    def __init__(self) -> None:
        self._mean = self._variance = 0.0
        self._seen = 0

    def departs(self, value: float) -> bool:
        """Whether `value` is out of the ordinary upwards: six deviations, and threefold at least."""
        if not (0.0 < value < math.inf):
            return False
        distance = math.log(value) - self._mean
        departs = self._seen >= SETTLED and distance > max(6.0 * math.sqrt(self._variance), math.log(3.0))
        self._seen += 1
        share = max(0.02, 1.0 / self._seen)
        self._mean += share * distance
        self._variance = (1.0 - share) * (self._variance + share * distance * distance)
        return departs
