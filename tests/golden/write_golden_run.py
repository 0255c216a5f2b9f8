"""Writes a golden run: `python tests/golden/write_golden_run.py FOLDER`, once for each schema version.

A run resumed once and killed: parts, a sealed and an unsealed segment, every table, every column, two attempts. What
was written goes beside it as FOLDER.json, so that no reader has a say in what is expected of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from stabilitykit.record import Recorder
from stabilitykit.record.compact import compact
from stabilitykit.record.ending import write_ending
from stabilitykit.schema import (
    PHASES,
    ROLES,
    ROWS,
    SCHEMA_VERSION,
    ChainLink,
    Diagnosis,
    Event,
    Origin,
    RunUpStep,
    TensorSummary,
    plain,
)

ODD = (np.nan, np.inf, -np.inf, 5e-324, -0.0, 1.7976931348623157e308, 0.1)
SUMMARY = TensorSummary(name="x", dtype="float16", shape=(2, 3), numel=6, posinf=1, min=-1.5, max=65504.0, mean=0.25)
DIAGNOSIS = Diagnosis(
    origin=Origin(
        step=5, phase="forward", kind="inf", module="head", op="exp", file="train.py", line=7, samples=(1, 4)
    ),
    noticed="loss",
    chain=(
        ChainLink(
            phase="forward", op="exp", module="head", file="train.py", line=7, code="y = x.exp()", output=SUMMARY
        ),
    ),
    inputs=(SUMMARY,),
    rule="overflow",
    cause="exp of 12 exceeds float16",
    remedies=("subtract the maximum first",),
    run_up=(RunUpStep(step=4, loss=0.5, absmax=11.0, absmax_tensor="head"),),
    task=1,
)
Expected = dict[str, list[list[Any]]]


def main(run_dir: Path) -> None:
    run_dir.mkdir(parents=True)
    meta = {"schema_version": SCHEMA_VERSION, "run_id": "golden", "attempts": [{"attempt": 0}, {"attempt": 1}]}
    (run_dir / "run.json").write_text(json.dumps(meta, indent=1))
    expected: Expected = {table: [] for table in (*ROWS, "events")}
    first = Recorder(run_dir, segment_bytes=5000)
    write_steps(first, 0, range(6), expected)
    first.close()
    compact(run_dir)
    write_ending(run_dir, "raised", 5, "NonFiniteError: step 5", attempt=0)
    (run_dir / "diagnosis.json").write_text(DIAGNOSIS.to_json())
    second = Recorder(run_dir, attempt=1, segment_bytes=5000)
    write_steps(second, 1, range(4, 8), expected)
    assert second.num_sealed
    (run_dir / "tmp").rmdir()
    columns = {table: ["attempt", "step", *(dtype.names or ())] for table, dtype in ROWS.items()}
    columns["events"] = ["attempt", "step", "kind", "severity", "subject", "message", "wall_time", "data"]
    body = {
        "columns": columns,
        "rows": plain(expected),
        "names": ["stem", "head", "größe"],
        "scalars": ["loss/ce", "lr/1"],
    }
    run_dir.with_suffix(".json").write_text(json.dumps(body, separators=(",", ":")).replace("],[", "],\n["))


def write_steps(recorder: Recorder, attempt: int, steps: range, expected: Expected) -> None:
    for step in steps:
        names = ["stem", "head", *(["größe"] if step > 2 else [])]
        ids = {"tensor": [recorder.tensor_id(name, kind="module", dtype="float16", shape=(2, 3)) for name in names]}
        ids["scalar"] = [recorder.scalar_id(name) for name in ("loss/ce", "lr/1")]
        rows = {table: fill(table, attempt, step, ids) for table in ROWS if table != "buffer" or step % 2 == 0}
        event = Event(
            kind="task", message=f"task {step} → ä", subject="head", wall_time=0.5 + step, data={"task": step}
        )
        assert recorder.write(step, events=[event], **rows)
        for table, values in rows.items():
            expected[table] += [[attempt, step, *row.item()] for row in values]
        told = [event.kind, event.severity, event.subject, event.message, event.wall_time, json.dumps(event.data)]
        expected["events"].append([attempt, step, *told])


def fill(table: str, attempt: int, step: int, ids: dict[str, list[int]]) -> np.ndarray:
    """Rows in which every column differs from its neighbours."""
    dtype = ROWS[table]
    own = {"tensors": ids["tensor"], "scalars": ids["scalar"]}.get(table, [0])
    rows = np.zeros(len(own), dtype)
    noise = np.random.default_rng([attempt, step, len(table)])
    for name in dtype.names or ():
        if dtype[name].kind == "f":
            rows[name] = noise.standard_normal(len(rows))
        else:
            rows[name] = noise.integers(0, 2 if dtype[name].itemsize == 1 else 1 << 30, len(rows))
    if table == "tensors":
        rows["tensor"], rows["order"] = own, range(len(own))
        rows["role"], rows["phase"] = noise.integers(len(ROLES)), noise.integers(len(PHASES))
        rows["min"][0], rows["max"][-1] = ODD[step % len(ODD)], ODD[(step + 3) % len(ODD)]
    elif table == "scalars":
        rows["scalar"] = own
    return rows


if __name__ == "__main__":
    main(Path(sys.argv[1]))
