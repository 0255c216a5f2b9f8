"""What all guards share: a name, a count, and a place to say that they acted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from stabilitykit.errors import UsageError

OnEvent = Callable[..., None]  # on_event(kind, message, **data), as `Monitor.log_event` takes it


class Guard:
    """A part that watches for one kind of trouble and does something about it.

    Args:
        on_event: called as `on_event("guard", message, subject=name, severity=..., **facts)` each time the guard acts;
            a `Monitor` (its `log_event` is called), any callable, or None.

    Attributes:
        num_acted: how often it acted.
    """

    name: ClassVar[str] = "guard"

    def __init__(self, on_event: object | None = None) -> None:
        self.num_acted = 0
        self._on_event = listener(on_event)

    def listen(self, on_event: object | None) -> None:
        """Say it there from now on."""
        self._on_event = listener(on_event)

    def acted(self, message: str, *, severity: str = "warning", **facts: Any) -> None:
        """Count an act and announce it; `info` is for what was planned, such as layers frozen after a task."""
        self.num_acted += 1
        if self._on_event is not None:
            self._on_event("guard", message, subject=self.name, severity=severity, **facts)

    def state_dict(self) -> dict[str, Any]:
        """How often it acted: a step that is run again counts once."""
        return {"num_acted": self.num_acted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the count back."""
        self.num_acted = state["num_acted"]


def listener(target: object | None) -> OnEvent | None:
    """The callable behind a Monitor or a callable.

    Raises:
        UsageError: it is neither.
    """
    found = getattr(target, "log_event", target)
    if found is not None and not callable(found):
        raise UsageError(f"guard: got on_event={target!r:.60}, expected a Monitor or a callable(kind, message, **data)")
    return found
