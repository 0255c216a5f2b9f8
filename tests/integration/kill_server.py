"""Forks writers and compactors and kills them: `python kill_server.py writers ROOT SEED` or `compactors ROOT`.

A process without torch that never uses a thread: a fork of it costs a millisecond, a new interpreter 300.
"""

import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from stabilitykit.record import Recorder
from stabilitykit.record.compact import compact
from stabilitykit.record.ending import this_process
from stabilitykit.record.folder import replace_file
from stabilitykit.schema import SCALAR_ROW, STEP_ROW, TENSOR_ROW, Event

NUM_RUNS, NUM_ATTEMPTS = 25, 4
NUM_TENSORS = 10
LONGEST_SECONDS = 0.04
CALLS = ("open", "mkdir", "write", "fsync", "replace", "unlink")  # all that a compactor changes a folder with


def fork(work: Callable[..., object], *arguments: object, **options: object) -> int:
    """A child that does this and nothing after it."""
    child = os.fork()
    if child == 0:
        try:
            work(*arguments, **options)
        finally:
            os._exit(0)
    return child


def wait(child: int) -> bool:
    """Whether it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill_writers(root: Path, seed: int) -> None:
    """Four attempts on each run, every one killed; what each kill left is kept in ROOT/<run>-<attempt>."""
    noise = random.Random(seed)
    acknowledged = []
    for number in range(NUM_RUNS):
        run_dir = root / "run"
        for attempt in range(NUM_ATTEMPTS):
            acknowledged.append(kill_a_writer(run_dir, attempt, noise.uniform(0, LONGEST_SECONDS)))
            shutil.copytree(run_dir, root / f"{number}-{attempt}")
            compactor = fork(compact, run_dir, include_open=True)
            time.sleep(noise.uniform(0, LONGEST_SECONDS))
            os.kill(compactor, signal.SIGKILL)
            wait(compactor)
        shutil.rmtree(run_dir)
    print(json.dumps(acknowledged))


def kill_a_writer(run_dir: Path, attempt: int, seconds: float) -> int:
    """Steps that a new writer had acknowledged when it was killed, so long after its run was there."""
    shared = mmap.mmap(-1, 16)  # whether the run is there, steps acknowledged
    writer = fork(write, run_dir, attempt, shared)
    while not shared[0]:
        time.sleep(0.0005)
    time.sleep(seconds)
    os.kill(writer, signal.SIGKILL)
    assert wait(writer)
    return int.from_bytes(shared[8:16], "little")


def write(run_dir: Path, attempt: int, shared: mmap.mmap) -> None:
    run_dir.mkdir(exist_ok=True)
    facts = {"schema_version": 1, "attempts": [{"attempt": attempt} | this_process()]}
    replace_file(run_dir, run_dir / "run.json", json.dumps(facts).encode())
    shared[0] = 1
    recorder = Recorder(run_dir, attempt=attempt, segment_bytes=100_000, sync_seconds=0.01)
    rows, row = np.zeros(NUM_TENSORS, TENSOR_ROW), np.zeros(1, STEP_ROW)
    for step in count():
        if step % 50 == 0:  # names turn up late too
            rows["tensor"] = [recorder.tensor_id(f"layer.{step // 500}.{n}") for n in range(NUM_TENSORS)]
        rows["max"], row["loss"] = step + np.arange(NUM_TENSORS) / 64, step
        assert recorder.write(step, steps=row, tensors=rows)
        shared[8:16] = (step + 1).to_bytes(8, "little")


def kill_compactors(root: Path) -> None:
    """A compactor killed before each of its calls, and one in the midst of each; ROOT/<call>[-midway] is left of it."""
    write_two_segments(root / "whole")
    for midway in (False, True):
        for call in count():
            run_dir = root / f"{call}{'-midway' * midway}"
            shutil.copytree(root / "whole", run_dir)
            if not wait(fork(compact_until, run_dir, call, midway)):
                shutil.rmtree(run_dir)  # it came to its end
                break


def write_two_segments(run_dir: Path) -> None:
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


def compact_until(run_dir: Path, last: int, midway: bool) -> None:
    """Compact; the call of this number is the last, and `midway` lets it, or half of a write, still happen."""
    made = count()

    def dying(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call_or_die(*arguments: Any, **keywords: Any) -> Any:
            if next(made) != last:
                return real(*arguments, **keywords)
            if midway:
                half = (arguments[0], arguments[1][: len(arguments[1]) // 2]) if name == "write" else arguments
                real(*half, **keywords)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("unreachable")

        return call_or_die

    for name in CALLS:
        setattr(os, name, dying(name, getattr(os, name)))
    compact(run_dir)


if __name__ == "__main__":
    if sys.argv[1] == "writers":
        kill_writers(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        kill_compactors(Path(sys.argv[2]))
