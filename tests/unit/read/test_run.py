import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from stabilitykit.errors import UsageError
from stabilitykit.read import Run, open_run
from stabilitykit.record import Recorder
from stabilitykit.record.compact import compact
from stabilitykit.schema import (
    BUFFER_ROW,
    PHASES,
    ROLES,
    SCALAR_ROW,
    STEP_ROW,
    TABLES,
    TENSOR_ROW,
)

Write = Callable[..., None]


@pytest.fixture(params=["log", "parts", "both"])
def run(request: pytest.FixtureRequest, run_dir: Path, write_meta: Write, write_steps: Write) -> Run:
    """The same six steps, stored in each way a run folder can hold them."""
    write_meta()
    recorder = Recorder(run_dir, segment_bytes=2000)
    write_steps(recorder, range(3))
    if request.param == "both":
        recorder.close()
        compact(run_dir)
        recorder = Recorder(run_dir, segment_bytes=2000)
    write_steps(recorder, range(3, 6))
    recorder.close()
    if request.param == "parts":
        compact(run_dir)
    return open_run(run_dir)


def test_steps_have_a_column_for_every_scalar(run: Run) -> None:
    steps = run.steps()

    assert steps["step"].tolist() == list(range(6))
    assert steps["loss"].tolist() == [0, 1, 2, 3, 4, 5]
    assert steps["loss/ce"].tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert steps["lr/1"].tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25]
    assert {"rank", "attempt", *(STEP_ROW.names or ())} < set(steps.columns)


def test_tensors_come_with_names_roles_and_phases_in_the_order_they_were_measured(run: Run) -> None:
    tensors = run.tensors()

    assert tensors["name"].tolist() == ["stem", "head"] * 12
    assert tensors["role"].tolist() == [ROLES[1], ROLES[1], ROLES[3], ROLES[3]] * 6
    assert tensors["phase"].tolist() == [PHASES[3], PHASES[3], PHASES[4], PHASES[4]] * 6
    assert tensors["max"].tolist() == [step + number / 8 for step in range(6) for number in range(4)]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"name": "head", "role": "output"}, [step + 1 / 8 for step in range(6)]),
        ({"name": ["head", "stem"], "role": "gradient", "steps": (4, 5)}, [4.25, 4.375, 5.25, 5.375]),
        ({"name": "stem", "role": "output", "steps": range(1, 3)}, [1, 2]),
        ({"name": "stem", "role": "output", "steps": range(0, 6, 3)}, [0, 3]),
        ({"name": "no such layer"}, []),
        ({"name": []}, []),
        ({"steps": (100, 200)}, []),
    ],
)
def test_tensors_are_chosen_by_name_role_and_steps(run: Run, filters: dict[str, Any], expected: list[float]) -> None:
    assert run.tensors(**filters)["max"].tolist() == expected


def test_a_rollup_has_a_row_per_tensor_and_role_however_the_window_is_stored(run: Run) -> None:
    rollup = run.rollup("head")

    assert rollup[["name", "role", "step", "num_rows"]].to_numpy().tolist() == [
        ["head", "output", 0, 6],
        ["head", "gradient", 0, 6],
    ]
    assert rollup["max"].tolist() == [5 + 1 / 8, 5 + 3 / 8]
    assert len(run.rollup(role="output")) == 2


def test_an_unknown_role_or_table_is_refused(run: Run) -> None:
    with pytest.raises(UsageError, match="expected one of input, output"):
        run.tensors(role="grad")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="expected one of steps"):
        run.table("tensor")


def test_events_carry_their_facts_as_json(run: Run) -> None:
    [event] = run.events().to_dict("records")

    assert (event["step"], event["kind"], event["message"], json.loads(event["data"])) == (
        2,
        "task",
        "task 1",
        {"task": 1},
    )


def test_a_table_is_a_dataset_with_the_stored_columns(run: Run) -> None:
    dataset = run.table("tensors")

    assert dataset.count_rows() == 24
    assert dataset.schema.names == ["attempt", "step", *(TENSOR_ROW.names or ()), "rank"]
    assert set(dataset.to_table(columns=["rank"])["rank"].to_pylist()) == {0}


def test_the_last_step_and_the_names_are_known_and_nothing_is_damaged(run: Run) -> None:
    assert run.last_step == 5
    assert run.names()["name"].tolist() == ["stem", "head"]
    assert run.damage == []


def test_a_run_without_any_rows_has_empty_tables_with_all_columns(run_dir: Path, write_meta: Write) -> None:
    write_meta()

    run = open_run(run_dir)

    assert run.last_step == -1
    assert (len(run.steps()), len(run.tensors()), len(run.events()), len(run.buffer())) == (0, 0, 0, 0)
    assert {"name", "role", "max"} < set(run.tensors().columns)
    assert {"loss", "grad_norm"} < set(run.steps().columns)
    assert [run.table(name).count_rows() for name in (*TABLES, "rollup")] == [0] * 6
    assert len(run.rollup()) == 0


def test_a_scalar_named_like_a_column_does_not_hide_it(run_dir: Path) -> None:
    recorder = Recorder(run_dir)
    value = np.array([(0, recorder.scalar_id("loss"), 7.0)], SCALAR_ROW)
    recorder.write(0, steps=np.zeros(1, STEP_ROW), scalars=value)

    steps = open_run(run_dir).steps()

    assert steps[["loss", "scalar/loss"]].to_numpy().tolist() == [[0.0, 7.0]]


