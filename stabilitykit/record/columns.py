"""Rows of the log as Arrow tables; the compactor and the reader use it, the training process never does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stabilitykit.record.rollup import ROLLUP_ROW, roll_up
from stabilitykit.record.scan import LogEvent, LogRows, SegmentLog
from stabilitykit.schema import EVENT_COLUMNS, ROWS, TABLES

STORED_TABLES = (*TABLES, "rollup")
_KEYS = [pa.field("attempt", pa.int32()), pa.field("step", pa.int64())]


def table_schema(table: str) -> pa.Schema:
    """Columns of a table's parts; `rank` is not among them, it is in their path."""
    if table == "events":
        kinds = [pa.float64() if name == "wall_time" else pa.string() for name in EVENT_COLUMNS]
        return pa.schema([*_KEYS, *map(pa.field, EVENT_COLUMNS, kinds)])
    dtype = ROLLUP_ROW if table == "rollup" else ROWS[table]
    return pa.schema([*_KEYS, *(pa.field(name, pa.from_numpy_dtype(dtype[name])) for name in dtype.names or ())])


def log_table(log: SegmentLog, table: str) -> pa.Table | None:
    """One table of a segment in storage order, None where it has no rows."""
    if table == "events":
        return _events_table(log.events) if log.events else None
    rows = log.in_storage_order("tensors" if table == "rollup" else table)
    if rows is None:
        return None
    return _rows_table(roll_up(rows) if table == "rollup" else rows)


def _rows_table(rows: LogRows) -> pa.Table:
    names = rows.rows.dtype.names or ()
    columns: dict[str, NDArray[Any]] = {"attempt": rows.attempt, "step": rows.step}
    columns |= {name: rows.rows[name] for name in names}
    return pa.table({name: _array(values) for name, values in columns.items()})


def _array(values: NDArray[Any]) -> pa.Array:
    """Without `pa.array`, which would import pandas."""
    packed = np.require(values, requirements=("C", "A"))  # a single packed row passes for contiguous, unaligned
    return pa.Array.from_buffers(pa.from_numpy_dtype(packed.dtype), len(packed), [None, pa.py_buffer(packed)])


def _strings(values: Sequence[str]) -> pa.Array:
    encoded = [value.encode() for value in values]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(encoded), buffers)


def _events_table(events: Sequence[LogEvent]) -> pa.Table:
    columns = {
        "attempt": _array(np.array([entry.attempt for entry in events], dtype=np.int32)),
        "step": _array(np.array([entry.step for entry in events], dtype=np.int64)),
        "wall_time": _array(np.array([entry.event.wall_time for entry in events], dtype=np.float64)),
        "kind": _strings([entry.event.kind for entry in events]),
        "severity": _strings([entry.event.severity for entry in events]),
        "subject": _strings([entry.event.subject for entry in events]),
        "message": _strings([entry.event.message for entry in events]),
        "data": _strings([json.dumps(dict(entry.event.data)) for entry in events]),
    }
    return pa.table(columns, schema=table_schema("events"))
