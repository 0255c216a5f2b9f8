"""Processes are killed where it hurts; what was acknowledged is there, and a reader sees the same as before."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stabilitykit.read import open_run
from stabilitykit.record import Recorder
from stabilitykit.record.compact import compact
from stabilitykit.record.folder import list_segments
from stabilitykit.schema import SCALAR_ROW, STEP_ROW, TENSOR_ROW, Event

WRITER = """
import sys, time, numpy as np
from pathlib import Path
from stabilitykit.record import Recorder
from stabilitykit.schema import STEP_ROW, TENSOR_ROW
acknowledged = np.memmap(sys.argv[2], dtype="i8", mode="r+")
attempt = int(sys.argv[3])
recorder = Recorder(Path(sys.argv[1]), attempt=attempt, segment_bytes=400_000, sync_seconds=0.05)
ids = [recorder.tensor_id(f"layer.{number}") for number in range(50)]
rows, row = np.zeros(50, TENSOR_ROW), np.zeros(1, STEP_ROW)
rows["tensor"] = ids
for step in range(10**9):
    rows["max"], row["loss"] = step + np.arange(50) / 64, step
    assert recorder.write(step, steps=row, tensors=rows)
    acknowledged[0] = step + 1
    time.sleep(float(sys.argv[4]))
"""


class Killed(BaseException):
    """Stands for a kill: nothing that catches Exception may clean up after it."""


def view(run_dir: Path) -> list[pd.DataFrame]:
    run = open_run(run_dir)
    assert run.damage == []
    return [run.steps(), run.tensors(), run.events(), run.buffer(), run.rollup()]


def assert_same(before: list[pd.DataFrame], after: list[pd.DataFrame]) -> None:
    for mine, yours in zip(before, after, strict=True):
        pd.testing.assert_frame_equal(mine, yours)


def test_no_acknowledged_step_is_lost_to_kills_of_the_writer(tmp_path: Path) -> None:
    run_dir, shared = tmp_path / "run", tmp_path / "acknowledged"
    noise, trials = random.Random(0), 10
    acknowledged = []
    for attempt in range(trials):
        acknowledged.append(kill_a_writer(run_dir, shared, attempt, noise.uniform(0, 0.15)))
        if attempt % 3 == 2:
            compact(run_dir, include_open=True)

    run = open_run(run_dir)
    steps, tensors = run.steps(attempts="all"), run.tensors(attempts="all")

    assert run.ending == "killed"
    assert all("torn tail" in sentence for sentence in run.damage)
    for attempt, count in enumerate(acknowledged):
        mine = steps[steps["attempt"] == attempt]
        assert len(mine) - count in (0, 1)  # one may be written and not yet acknowledged
        assert mine["step"].tolist() == mine["loss"].tolist() == list(range(len(mine)))
    number = tensors["name"].str.removeprefix("layer.").astype(int)
    assert len(tensors) == 50 * len(steps)
    assert (tensors["max"] == tensors["step"] + number / 64).all()


def kill_a_writer(run_dir: Path, shared: Path, attempt: int, seconds: float) -> int:
    """Steps that a new writer had acknowledged when it was killed, so long after its first one."""
    shared.write_bytes(bytes(8))
    acknowledged = np.memmap(shared, dtype="i8", mode="r")
    with subprocess.Popen([sys.executable, "-c", WRITER, run_dir, shared, str(attempt), "0"]) as process:
        while not acknowledged[0]:
            time.sleep(0.005)
            assert process.poll() is None
        time.sleep(seconds)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    return int(acknowledged[0])


@pytest.fixture
def two_segments(tmp_path: Path) -> Path:
    run_dir = tmp_path / "run"
    recorder = Recorder(run_dir, segment_bytes=6000)
    ids = [recorder.tensor_id(name) for name in ("stem", "head")]
    loss = recorder.scalar_id("loss/ce")
    for step in range(8):
        rows = np.zeros(2, TENSOR_ROW)
        rows["tensor"], rows["max"] = ids, step
        scalars = np.array([(0, loss, step / 2)], SCALAR_ROW)
        events = [Event(kind="task", message=f"task {step}", wall_time=1.0)]
        recorder.write(step, steps=np.zeros(1, STEP_ROW), tensors=rows, scalars=scalars, events=events)
    recorder.close()
    assert len(list_segments(run_dir)) == 2
    return run_dir


def kill_at(call: int, *, midway: bool) -> Callable[[pytest.MonkeyPatch], list[str]]:
    """Patch `os` so that the given call of all that change a folder is the last; `midway` lets half of it happen."""

    def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
        made: list[str] = []
        for name in ("open", "mkdir", "write", "fsync", "replace", "unlink"):
            monkeypatch.setattr(os, name, dying(name, getattr(os, name), made))
        return made

    def dying(name: str, real: Callable[..., Any], made: list[str]) -> Callable[..., Any]:
        def call_or_die(*arguments: Any, **keywords: Any) -> Any:
            made.append(name)
            if len(made) <= call:
                return real(*arguments, **keywords)
            if midway and len(made) == call + 1:
                half = (arguments[0], arguments[1][: len(arguments[1]) // 2]) if name == "write" else arguments
                real(*half, **keywords)
            raise Killed

        return call_or_die

    return install


@pytest.mark.parametrize("midway", [False, True])
def test_a_compactor_killed_at_any_system_call_leaves_the_same_view_and_can_be_run_again(
    two_segments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, midway: bool
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # still a call to die at, but nobody cuts the power
    before = view(two_segments)
    calls = count_calls(two_segments, tmp_path / "counted")
    assert calls > 40

    for call in range(midway, calls, 1 + midway):
        run_dir = tmp_path / f"killed-{call}"
        shutil.copytree(two_segments, run_dir)
        with pytest.MonkeyPatch.context() as dying:
            kill_at(call, midway=midway)(dying)
            with pytest.raises(Killed):
                compact(run_dir)

        assert_same(before[:2], view(run_dir)[:2])
        compact(run_dir)
        assert list_segments(run_dir) == []
    assert_same(before, view(run_dir))


def count_calls(run_dir: Path, copy: Path) -> int:
    shutil.copytree(run_dir, copy)
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = kill_at(10**6, midway=False)(monkeypatch)
        compact(copy)
    return len(made)


def test_a_compactor_really_killed_leaves_the_same_view(two_segments: Path, tmp_path: Path) -> None:
    before, noise = view(two_segments), random.Random(1)

    for trial in range(3):
        run_dir = tmp_path / f"killed-{trial}"
        shutil.copytree(two_segments, run_dir)
        with subprocess.Popen([sys.executable, "-m", "stabilitykit.record.compact", run_dir]) as process:
            time.sleep(noise.uniform(0.1, 0.3))
            process.kill()

        assert_same(before, view(run_dir))
        compact(run_dir)
        assert_same(before, view(run_dir))


def test_a_reader_of_a_live_run_beside_a_compactor_always_sees_a_prefix(tmp_path: Path) -> None:
    run_dir, shared = tmp_path / "run", tmp_path / "acknowledged"
    shared.write_bytes(bytes(8))
    acknowledged = np.memmap(shared, dtype="i8", mode="r")
    with subprocess.Popen([sys.executable, "-c", WRITER, run_dir, shared, "0", "0.002"]) as process:
        try:
            while not acknowledged[0]:
                time.sleep(0.005)
                assert process.poll() is None
            for trial in range(6):
                known = int(acknowledged[0])
                run = open_run(run_dir)
                if trial % 2:
                    compact(run_dir)
                steps = run.steps()["step"].tolist()

                assert steps == list(range(len(steps)))
                assert len(steps) >= known
                assert run.damage == []
        finally:
            process.kill()
