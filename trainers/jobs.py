"""The runs of a sweep: what each is called, whether it is done, and the processes that train it, here or on Ray."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stabilitykit.errors import RunFolderError, UsageError
from trainers.checkpoint import NAME
from trainers.run_state import sole_owner

ROOT = Path(__file__).parents[1]
TICK_SECONDS = 0.2
MESSAGE_BYTES = 10_000  # the end of what a run complained of


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: a method (its name and flags as one text) with a seed.

    Attributes:
        flags: what every run of the sweep is given.
    """

    method: str
    seed: int
    flags: tuple[str, ...]
    folder: Path

    def results(self) -> dict[str, Any]:
        """What the run has shown so far; empty before its first task is over."""
        try:
            body: dict[str, Any] = json.loads((self.folder / "results.json").read_text())
        except (OSError, ValueError):
            return {}
        return body

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return bool(self.results().get("finished"))

    def arguments(self) -> list[str]:
        """Of `python -m trainers`: from the last checkpoint where there is one."""
        if (self.folder / NAME).is_file():
            return ["--resume", str(self.folder)]
        return self.fresh_arguments()

    def fresh_arguments(self) -> list[str]:
        """Of a run from its first step."""
        name, *own = shlex.split(self.method)
        seed = ["--seed", str(self.seed), "--run_dir", str(self.folder), "--non_verbose", "1"]
        return ["--model", name, *self.flags, *own, *seed]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run's process ended: 0 and nothing to say, or what it said last."""

    job: Job
    exit_code: int
    message: str = ""


def plan(methods: Sequence[str], seeds: Sequence[int], flags: Sequence[str], out: Path) -> list[Job]:
    """Every method with every seed, seed by seed, so that pairs are complete early."""
    return [
        Job(method=method, seed=seed, flags=tuple(flags), folder=out / folder_name(method) / f"seed={seed}")
        for seed in seeds
        for method in methods
    ]


def folder_name(method: str) -> str:
    """A method's text as the name of a folder."""
    return re.sub(r"[^\w.=-]+", "_", method)


def train(arguments: list[str]) -> tuple[int, str]:
    """Run one job to its end, in a process of its own; exit code and the last line of its errors."""
    running = Running(arguments)
    running.process.wait()
    return running.outcome()


class Running:
    """A job's process: one thread, since the sweep has a process a core.

    Attributes:
        process: it complains into a file, which, unlike a pipe that nobody reads meanwhile, never fills up.
    """

    def __init__(self, arguments: list[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the outcome
        self.process = start(arguments, self._errors)

    def outcome(self) -> tuple[int, str]:
        """Exit code and the last line of its errors, once it has ended."""
        with self._errors as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MESSAGE_BYTES))
            return self.process.wait(), last_line(file.read().decode(errors="replace"))


def start(arguments: list[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start `python -m trainers` with these arguments."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "trainers", *arguments]
    return subprocess.Popen(  # noqa: S603 - our own interpreter, no shell
        command, env=environment, stdout=subprocess.DEVNULL, stderr=errors
    )


def last_line(errors: str) -> str:
    """What a process complained of, in a line."""
    lines = errors.strip().splitlines()
    return lines[-1] if lines else ""


def prepare(job: Job) -> list[str]:
    """Make way for the job, and how to start it: what an attempt left before its first checkpoint cannot be used.

    Unless the attempt is still under way, in a process that has outlived its sweep: the run will say so.
    """
    if job.folder.exists() and not (job.folder / NAME).is_file():
        with suppress(RunFolderError), sole_owner(job.folder):
            shutil.rmtree(job.folder)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    return job.arguments()


def run_here(jobs: Sequence[Job], num_processes: int) -> Generator[Outcome | None, None, None]:
    """Run jobs in so many processes; an outcome as each ends, None in between for whoever draws a table."""
    waiting = deque(jobs)
    running: dict[Job, Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                job = waiting.popleft()
                running[job] = Running(prepare(job))
            for job, entry in list(running.items()):
                if entry.process.poll() is not None:
                    code, message = running.pop(job).outcome()
                    yield Outcome(job=job, exit_code=code, message=message)
            yield None
            time.sleep(TICK_SECONDS if running else 0)
    finally:
        for entry in running.values():
            entry.process.terminate()
        for entry in running.values():
            entry.outcome()


def run_on_ray(jobs: Sequence[Job], address: str) -> Generator[Outcome | None, None, None]:
    """Run jobs as tasks of one CPU each on a Ray cluster that sees this checkout and the sweep's folder.

    Args:
        jobs: what to run.
        address: of the cluster, or `local` for one on this machine.

    Raises:
        UsageError: Ray is not installed, or there is no cluster.
    """
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise UsageError("--ray: got no ray, expected it to be installed; pip install '.[ray]'") from error
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"--ray: got {address!r}: {error}, expected a cluster's address or local") from error
    try:
        remote = ray.remote(num_cpus=1, max_retries=0)(train)
        pending = {remote.remote(prepare(job)): job for job in jobs}
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1, timeout=TICK_SECONDS)
            for reference in done:
                job = pending.pop(reference)
                code, message = ray.get(reference)
                yield Outcome(job=job, exit_code=code, message=message)
            yield None
    finally:
        ray.shutdown()
