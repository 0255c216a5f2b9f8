"""Runs written by every schema version so far, kept as they were written: each is read row by row as it was meant."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stabilitykit as sk
from stabilitykit.record import Recorder
from stabilitykit.record.compact import compact
from stabilitykit.record.folder import list_segments
from stabilitykit.schema import ROWS, SCHEMA_VERSION

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.glob("schema-*") if path.is_dir())


@pytest.fixture(params=VERSIONS)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy, so that nothing a test does reaches the original."""
    return Path(shutil.copytree(GOLDEN / request.param, tmp_path / "run"))


@pytest.fixture
def expected(request: pytest.FixtureRequest, golden: Path) -> dict[str, Any]:
    version = request.node.callspec.params["golden"]
    body: dict[str, Any] = json.loads((GOLDEN / f"{version}.json").read_text())
    return body


def stored_rows(run: sk.Run, table: str, columns: list[str]) -> list[tuple[str, ...]]:
    rows = run.table(table).to_table(columns=columns).to_pylist()
    return sorted(tuple(map(as_text, row.values())) for row in rows)


def as_text(value: object) -> str:
    return str(float(value)) if isinstance(value, int | float) or value in ("nan", "inf", "-inf") else str(value)


def check_rows(run: sk.Run, expected: dict[str, Any]) -> None:
    for table, columns in expected["columns"].items():
        rows = sorted(tuple(map(as_text, row)) for row in expected["rows"][table])
        assert len(rows) > 4
        assert stored_rows(run, table, columns) == rows


def test_the_present_schema_has_a_golden_run() -> None:
    assert f"schema-{SCHEMA_VERSION}" in VERSIONS


def test_every_row_reads_as_it_was_written(golden: Path, expected: dict[str, Any]) -> None:
    run = sk.open_run(golden)

    check_rows(run, expected)
    assert run.names()["name"].tolist() == expected["names"]
    assert set(expected["scalars"]) < set(run.steps().columns)
    assert (run.ending, run.last_step, run.damage) == ("killed", 7, [])
    assert list(zip(run.steps()["attempt"], run.steps()["step"], strict=True)) == [
        *((0, step) for step in range(4)),
        *((1, step) for step in range(4, 8)),
    ]


def test_its_diagnosis_reads_as_it_was_written(golden: Path) -> None:
    diagnosis = sk.open_run(golden).diagnosis

    assert diagnosis is not None
    assert diagnosis.verdict == "step 5, task 1: first Inf in the forward phase: `exp` in module `head` at train.py:7"
    assert (diagnosis.origin.samples, diagnosis.rule, diagnosis.remedies) == (
        (1, 4),
        "overflow",
        ("subtract the maximum first",),
    )
    assert diagnosis.chain[0].output == diagnosis.inputs[0]
    assert (diagnosis.inputs[0].shape, diagnosis.inputs[0].max) == ((2, 3), 65504.0)
    assert diagnosis.run_up[0].absmax == 11.0
    assert math.isnan(diagnosis.run_up[0].grad_norm)


def test_its_log_is_compacted_and_resumed_by_the_present_version(golden: Path, expected: dict[str, Any]) -> None:
    compact(golden, include_open=True)

    assert list_segments(golden) == []
    check_rows(sk.open_run(golden), expected)
    resumed = Recorder(golden, attempt=2)
    assert [resumed.tensor_id(name, kind="module") for name in expected["names"]] == [0, 1, 2]
    assert resumed.write(8, steps=np.zeros(1, ROWS["steps"]))
    resumed.close()
    assert sk.open_run(golden).last_step == 8


def test_it_has_a_report(golden: Path, tmp_path: Path) -> None:
    page = sk.write_report(sk.open_run(golden), tmp_path / "report.html")

    assert "`exp`" in page.read_text() or "<code>exp</code>" in page.read_text()


def test_a_log_of_a_newer_schema_is_refused_and_left_to_a_newer_compactor(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stabilitykit.record.recorder.SCHEMA_VERSION", SCHEMA_VERSION + 1)
    newer = Recorder(golden, attempt=2)
    newer.write(8, steps=np.zeros(1, ROWS["steps"]))
    newer.close()
    monkeypatch.undo()
    segments = list_segments(golden)

    run = sk.open_run(golden)

    assert run.last_step == 7
    [sentence] = run.damage
    assert f"schema version {SCHEMA_VERSION + 1}, expected at most {SCHEMA_VERSION}; update stabilitykit" in sentence
    with pytest.raises(sk.StabilityKitError, match="update stabilitykit"):
        compact(golden, include_open=True)
    assert list_segments(golden) == segments[-1:]
