"""A segment of the log as rows, events and names; what is damaged is left out and told as an event."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stabilitykit.record.frame import FRAME_VERSION, Frame, FrameKind, Gap, scan_frames
from stabilitykit.record.names import Names
from stabilitykit.record.sections import Rows, decode_events, decode_sections
from stabilitykit.record.segment import is_live
from stabilitykit.schema import ROWS, SCHEMA_VERSION, Event

_MALFORMED = (ValueError, TypeError, LookupError, AttributeError, struct.error)
STORAGE_ORDER = ("tensor", "scalar", "role", "step")  # of the rows in a part, by those of them that the table has


class LogRows(NamedTuple):
    """The rows of one table, with the attempt and step of the frame each came in."""

    attempt: NDArray[np.int32]
    step: NDArray[np.int64]
    rows: Rows


class LogEvent(NamedTuple):
    """An event, with the attempt and step of its frame."""

    attempt: int
    step: int
    event: Event


@dataclass
class SegmentLog:
    """All that one segment holds.

    Attributes:
        tables: rows by table; tables without rows are absent.
        events: recorded ones and, kind `damaged_log`, one for each stretch of bytes that could not be read.
        names: ids the rows use.
        sealed: the writer finished this segment.
        last_step: highest step of any intact frame, -1 for none.
        num_bytes: length of the log it was decoded from.
    """

    tables: dict[str, LogRows] = field(default_factory=dict)
    events: list[LogEvent] = field(default_factory=list)
    names: Names = field(default_factory=Names)
    sealed: bool = False
    last_step: int = -1
    num_bytes: int = 0
    _sorted: set[str] = field(default_factory=set)

    def in_storage_order(self, table: str) -> LogRows | None:
        """A table sorted as its part is: one series' rows lie together, so they compress and are found at once."""
        if table in self.tables and table not in self._sorted:
            attempt, step, rows = self.tables[table]
            names = ("step", *(rows.dtype.names or ()))
            order = storage_order([step if name == "step" else rows[name] for name in STORAGE_ORDER if name in names])
            self.tables[table] = LogRows(attempt[order], step[order], rows[order])
            self._sorted.add(table)
        return self.tables.get(table)


def storage_order(keys: Sequence[NDArray[Any]]) -> NDArray[np.intp]:
    """As `np.lexsort`, first key foremost; a million rows whose last key, the step, is in order take 20 ms, not 800."""
    *series, step = keys
    code = np.zeros(len(step), np.int64)
    for key in series:
        code = code * (int(key.max(initial=0)) + 1) + key
    least_of_series = min((int(key.min(initial=0)) for key in series), default=0)
    in_order = bool((step[1:] >= step[:-1]).all())
    if in_order and least_of_series >= 0 and code.max(initial=0) <= np.iinfo(np.uint16).max:
        return np.argsort(code.astype(np.uint16), kind="stable")  # a radix sort, for 16 bits only
    return np.lexsort(keys[::-1])


