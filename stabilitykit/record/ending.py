"""How a run ended, and whether its process is still there; the monitor writes it, the reader compares."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

from stabilitykit.record.folder import replace_file

if TYPE_CHECKING:
    from stabilitykit.schema import Ending

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def write_ending(run_dir: Path, ending: Ending, step: int, error: str = "", *, attempt: int = 0) -> bool:
    """Write `ending.json`, durably and in one move.

    Args:
        run_dir: the run folder.
        ending: `completed` or `raised`; a killed run is known by having none.
        step: the last step begun.
        error: what was raised, as one line.
        attempt: the attempt that ended, so that its ending is not taken for a later one's.

    Returns:
        Whether it could be written; a full disk at the end of a run is no reason to raise.
    """
    body = {"ending": ending, "step": step, "wall_time": time.time(), "error": error, "attempt": attempt}
    try:
        replace_file(run_dir, run_dir / "ending.json", json.dumps(body).encode())
    except OSError:
        return False
    return True


def ended_attempt(run_dir: Path) -> int | None:
    """The attempt that `ending.json` tells of; None where there is none that can be read."""
    try:
        attempt = json.loads((run_dir / "ending.json").read_text(encoding="utf-8"))["attempt"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return attempt if isinstance(attempt, int) else None


def machine_id() -> str:
    """Opaque id of this machine since its last boot: process ids mean nothing elsewhere or afterwards."""
    try:
        boot = _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return hashlib.sha256(f"{platform.node()}\n{boot}".encode("utf-8", "surrogateescape")).hexdigest()[:16]


def process_start(pid: int) -> str:
    """Opaque start time of a living process, so that a recycled pid is not mistaken for it; "" where there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return ""
    fields = status.rpartition(b")")[2].split()  # the name before it may hold spaces and parentheses
    state, started = fields[0], fields[19]
    return "" if state in b"ZX" else started.decode()


def is_running(pid: object, started: str, machine: str) -> bool:
    """Whether the process that noted these three facts about itself still runs here."""
    if not isinstance(pid, int) or not started:
        return False
    return machine == machine_id() and process_start(pid) == started


def this_process() -> dict[str, int | str]:
    """The three facts, as an entry of run.json's `attempts` holds them."""
    pid = os.getpid()
    return {"pid": pid, "process_start": process_start(pid), "machine": machine_id()}
