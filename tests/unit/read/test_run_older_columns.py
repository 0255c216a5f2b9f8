"""Runs recorded before a table had all its columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stabilitykit.analyse.buffer import buffer_health
from stabilitykit.read import open_run
from stabilitykit.record import Recorder
from stabilitykit.record.compact import compact
from stabilitykit.schema import BUFFER_ROW, ROWS

ADDED = (
    "example_min",
    "example_max",
    "least_held",
    "most_held",
    "age_max",
    "age_share",
    "teacher_agreement",
    "drift_slots",
)
OLDER_ROW = np.dtype([field for field in BUFFER_ROW.descr if field[0] not in ADDED])


def record(run_dir: Path, steps: range, *, compacted: bool, attempt: int = 0) -> None:
    recorder = Recorder(run_dir, attempt=attempt)
    for step in steps:
        row = np.zeros(1, ROWS["buffer"])
        row["capacity"], row["filled"], row["logit_l2"] = 500, step, 1.5
        assert recorder.write(step, buffer=row)
    recorder.close()
    if compacted:
        compact(run_dir)


@pytest.mark.parametrize("compacted", [False, True], ids=["log", "parquet"])
def test_columns_that_an_older_run_lacks_are_missing_values(
    run_dir: Path, compacted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setitem(ROWS, "buffer", OLDER_ROW)
        record(run_dir, range(3), compacted=compacted)

    table = open_run(run_dir).buffer()

    assert table["filled"].tolist() == [0, 1, 2]
    assert table[list(ADDED)].isna().all(axis=None)
    assert "Rarest class" not in {measure.name for measure in buffer_health(table)}


@pytest.mark.parametrize("compacted", [False, True], ids=["log", "parquet"])
def test_a_run_resumed_by_a_newer_version_has_its_columns_from_then_on(
    run_dir: Path, compacted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as older:
        older.setitem(ROWS, "buffer", OLDER_ROW)
        record(run_dir, range(3), compacted=compacted)
    record(run_dir, range(3, 5), compacted=False, attempt=1)

    table = open_run(run_dir).buffer()

    assert table["filled"].tolist() == [0, 1, 2, 3, 4]
    assert table["drift_slots"].isna().tolist() == [True] * 3 + [False] * 2
    assert table["logit_l2"].tolist() == [1.5] * 5
