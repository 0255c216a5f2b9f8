from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabilitykit.read import Run, open_run
from stabilitykit.record import Recorder
from stabilitykit.record.compact import compact
from stabilitykit.record.rollup import WINDOW_STEPS
from stabilitykit.schema import STEP_ROW, TENSOR_ROW

KEYS = ["step", "attempt", "name", "role"]
RANGES = st.tuples(st.integers(0, 320), st.integers(1, 260)).map(lambda pair: range(pair[0], sum(pair)))


def write_attempt(run_dir: Path, attempt: int, steps: range, *, step_rows: bool = True) -> None:
    """Two tensors a step, whose values say attempt and step."""
    recorder = Recorder(run_dir, attempt=attempt, segment_bytes=20_000)
    rows = np.zeros(2, TENSOR_ROW)
    rows["tensor"] = [recorder.tensor_id(name) for name in ("stem", "head")]
    for step in steps:
        rows["max"], rows["min"], rows["nan"] = step + attempt / 8, -step, step % 3 == 0
        assert recorder.write(step, steps=np.zeros(1, STEP_ROW) if step_rows else None, tensors=rows)
    recorder.close()


def rolled_up(measured: pd.DataFrame) -> pd.DataFrame:
    """The naive twin: windows of the rows that `Run.tensors` gives."""
    window = measured["step"] // WINDOW_STEPS * WINDOW_STEPS
    grouped = measured.assign(step=window).groupby(KEYS)
    return pd.DataFrame(
        {
            "num_rows": grouped.size(),
            "nan": grouped["nan"].sum(),
            "min": grouped["min"].min(),
            "max": grouped["max"].max(),
        }
    )


def check_rollup(run: Run) -> None:
    for attempts in ("latest", "all"):
        rollup = run.rollup(attempts=attempts).set_index(KEYS).sort_index()[["num_rows", "nan", "min", "max"]]
        pd.testing.assert_frame_equal(rollup, rolled_up(run.tensors(attempts=attempts)), check_index_type=False)


@settings(max_examples=15)
@given(ranges=st.lists(RANGES, min_size=1, max_size=4), compacted=st.booleans())
def test_a_rollup_counts_what_the_tensors_table_counts_however_a_run_was_resumed(
    ranges: list[range], compacted: bool
) -> None:
    with TemporaryDirectory() as folder:
        for attempt, steps in enumerate(ranges):
            write_attempt(Path(folder), attempt, steps)
            if compacted:
                compact(Path(folder))

        check_rollup(open_run(folder))


def test_the_window_of_the_resume_has_a_row_of_each_attempt_with_its_own_steps(tmp_path: Path) -> None:
    write_attempt(tmp_path, 0, range(250))
    write_attempt(tmp_path, 1, range(130, 220))

    rollup = open_run(tmp_path).rollup("stem", "input")

    assert rollup[["step", "attempt", "num_rows", "max"]].to_numpy().tolist() == [
        [0, 0, 100, 99],
        [100, 0, 30, 129],
        [100, 1, 70, 199.125],
        [200, 0, 30, 249],
        [200, 1, 20, 219.125],
    ]


@pytest.mark.parametrize("steps", [range(150), range(120, 180)])
def test_attempts_without_step_rows_are_told_apart_by_their_tensors(tmp_path: Path, steps: range) -> None:
    write_attempt(tmp_path, 0, range(200), step_rows=False)
    write_attempt(tmp_path, 1, steps, step_rows=False)

    check_rollup(open_run(tmp_path))
