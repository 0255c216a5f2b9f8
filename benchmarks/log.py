"""What the log costs: microseconds per `Recorder.write`, bytes per row at rest, seconds to compact and to read.

    python benchmarks/log.py [--steps 4000] [--tensors 400] [--folder /tmp]

Statistics are synthetic random walks in float32 precision, so bytes per row depend on the run; the times do not.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from stabilitykit.read import open_run
from stabilitykit.record import Recorder
from stabilitykit.record.compact import compact
from stabilitykit.schema import ROLES, SCALAR_ROW, STEP_ROW, TENSOR_ROW


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--tensors", type=int, default=400, help="tensor rows a step")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a disk, not a tmpfs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure(Path(folder) / "run", options.steps, options.tensors)


def measure(run_dir: Path, num_steps: int, num_tensors: int) -> None:
    durations = write_run(run_dir, num_steps, num_tensors) * 1e6
    num_rows = num_steps * num_tensors
    print(f"write, {num_tensors} tensor rows + 1 step row + 4 scalars a step, {num_steps:,} steps, sync every 5 s:")
    print(f"  mean {durations.mean():.1f} us, median {np.median(durations):.1f}, ", end="")
    print(f"p99 {np.percentile(durations, 99):.1f}, max {durations.max():,.0f}")
    print(f"  log {folder_bytes(run_dir / 'wal') / num_rows:.1f} bytes per tensor row")

    started = time.perf_counter()
    compact(run_dir)
    seconds = time.perf_counter() - started
    print(f"compact: {seconds:.2f} s for {num_rows:,} rows, {num_rows / seconds:,.0f} rows/s")
    print(f"at rest: tensors {folder_bytes(run_dir / 'tensors') / num_rows:.1f} bytes a row, ", end="")
    print(f"steps {folder_bytes(run_dir / 'steps') / num_steps:.1f}")

    started = time.perf_counter()
    steps = open_run(run_dir).steps()
    between = time.perf_counter()
    series = open_run(run_dir).tensors("block.7.weight", "gradient")
    finished = time.perf_counter()
    print(f"read: steps() {between - started:.3f} s for {len(steps):,}, ", end="")
    print(f"one tensor {finished - between:.3f} s for {len(series):,} rows out of {num_rows:,}")


def write_run(run_dir: Path, num_steps: int, num_tensors: int) -> np.ndarray:
    """Seconds of every write."""
    recorder = Recorder(run_dir)
    ids = [recorder.tensor_id(f"block.{number}.weight", kind="parameter") for number in range(num_tensors)]
    scalars = np.zeros(4, SCALAR_ROW)
    scalars["scalar"] = [recorder.scalar_id(f"loss/{name}") for name in ("stream", "replay", "distill", "ewc")]
    walk = Walk(ids)
    row = np.zeros(1, STEP_ROW)
    durations = np.zeros(num_steps)
    for step in range(num_steps):
        walk.advance()
        row["loss"] = scalars["value"] = 1 / (1 + step)
        started = time.perf_counter()
        acknowledged = recorder.write(step, steps=row, tensors=walk.rows, scalars=scalars)
        durations[step] = time.perf_counter() - started
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
