"""What happens in child processes when a run faults or ends: compaction of the log and the report."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from stabilitykit.config import MonitorConfig

PATIENCE_SECONDS = 120.0


def new_run_dir() -> Path:
    """`runs/<time>`, not there yet."""
    stamp = datetime.now().astimezone().strftime("%Y-%m-%d-%H%M%S")
    candidates = (Path("runs") / (stamp + (f"-{count}" if count else "")) for count in range(1000))
    return next(path for path in candidates if not path.exists())


class Aftermath:
    """Runs the second half of the toolkit in processes of its own: no pandas and no parquet in the training process."""

    def __init__(self, run_dir: Path, config: MonitorConfig) -> None:
        self._run_dir, self._config = run_dir, config

    def render(self) -> str:
        """Render the report and wait for it; its path, empty when none is wanted or it could not be made."""
        if not self._config.report:
            return ""
        done = _run("stabilitykit", "report", str(self._run_dir))
        path = self._run_dir / "report.html"
        return str(path) if done and path.exists() else ""

    def finish(self) -> None:
        """Write the parquet parts, then the report of the whole run."""
        if self._config.compact:
            _run("stabilitykit.record.compact", str(self._run_dir), "--all")
        self.render()


def _run(module: str, *arguments: str) -> bool:
    """Run a module of ours in a child; False where it did not end well: the log is still there, and can be read."""
    home = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH", ""))))
    try:
        done = subprocess.run(  # noqa: S603 - our own modules, no shell
            [sys.executable, "-m", module, *arguments],
            env=os.environ | {"PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode in (0, 1)
