"""What happens in child processes: compaction of the log while the run goes on and at its end, and the report."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from stabilitykit.config import MonitorConfig
from stabilitykit.errors import UsageError
from stabilitykit.monitor.ledger import Ledger
from stabilitykit.monitor.newcomers import Newcomers

PATIENCE_SECONDS = 120.0
_LEAST_PRIORITY = 19
_COMPACT = "stabilitykit.record.compact"


def new_run_dir() -> Path:
    """`runs/<time>`, not there yet."""
    stamp = datetime.now().astimezone().strftime("%Y-%m-%d-%H%M%S")
    candidates = (Path("runs") / (stamp + (f"-{count}" if count else "")) for count in range(1000))
    return next(path for path in candidates if not path.exists())


def as_path(run_dir: object) -> Path:
    """The caller's run folder.

    Raises:
        UsageError: it is no path, or an empty one, which would be the current folder.
    """
    if not isinstance(run_dir, str | os.PathLike) or not os.fspath(run_dir):
        raise UsageError(f"attach: got run_dir={run_dir!r:.60}, expected a path; it is made if need be")
    return Path(run_dir)


class Aftermath:
    """Runs the second half of the toolkit in processes of its own: no pandas and no parquet in the training process.

    Children work in the directory the run was started in, so that `run_dir` means the same to them. In a forked child
    of the training process every method does nothing.
    """

    def __init__(self, run_dir: Path, config: MonitorConfig) -> None:
        self._run_dir, self._config = run_dir, config
        self._directory = None if run_dir.is_absolute() else Path.cwd()
        self._pid = os.getpid()
        self._compactor: subprocess.Popen[bytes] | None = None
        self._num_taken = 0  # sealed segments that a compactor was started for

    def tend(self, num_sealed: int) -> None:
        """Compact what has been sealed, in a process that nobody waits for; called after each step.

        There is one such process at a time. Whether it did well is of no interest: what it left, the next one takes,
        or the one at the end.
        """
        if num_sealed == self._num_taken and self._compactor is None:
            return
        if os.getpid() != self._pid or not self._config.compact:
            return
        if self._compactor is not None:
            if self._compactor.poll() is None:
                return
            self._compactor = None
        if num_sealed > self._num_taken:
            self._num_taken = num_sealed
            self._compactor = self._start(_COMPACT, str(self._run_dir))
            if self._compactor is not None:
                with suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, self._compactor.pid, _LEAST_PRIORITY)

    @property
    def report(self) -> Path:
        """Where the report is, or will be: relative to where the script is now only if it is where it was."""
        away = "" if self._directory in (None, Path.cwd()) else str(self._directory)
        return Path(away, self._run_dir, "report.html")

    def render(self) -> str:
        """Render the report and wait for it; its path, empty when none is wanted or it could not be made."""
        if os.getpid() != self._pid or not self._config.report:
            return ""
        done = _wait(self._start("stabilitykit", "report", str(self._run_dir)))
        return str(self.report) if done and self.report.exists() else ""

    def finish(self) -> None:
        """Write the parquet parts, then the report of the whole run."""
        if os.getpid() != self._pid:
            return
        compactor, self._compactor = self._compactor, None
        _wait(compactor)
        if self._config.compact:
            _wait(self._start(_COMPACT, str(self._run_dir), "--all"))
        self.render()

    def _start(self, module: str, *arguments: str) -> subprocess.Popen[bytes] | None:
        """A module of ours in a child; None where there is no room for one: the log stays, and can be read."""
        home = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH", ""))))
        try:
            return subprocess.Popen(  # noqa: S603 - our own modules, no shell
                [sys.executable, "-P", "-m", module, *arguments],  # -P: none of the user's files is taken for a module
                cwd=self._directory,
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        except OSError:
            return None


def _wait(child: subprocess.Popen[bytes] | None) -> bool:
    """Whether the child ended well; one that takes too long, or that we are interrupted at, is ended."""
    if child is None:
        return False
    try:
        return child.wait(PATIENCE_SECONDS) in (0, 1)
    except subprocess.TimeoutExpired:
        return False
    finally:
        if child.returncode is None:
            child.kill()
            child.wait()


def abandoned(ledger: Ledger, aftermath: Aftermath, newcomers: Newcomers) -> None:
    """The monitor was never closed: it was dropped, or the interpreter ends."""
    newcomers.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ledger.abandon()
        aftermath.finish()
