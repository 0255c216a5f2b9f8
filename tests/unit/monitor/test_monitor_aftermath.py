"""Compaction beside a run: never two at a time, never waited for, nothing left behind, and a failure is no error."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import stabilitykit as sk
from stabilitykit.monitor import aftermath
from stabilitykit.monitor.aftermath import Aftermath
from stabilitykit.record import Recorder
from stabilitykit.record.folder import list_parts, list_segments

COMPACTING = sk.MonitorConfig(report=False, cadence=1)


@pytest.fixture(autouse=True)
def no_child_or_descriptor_left() -> Iterator[None]:
    before = set(Path("/proc/self/fd").iterdir())

    yield

    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # a zombie would be found here
    assert set(Path("/proc/self/fd").iterdir()) <= before


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Children that only sleep stand for compactors; the list grows as they are started."""
    children: list[subprocess.Popen[bytes]] = []

    def start(_self: Aftermath, *_arguments: str) -> subprocess.Popen[bytes]:
        children.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return children[-1]

    monkeypatch.setattr(Aftermath, "_start", start)
    monkeypatch.setattr(aftermath, "PATIENCE_SECONDS", 0.01)
    return children


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def training(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[sk.Monitor, Callable[[], object]]:
    """A watched run that seals a segment every few steps, and its step."""
    monkeypatch.setattr("stabilitykit.monitor.ledger.Recorder", functools.partial(Recorder, segment_bytes=8000))
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = sk.attach(model, optimizer, run_dir, config=COMPACTING)

    @monitor.replayable
    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return monitor, step


def test_sealed_segments_become_parts_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monitor, step = training(tmp_path / "run", monkeypatch)
    deadline = time.monotonic() + 60

    while len(list_parts(tmp_path / "run", "steps")) < 3:
        step()
        time.sleep(0.005)
        assert time.monotonic() < deadline

    assert len(list_segments(tmp_path / "run")) >= 1
    monitor.close()
    steps = sk.open_run(tmp_path / "run").steps()
    assert steps["step"].tolist() == list(range(monitor.step_index))
    assert list_segments(tmp_path / "run") == []


def test_a_compactor_that_is_killed_is_no_error_and_the_parts_are_there_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor, step = training(tmp_path / "run", monkeypatch)
    after = monitor._aftermath
    while after._compactor is None:
        step()
    os.kill(after._compactor.pid, signal.SIGKILL)
    dead = after._compactor

    wait_until(lambda: bool(step()) and dead.returncode is not None)  # reaped by a step
    monitor.close()

    assert dead.returncode == -signal.SIGKILL
    assert list_segments(tmp_path / "run") == []
    assert sk.open_run(tmp_path / "run").steps()["step"].tolist() == list(range(monitor.step_index))


def test_there_is_one_compactor_at_a_time_of_the_least_priority_and_nobody_waits_for_it(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    after = Aftermath(tmp_path, COMPACTING)
    began = time.monotonic()

    for num_sealed in (0, 1, 1, 2, 3):
        after.tend(num_sealed)

    assert len(started) == 1
    assert os.getpriority(os.PRIO_PROCESS, started[0].pid) == 19
    started[0].kill()
    wait_until(lambda: after.tend(3) or len(started) == 2)  # segments 2 and 3 were sealed meanwhile
    assert time.monotonic() - began < 30
    after.finish()
    assert [child.returncode for child in started] == [-signal.SIGKILL] * 3  # hung: ended, and so was the last one


def test_a_compactor_that_cannot_be_started_is_tried_again_with_the_next_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def no_room(*arguments: object, **_options: object) -> None:
        tried.append(arguments)
        raise BlockingIOError("Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", no_room)
    after = Aftermath(tmp_path, COMPACTING)

    for num_sealed in (1, 1, 2):
        after.tend(num_sealed)
    after.finish()

    assert len(tried) == 3


def test_nothing_is_started_when_nothing_is_sealed_or_wanted(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    Aftermath(tmp_path, COMPACTING).tend(0)
    Aftermath(tmp_path, COMPACTING.replace(compact=False)).tend(1)

    assert started == []


def test_a_forked_child_starts_nothing(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    after = Aftermath(tmp_path, COMPACTING)
    after._pid = -1  # as a child sees it

    after.tend(1)
    after.finish()

    assert after.render() == ""
    assert started == []


def test_a_script_that_changes_its_directory_finds_its_run_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monitor, step = training(Path("run"), monkeypatch)
    step()

    monkeypatch.chdir("/")
    step()
    monitor.close()

    run = sk.open_run(tmp_path / "run")
    assert (run.ending, len(run.steps())) == ("completed", 2)
    assert list_segments(tmp_path / "run") == []
