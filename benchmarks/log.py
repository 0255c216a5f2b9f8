"""What the log costs, each figure beside its limit: writing a step, bytes at rest, compacting, reading.

    python -m benchmarks.log [--steps 25000] [--tensors 400] [--folder /tmp]

Statistics are synthetic random walks in float32 precision, so bytes per row depend on the run; the times do not.
Writing is CPU time, what a person waits for is time on the clock: run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from stabilitykit.read import open_run
from stabilitykit.record import Recorder
from stabilitykit.record.ending import write_ending
from stabilitykit.schema import ROLES, SCALAR_ROW, SCHEMA_VERSION, STEP_ROW, TENSOR_ROW

LONG_RUN_STEPS, LONG_RUN_TENSORS, LONG_RUN_CADENCE = 100_000, 100, 10
REPETITIONS = 9
OURS = str(Path(__file__).parents[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=25_000)
    parser.add_argument("--tensors", type=int, default=400, help="tensor rows a step")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a disk, not a tmpfs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure_small_steps(Path(folder) / "small")
        measure_large_steps(Path(folder) / "large", options.steps, options.tensors)
        measure_postmortem(Path(folder) / "long")


def say(what: str, value: float, limit: float, unit: str, note: str = "") -> None:
    verdict = "holds" if value <= limit else "MISSED"
    print(f"{what:<58} {value:8.1f} {unit:<9} limit {limit:g}: {verdict}{note}", flush=True)


def measure_small_steps(run_dir: Path) -> None:
    recorder, row = Recorder(run_dir), np.zeros(1, STEP_ROW)
    recorder.write(0, steps=row)
    rounds = []
    for _ in range(REPETITIONS):
        started = time.process_time()
        for step in range(5000):
            recorder.write(step, steps=row)
        rounds.append((time.process_time() - started) / 5000)
    recorder.close()
    say("write a step of one row, CPU, median of rounds", float(np.median(rounds)) * 1e6, 15, "us")


def measure_large_steps(run_dir: Path, num_steps: int, num_tensors: int) -> None:
    durations = write_run(run_dir, num_steps, num_tensors) * 1e6
    num_rows = num_steps * num_tensors
    tail = f"  (median {np.median(durations):.1f}, p99 {np.percentile(durations, 99):.0f}, max {durations.max():,.0f})"
    say(f"write a step of {num_tensors} rows, CPU, mean of {num_steps:,}", durations.mean(), 60, "us", tail)

    seconds = compact_beside(run_dir)
    print(f"compact {num_rows:,} rows: {seconds:.1f} s, {num_rows / seconds:,.0f} rows/s, in a process of its own")
    say("tensors at rest", folder_bytes(run_dir / "tensors") / num_rows, 22, "bytes/row")
    say("steps at rest", folder_bytes(run_dir / "steps") / num_steps, 22, "bytes/row")

    series = median_seconds(lambda number: open_run(run_dir).tensors(f"block.{number}.weight", "gradient"))
    say(f"open the run, one tensor's series out of {num_rows:,} rows", series * 1e3, 50, "ms")
    run = open_run(run_dir)
    series = median_seconds(lambda number: run.tensors(f"block.{number}.weight", "gradient"))
    say("one more series of the same run", series * 1e3, 50, "ms")
    print(f"steps() of {num_steps:,}: {median_seconds(lambda _: open_run(run_dir).steps()) * 1e3:.0f} ms")


def measure_postmortem(run_dir: Path) -> None:
    write_run(run_dir, LONG_RUN_STEPS, LONG_RUN_TENSORS, LONG_RUN_CADENCE)
    what = f"postmortem of {LONG_RUN_STEPS:,} steps"
    say(f"{what}, killed, all of it still log", postmortem_seconds(run_dir), 3, "s")
    compact_beside(run_dir)
    write_ending(run_dir, "completed", LONG_RUN_STEPS - 1)
    say(f"{what}, completed", postmortem_seconds(run_dir), 3, "s")


def median_seconds(work: Callable[[int], object]) -> float:
    work(0)
    durations = []
    for number in range(1, REPETITIONS + 1):
        started = time.perf_counter()
        work(number)
        durations.append(time.perf_counter() - started)
    return float(np.median(durations))


def compact_beside(run_dir: Path) -> float:
    return run_module("stabilitykit.record.compact", str(run_dir), "--all")


def postmortem_seconds(run_dir: Path) -> float:
    return float(np.median([run_module("stabilitykit", "postmortem", str(run_dir)) for _ in range(3)]))


def run_module(*arguments: str) -> float:
    """Seconds on the clock, the start of the interpreter included."""
    started = time.perf_counter()
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": OURS}, stdout=subprocess.DEVNULL)
    assert done.returncode in (0, 1), command  # 1: there are findings
    return time.perf_counter() - started


def write_run(run_dir: Path, num_steps: int, num_tensors: int, cadence: int = 1) -> np.ndarray:
    """CPU seconds of every write; tensors come every `cadence` steps."""
    run_dir.mkdir()
    (run_dir / "run.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION, "attempts": [{"attempt": 0}]}))
    recorder = Recorder(run_dir)
    ids = [recorder.tensor_id(f"block.{number}.weight", kind="parameter") for number in range(num_tensors)]
    scalars = np.zeros(4, SCALAR_ROW)
    scalars["scalar"] = [recorder.scalar_id(f"loss/{name}") for name in ("stream", "replay", "distill", "ewc")]
    walk = Walk(ids)
    row = np.zeros(1, STEP_ROW)
    durations = np.zeros(num_steps)
    for step in range(num_steps):
        tensors = None
        if step % cadence == 0:
            walk.advance()
            tensors = walk.rows
        row["loss"] = scalars["value"] = 1 / (1 + step)
        started = time.process_time()
        acknowledged = recorder.write(step, steps=row, tensors=tensors, scalars=scalars)
        durations[step] = time.process_time() - started
        assert acknowledged
    recorder.close()
    return durations


class Walk:
    """Statistics of one step after another: scales differ a thousandfold between tensors and drift by 2 % a step."""

    def __init__(self, ids: list[int]) -> None:
        self._noise = np.random.default_rng(0)
        self._log_scale = self._noise.normal(0, 3, len(ids))
        self.rows = np.zeros(len(ids), TENSOR_ROW)
        self.rows["tensor"], self.rows["order"] = ids, np.arange(len(ids))
        self.rows["role"], self.rows["phase"] = ROLES.index("gradient"), 4
        self.rows["numel"] = 2 ** self._noise.integers(6, 20, len(ids))

    def advance(self) -> None:
        rows, noise = self.rows, self._noise
        self._log_scale += noise.normal(0, 0.02, len(rows))
        for name, factor in (("min", -4.0), ("max", 4.0), ("mean", 0.01), ("l2", 100.0)):
            rows[name] = np.float32(np.exp(self._log_scale) * factor * (1 + 0.1 * noise.random(len(rows))))
        rows["headroom"] = 128 - np.log2(rows["max"])
        rows["zeros"][::5] = noise.binomial(rows["numel"][::5], 0.4)  # a ReLU's outputs, say


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