def read_segment(path: Path, limit: int | None = None) -> SegmentLog:
    """Read a segment, open or sealed, or its first `limit` bytes.

    Raises:
        OSError: the file cannot be read, or not by this version; FileNotFoundError also means that it has become parts
            meanwhile.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return read_descriptor(descriptor, path, lambda: is_live(descriptor), limit)
    finally:
        os.close(descriptor)


def read_descriptor(
    descriptor: int, path: Path, is_growing: Callable[[], bool], limit: int | None = None
) -> SegmentLog:
    """Read the segment behind an open descriptor; a torn end is no damage while it is growing."""
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        log = file.read(-1 if limit is None else limit)
    return decode_log(log, "/".join(path.parts[-3:]), os.fstat(descriptor).st_mtime, is_growing)


def decode_log(log: bytes, label: str, modified: float, is_growing: Callable[[], bool] = lambda: False) -> SegmentLog:
    """The content of a log; `label` names it, and `modified` dates it, in the events about its damage.

    Raises:
        OSError: frames are of a newer schema, or intact and yet make no sense.
    """
    items = list(scan_frames(log))
    if items and isinstance(items[-1], Gap) and is_growing():
        items.pop()
    try:
        content = _Decoder(label, modified).decode(items)
    except _MALFORMED as error:
        raise OSError(errno.EBADMSG, f"an intact frame makes no sense ({error!r})", label) from error
    content.num_bytes = len(log)
    return content


def read_names(path: Path) -> tuple[Names, bool]:
    """The names a segment holds, without decoding its rows, and whether its writer lives.

    Raises:
        OSError: the file cannot be read.
    """
    names = Names()
    with path.open("rb") as file:
        for item in scan_frames(file.read()):
            if isinstance(item, Frame) and item.kind == FrameKind.META:
                names.merge_text(bytes(item.payload))
        return names, is_live(file.fileno())


class _Decoder:
    """Turns frames and gaps into a SegmentLog."""

    def __init__(self, label: str, modified: float) -> None:
        self._label = label
        self._modified = modified
        self._log = SegmentLog()
        self._layouts: dict[str, np.dtype[np.void]] = dict(ROWS)
        self._content: defaultdict[str, list[memoryview]] = defaultdict(list)
        self._origin: defaultdict[str, list[tuple[int, int, int]]] = defaultdict(list)  # attempt, step, rows
        self._unknown: list[Frame] = []

    def decode(self, items: list[Frame | Gap]) -> SegmentLog:
        intact = [item for item in items if isinstance(item, Frame)]
        frames = [frame for frame in intact if frame.version <= FRAME_VERSION]
        self._unknown = [frame for frame in intact if frame.version > FRAME_VERSION]
        for frame in frames:
            if frame.kind == FrameKind.META:
                self._read_meta(frame)
        for frame in frames:
            if frame.kind == FrameKind.DATA:
                self._read_data(frame)
        self._log.sealed = any(frame.kind == FrameKind.SEAL for frame in frames)
        self._log.last_step = max((frame.step for frame in frames), default=-1)
        for table, content in self._content.items():
            self._log.tables[table] = self._join(table, content)
        self._log.events += self._damage(items)
        return self._log

    def _read_meta(self, frame: Frame) -> None:
        body = json.loads(bytes(frame.payload))
        version = body.get("schema_version", SCHEMA_VERSION)
        if version > SCHEMA_VERSION:
            raise OSError(f"schema version {version}, expected at most {SCHEMA_VERSION}; update stabilitykit")
        self._log.names.merge(body)
        for table, layout in body.get("rows", {}).items():
            self._layouts[table] = np.dtype([(name, code) for name, code in layout])

    def _read_data(self, frame: Frame) -> None:
        for section in decode_sections(frame.payload):
            if section.table == "events":
                events = decode_events(section.content)
                self._log.events += [LogEvent(frame.attempt, frame.step, event) for event in events]
            elif self._layouts[section.table].itemsize == section.row_bytes:
                self._content[section.table].append(section.content)
                self._origin[section.table].append((frame.attempt, frame.step, section.num_rows))
            else:  # another version's rows, and both META frames are gone
                self._unknown.append(frame)

    def _join(self, table: str, content: list[memoryview]) -> LogRows:
        attempt, step, count = np.array(self._origin[table], dtype=np.int64).T
        rows = np.frombuffer(b"".join(content), dtype=self._layouts[table])
        return LogRows(np.repeat(attempt.astype(np.int32), count), np.repeat(step, count), rows)

    def _damage(self, items: list[Frame | Gap]) -> Iterator[LogEvent]:
        """An event for what is missing between two intact DATA frames: gaps, and jumps in the frames' numbers."""
        before: Frame | None = None
        expected = missing = num_bytes = 0
        for item in items:
            if isinstance(item, Gap):
                num_bytes += item.length
                continue
            missing += item.sequence - expected
            expected = item.sequence + 1
            if item.kind == FrameKind.DATA:
                if missing or num_bytes:
                    yield self._skipped(before, item, num_bytes, missing)
                before, missing, num_bytes = item, 0, 0
        if items and isinstance(items[-1], Gap):
            yield self._event(
                before, f"a torn tail of {num_bytes:,} bytes {_after(before)} was cut", num_bytes, missing
            )
        elif missing or num_bytes:
            yield self._skipped(before, None, num_bytes, missing)
        if self._unknown:
            first, last = self._unknown[0], self._unknown[-1]
            span = f"{len(self._unknown):,} frames from step {first.step:,} to {last.step:,}"
            yield self._event(first, f"{span} are of an unknown version and were skipped", 0, len(self._unknown))

    def _skipped(self, before: Frame | None, after: Frame | None, num_bytes: int, missing: int) -> LogEvent:
        place = _after(before) + (f" and before step {after.step:,}" if after else "")
        message = f"damaged frames: {missing:,} ({num_bytes:,} bytes), skipped {place}"
        return self._event(before or after, message, num_bytes, missing)

    def _event(self, near: Frame | None, message: str, num_bytes: int, missing: int) -> LogEvent:
        event = Event(
            kind="damaged_log",
            severity="warning",
            subject=self._label,
            message=f"{self._label}: {message}",
            wall_time=self._modified,
            data={"bytes": num_bytes, "frames": missing},
        )
        return LogEvent(near.attempt if near else 0, near.step if near else -1, event)


def _after(before: Frame | None) -> str:
    return f"after step {before.step:,}" if before else "at the start"