def test_a_single_row_is_read_without_a_word_on_stderr(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder(run_dir)
    recorder.write(0, steps=np.zeros(1, STEP_ROW), tensors=np.zeros(1, TENSOR_ROW))

    run = open_run(run_dir)

    assert (len(run.steps()), len(run.tensors(role="input"))) == (1, 1)
    assert capfd.readouterr().err == ""  # Arrow complains there about unaligned columns


def test_a_scalar_is_nan_in_the_steps_that_did_not_log_it(run_dir: Path) -> None:
    recorder = Recorder(run_dir)
    recorder.write(0, steps=np.zeros(1, STEP_ROW))
    recorder.write(1, steps=np.zeros(1, STEP_ROW), scalars=np.array([(0, recorder.scalar_id("a"), 1.0)], SCALAR_ROW))

    assert np.isnan(open_run(run_dir).steps()["a"][0])
    assert open_run(run_dir).steps()["a"][1] == 1.0


@pytest.mark.parametrize("compacted", [False, True])
def test_a_later_attempt_supersedes_the_steps_it_did_again(run_dir: Path, compacted: bool, write_steps: Write) -> None:
    first = Recorder(run_dir)
    write_steps(first, range(6))
    first.close()
    second = Recorder(run_dir, attempt=1)
    write_steps(second, range(3, 5), sign=-1.0)
    second.close()
    if compacted:
        compact(run_dir)
    run = open_run(run_dir)

    steps, stem = run.steps(), run.tensors("stem", "output")

    assert steps["loss"].tolist() == [0, 1, 2, -3, -4, 5]
    assert steps["attempt"].tolist() == [0, 0, 0, 1, 1, 0]
    assert steps["loss/ce"].tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
    assert stem["max"].tolist() == [0, 1, 2, -3, -4, 5]
    assert run.steps(attempts="all")["loss"].tolist() == [0, 1, 2, 3, -3, 4, -4, 5]


def test_an_attempt_supersedes_tensors_also_in_steps_where_its_cadence_recorded_none(
    run_dir: Path, write_steps: Write
) -> None:
    first = Recorder(run_dir)
    write_steps(first, range(4))
    second = Recorder(run_dir, attempt=1)
    for step in (2, 3):
        second.write(step, steps=np.zeros(1, STEP_ROW))

    assert open_run(run_dir).tensors("stem", "output")["step"].tolist() == [0, 1]


def test_ranks_keep_their_own_names_and_rows(run_dir: Path) -> None:
    for rank, name in enumerate(["left", "right"]):
        recorder = Recorder(run_dir, rank=rank)
        rows = np.zeros(1, TENSOR_ROW)
        rows["tensor"], rows["max"] = recorder.tensor_id(name), rank
        recorder.write(0, tensors=rows)
        recorder.close()
        if rank == 0:
            compact(run_dir)
    run = open_run(run_dir)

    assert sorted(run.tensors()[["rank", "name", "max"]].itertuples(index=False, name=None)) == [
        (0, "left", 0.0),
        (1, "right", 1.0),
    ]
    assert run.tensors("right")["rank"].tolist() == [1]


@pytest.mark.parametrize("lost", ["tensors.json", "nothing"])
def test_names_are_found_without_their_file_too(run_dir: Path, lost: str, write_steps: Write) -> None:
    recorder = Recorder(run_dir)
    write_steps(recorder, range(1))
    recorder.close()
    compact(run_dir)
    (run_dir / lost).unlink(missing_ok=True)

    run = open_run(run_dir)

    assert run.tensors()["name"].tolist() == ["stem", "head"] * 2
    assert "loss/ce" in run.steps()


def test_a_view_does_not_change_while_the_run_is_compacted(run_dir: Path, write_steps: Write) -> None:
    recorder = Recorder(run_dir, segment_bytes=1000)
    write_steps(recorder, range(6))
    recorder.close()
    listed, read = open_run(run_dir), open_run(run_dir)
    before = read.steps()

    compact(run_dir)

    pd.testing.assert_frame_equal(listed.steps(), before)
    pd.testing.assert_frame_equal(read.steps(), before)
    pd.testing.assert_frame_equal(listed.tensors(), read.tensors())


def test_the_buffer_table_is_read_as_it_was_audited(run_dir: Path) -> None:
    rows = np.zeros(1, BUFFER_ROW)
    rows["capacity"], rows["teacher_drift"] = 200, np.nan

    Recorder(run_dir).write(10, buffer=rows)

    [audit] = open_run(run_dir).buffer().to_dict("records")
    assert (audit["step"], audit["capacity"]) == (10, 200)
    assert np.isnan(audit["teacher_drift"])


def test_reading_never_imports_torch(run_dir: Path, write_steps: Write) -> None:
    write_steps(Recorder(run_dir), range(2))
    code = "import sys; from stabilitykit.read import open_run; open_run(sys.argv[1]).steps()"

    result = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)", run_dir], capture_output=True, text=True
    )

    assert result.stdout == "False\n"


@pytest.mark.parametrize("bound", [0, 3000])
def test_a_backlog_beyond_memory_reads_the_same_and_leaves_nothing_behind(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_steps: Write, bound: int
) -> None:
    recorder = Recorder(run_dir, segment_bytes=2000)
    write_steps(recorder, range(6))
    whole = open_run(run_dir)
    expected = [whole.steps(), whole.tensors("head"), whole.rollup(), whole.events()]
    monkeypatch.setattr("stabilitykit.read.backlog.MEMORY_BYTES", bound)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    run = open_run(run_dir)

    steps = run.steps()
    assert not list(tmp_path.glob("stabilitykit-*"))
    write_steps(recorder, range(6, 7))  # comes too late for this Run
    for frame, same in zip((steps, run.tensors("head"), run.rollup(), run.events()), expected, strict=True):
        pd.testing.assert_frame_equal(frame, same)
    assert list(tmp_path.glob("stabilitykit-*"))
    del run
    gc.collect()
    assert not list(tmp_path.glob("stabilitykit-*"))
