"""How a guard that can change the training stands: away, by, or in command."""

from __future__ import annotations

from typing import Literal, get_args

from stabilitykit.errors import UsageError

# off: not there. hold: changes nothing in a healthy run, keeps things as they are. on: does what the stability guide
# prescribes, to healthy runs as well.
GuardMode = Literal["off", "hold", "on"]


def check_mode(flag: str, mode: str) -> None:
    """Refuse what is no mode.

    Raises:
        UsageError: it is none.
    """
    if mode not in get_args(GuardMode):
        raise UsageError(f"--{flag}: got {mode!r}, expected off, hold or on")
