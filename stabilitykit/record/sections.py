"""The payload of a DATA frame: the rows of each table as they lay in memory, events as JSON."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stabilitykit.schema import ROWS, TABLES, Event, plain

_SECTION = struct.Struct("<BxHII")  # table, bytes a row, rows, bytes
_TABLE_IDS = {name: number for number, name in enumerate(TABLES)}
_EVENT_FIELDS = frozenset(entry.name for entry in fields(Event))
Rows = NDArray[np.void]


class Section(NamedTuple):
    """The rows one frame holds of one table; `row_bytes` is 0 for events."""

    table: str
    row_bytes: int
    num_rows: int
    content: memoryview


def encode_sections(tables: Mapping[str, Rows | None], events: Sequence[Event]) -> list[bytes]:
    """The payload as a list of buffers; tables that are None or empty take no space.

    Raises:
        TypeError: rows are not of the schema's dtype.
    """
    payload: list[bytes] = []
    for table, rows in tables.items():
        if rows is None or not rows.size:
            continue
        dtype = ROWS[table]
        if rows.dtype is not dtype and rows.dtype != dtype:
            raise TypeError(f"Recorder.write: got {table} rows of dtype {rows.dtype}, expected schema.ROWS[{table!r}]")
        packed = rows.tobytes()  # 1 us for 400 rows, as long as numpy takes to describe the same memory to a memoryview
        payload += [_SECTION.pack(_TABLE_IDS[table], dtype.itemsize, rows.size, len(packed)), packed]
    if events:
        text = json.dumps([_event_fields(event) for event in events], default=str).encode()
        payload += [_SECTION.pack(_TABLE_IDS["events"], 0, len(events), len(text)), text]
    return payload


def decode_sections(payload: memoryview) -> Iterator[Section]:
    """The sections of an intact payload; tables of a later version of the format are left out."""
    position = 0
    while position < len(payload):
        table, row_bytes, count, length = _SECTION.unpack_from(payload, position)
        position += _SECTION.size
        if table < len(TABLES):
            yield Section(TABLES[table], row_bytes, count, payload[position : position + length])
        position += length


def decode_events(content: memoryview) -> list[Event]:
    """The events of one section; facts that a later version adds are left out."""
    return [
        Event(**{name: value for name, value in body.items() if name in _EVENT_FIELDS})
        for body in json.loads(bytes(content))
    ]


def well_formed(text: str) -> str:
    """`text` with lone surrogates (undecodable file names have them) spelled out: no UTF-8 can hold them."""
    return text.encode("utf-8", "backslashreplace").decode()


def _event_fields(event: Event) -> dict[str, Any]:
    stamped = event if event.wall_time else replace(event, wall_time=time.time())
    return {
        "kind": well_formed(stamped.kind),
        "message": well_formed(stamped.message),
        "severity": stamped.severity,
        "subject": well_formed(stamped.subject),
        "wall_time": stamped.wall_time,
        "data": plain(stamped.data),
    }
