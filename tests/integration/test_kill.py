"""Processes are killed where it hurts; what was acknowledged is there, and a reader sees the same as before."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from stabilitykit.read import Run, open_run
from stabilitykit.record.columns import STORED_TABLES
from stabilitykit.record.compact import compact
from stabilitykit.record.folder import list_segments
from stabilitykit.schema import TABLES

SERVER = Path(__file__).with_name("kill_server.py")
NUM_TENSORS, NUM_TRIALS = 10, 100

WRITER = """
import sys, time, numpy as np
from pathlib import Path
from stabilitykit.record import Recorder
from stabilitykit.schema import STEP_ROW
acknowledged = np.memmap(sys.argv[2], dtype="i8", mode="r+")
recorder, row = Recorder(Path(sys.argv[1]), segment_bytes=4000), np.zeros(1, STEP_ROW)
for step in range(10**9):
    assert recorder.write(step, steps=row)
    acknowledged[0] = step + 1
    time.sleep(0.002)
"""


def serve(*arguments: object) -> str:
    command = [sys.executable, str(SERVER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_acknowledged_step_is_lost_in_a_hundred_kills_of_the_writer(tmp_path: Path) -> None:
    acknowledged: list[int] = json.loads(serve("writers", tmp_path, 0))

    assert len(acknowledged) == NUM_TRIALS
    assert sum(acknowledged) > 100 * NUM_TRIALS
    for trial, (number, attempt) in enumerate(np.ndindex(NUM_TRIALS // 4, 4)):
        run = open_run(tmp_path / f"{number}-{attempt}")
        assert run.ending == "killed"
        check_steps(run, acknowledged[trial - attempt : trial + 1])
        assert all("torn tail" in sentence for sentence in run.damage)


def check_steps(run: Run, acknowledged: list[int]) -> None:
    """Each attempt's steps are there once and right, and so are their tensors."""
    steps = run.steps(attempts="all")
    assert set(steps["attempt"]) <= set(range(len(acknowledged)))
    for attempt, count in enumerate(acknowledged):
        mine = steps[steps["attempt"] == attempt]
        assert len(mine) - count in (0, 1)  # one may be written and not yet acknowledged
        assert mine["step"].tolist() == mine["loss"].tolist() == list(range(len(mine)))
    tensors = run.tensors(attempts="all")
    assert len(tensors) == NUM_TENSORS * len(steps)
    numbers = np.tile(np.arange(NUM_TENSORS), len(steps))
    assert tensors["name"].tolist() == [f"layer.{s // 500}.{n}" for s, n in zip(tensors["step"], numbers, strict=True)]
    assert (tensors["max"] == tensors["step"] + numbers / 64).all()


@pytest.fixture(scope="module")
def killed_compactors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compactors")
    serve("compactors", root)
    return root


def test_a_compactor_killed_between_any_two_of_its_system_calls_costs_no_row_and_doubles_none(
    killed_compactors: Path,
) -> None:
    whole, *killed = sorted(killed_compactors.iterdir(), key=lambda path: path.name != "whole")
    before = view(whole)
    assert len(killed) > 80

    for run_dir in killed:
        assert view(run_dir) == before
        compact(run_dir)
        assert list_segments(run_dir) == []
        assert view(run_dir) == before
        assert {file.suffix for table in TABLES for file in run_dir.glob(f"{table}/*/*")} == {".parquet"}


def view(run_dir: Path) -> dict[str, pa.Table]:
    """Every table, whatever lies in parts and whatever in the log."""
    run = open_run(run_dir)
    tables = {name: run.table(name).to_table() for name in STORED_TABLES}
    assert run.damage == []
    return {
        name: table.sort_by([(column, "ascending") for column in table.schema.names]) for name, table in tables.items()
    }


def test_a_reader_of_a_live_run_beside_a_compactor_always_sees_a_prefix(tmp_path: Path) -> None:
    run_dir, shared = tmp_path / "run", tmp_path / "acknowledged"
    shared.write_bytes(bytes(8))
    acknowledged = np.memmap(shared, dtype="i8", mode="r")
    with subprocess.Popen([sys.executable, "-c", WRITER, run_dir, shared]) as process:
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
