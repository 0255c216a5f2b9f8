"""The Recorder: a step's rows into the log with one system call, in line; the monitor calls it, and it never raises."""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stabilitykit.record.folder import list_segments, names_path, next_number, replace_file, segment_path, wal_folder
from stabilitykit.record.frame import FrameKind, encode_frame
from stabilitykit.record.names import Names, load_names
from stabilitykit.record.scan import read_names
from stabilitykit.record.sections import Rows, encode_sections
from stabilitykit.record.segment import Segment
from stabilitykit.schema import ROWS, SCHEMA_VERSION, Event


@dataclass
class _Loss:
    """Frames that could not be written since the last one that could."""

    frames: int
    first_step: int
    last_step: int
    reason: str

    def event(self) -> Event:
        span = f"step {self.first_step:,}"
        if self.last_step != self.first_step:
            span = f"steps {self.first_step:,} to {self.last_step:,}"
        return Event(
            kind="lost_rows",
            severity="warning",
            subject="log",
            message=f"writes lost at {span}: {self.frames:,}, {self.reason}",
            data={
                "frames": self.frames,
                "first_step": self.first_step,
                "last_step": self.last_step,
                "reason": self.reason,
            },
        )


class Recorder:
    """Appends a run's rows to its log; what `write` returned True for survives `kill -9` of this process.

    A full disk, a read-only or deleted folder cost the rows, never the training: the first loss is warned about, every
    loss is counted in `lost_frames` and recorded, as an event `lost_rows`, as soon as a write succeeds again. Deletion
    is looked for at every sync: until then rows go where the ones before them went. In a forked child (a DataLoader
    worker) every method does nothing.

    Attributes:
        lost_frames: writes that were not acknowledged.
        num_sealed: segments that are ready for `python -m stabilitykit.record.compact`.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int = 0,
        attempt: int = 0,
        segment_bytes: int = 96 << 20,
        sync_seconds: float = 5.0,
    ) -> None:
        """Continue the folder's ids and segment numbers; nothing is written yet, nothing is raised.

        Args:
            run_dir: the run folder, created if need be.
            rank: of this process in a distributed run; each rank has a log of its own.
            attempt: 0, and one more whenever the run is resumed.
            segment_bytes: size at which a segment is sealed and the next one begun.
            sync_seconds: at most so many seconds of rows are lost to a power cut, or written to a deleted log.
        """
        self.lost_frames = 0
        self.num_sealed = 0
        self._run_dir = Path(run_dir).absolute()  # the script may change its directory
        self._rank, self._attempt = rank, attempt
        self._segment_bytes, self._sync_seconds = segment_bytes, sync_seconds
        self._names = Names()
        self._in_segment = (0, 0)  # tensor and scalar names the open segment holds
        self._published = 0  # names that tensors.json holds or, where it cannot be written, should hold
        self._publish_again = False
        self._segment: Segment | None = None
        self._loss: _Loss | None = None
        self._warned = self._closed = False
        self._next_sync = time.monotonic() + sync_seconds
        self._pid = os.getpid()
        self._lock = threading.RLock()
        with suppress(OSError):  # what is wrong with the folder is said by the first write
            self._run_dir.mkdir(parents=True, exist_ok=True)
            self._resume_names()

    def tensor_id(self, name: str, *, kind: str = "", dtype: str = "", shape: tuple[int, ...] = ()) -> int:
        """Id of a tensor for the rows' `tensor` column, the same one for the same name and kind, in every attempt.

        Args:
            name: qualified name, as in `named_modules()` or `named_parameters()`.
            kind: module, parameter, optimizer_state, module_buffer, ...
            dtype: of the tensor when first seen.
            shape: of the tensor when first seen.
        """
        with self._guard():
            return self._names.tensor_id(name, kind, dtype, shape)

    def scalar_id(self, name: str) -> int:
        """Id of a scalar series for the rows' `scalar` column."""
        with self._guard():
            return self._names.scalar_id(name)

    def write(
        self,
        step: int,
        *,
        steps: Rows | None = None,
        tensors: Rows | None = None,
        scalars: Rows | None = None,
        buffer: Rows | None = None,
        events: Sequence[Event] = (),
    ) -> bool:
        """Append one step's rows, each an array of its dtype in `schema.ROWS`.

        Returns:
            True: all of it is in the log, also after a kill. False: none of it is. It never raises.
        """
        if os.getpid() != self._pid or self._closed:
            return False
        tables = {"steps": steps, "tensors": tensors, "scalars": scalars, "buffer": buffer}
        with self._lock:
            try:
                self._append(step, tables, events)
                self._maintain(urgent=bool(events) and any(event.severity == "error" for event in events))
            except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
                self._lose(step, error)
                return False
            return True

    def close(self) -> None:
        """Seal the log; harmless when repeated. Compaction is someone else's business."""
        if os.getpid() != self._pid or self._closed:
            return
        with self._lock:
            self._closed = True
            if self._loss is not None:
                with suppress(OSError):
                    self._append(self._loss.last_step, {}, ())
            self._seal()
            if self._publish_again:
                self._publish_names()

    def _guard(self) -> AbstractContextManager[object]:
        """The lock; none in a forked child, where a thread that no longer exists may hold it."""
        return self._lock if os.getpid() == self._pid else nullcontext()

    def _append(self, step: int, tables: Mapping[str, Rows | None], events: Sequence[Event]) -> None:
        told = [*events, self._loss.event()] if self._loss else events
        payload = encode_sections(tables, told)
        segment = self._ready_segment()
        names = self._missing_names(segment)
        number = segment.num_frames + len(names)
        frame = encode_frame(FrameKind.DATA, step, self._attempt, number, payload)
        segment.append([part for meta in names for part in meta] + frame if names else frame)
        segment.num_frames = number + 1
        if names:
            self._in_segment = (len(self._names.tensors), len(self._names.scalars))
        self._loss = None

    def _ready_segment(self) -> Segment:
        """The segment that the next frame goes to."""
        segment = self._segment
        if segment is not None and (segment.torn or segment.size >= self._segment_bytes):
            self._seal()
        if self._segment is None:
            self._segment = self._new_segment()
            self._in_segment = (0, 0)
        return self._segment

    def _new_segment(self) -> Segment:
        if not self._run_dir.is_dir():  # the user deleted it: do not bring it back
            raise FileNotFoundError(f"the run folder {self._run_dir} is gone")
        wal_folder(self._run_dir, self._rank).mkdir(parents=True, exist_ok=True)
        while True:
            number = next_number(self._run_dir, self._rank)
            with suppress(FileExistsError):
                return Segment(segment_path(self._run_dir, self._rank, number))

    def _missing_names(self, segment: Segment) -> list[list[bytes]]:
        """META frames with what the segment does not say yet: twice, since without them rows cannot be read."""
        if segment.num_frames and self._in_segment == (len(self._names.tensors), len(self._names.scalars)):
            return []
        body: dict[str, object] = {"schema_version": SCHEMA_VERSION}
        if not segment.num_frames:
            body["rows"] = {table: dtype.descr for table, dtype in ROWS.items()}
        body |= self._names.table(*self._in_segment)
        text = json.dumps(body).encode()
        first = segment.num_frames
        return [encode_frame(FrameKind.META, -1, self._attempt, first + copy, [text]) for copy in range(2)]

    def _maintain(self, *, urgent: bool) -> None:
        """After a write: names others can read, and now and then a sync.

        Raises:
            FileNotFoundError: the log has been deleted, and what was written with it.
        """
        due = time.monotonic() >= self._next_sync
        if self._published != len(self._names) or (due and self._publish_again):
            self._publish_names()
        if (due or urgent) and self._segment is not None:
            self._next_sync = time.monotonic() + self._sync_seconds
            self._segment.check_presence()
            try:
                self._segment.sync()
            except OSError as error:
                self._segment.torn = True  # after a failed sync the kernel may have dropped pages: begin a new file
                self._warn(f"the log may not survive a power cut: {error}")

    def _seal(self) -> None:
        segment, self._segment = self._segment, None
        if segment is None:
            return
        try:
            segment.check_presence()
            if segment.num_frames and not segment.torn:
                frame = encode_frame(FrameKind.SEAL, -1, self._attempt, segment.num_frames, [])
                segment.append(frame)
                self.num_sealed += 1
            segment.sync()
        except FileNotFoundError as error:
            self._warn(str(error))
        except OSError:
            pass  # unsealed, the segment is read like any other and compacted at the end
        segment.close()

    def _publish_names(self) -> None:
        """Names for readers of the parts; the log holds them too, so a failure is made up for at the next sync."""
        self._published, self._publish_again = len(self._names), False
        text = json.dumps(self._names.table()).encode()
        try:
            replace_file(self._run_dir, names_path(self._run_dir, self._rank), text, durable=False)
        except OSError:
            self._publish_again = True

    def _resume_names(self) -> None:
        """Ids of earlier attempts: from tensors.json and, if the writer died before that, from its last segment."""
        known = load_names(names_path(self._run_dir, self._rank), self._names)
        self._published = len(self._names)
        number = next_number(self._run_dir, self._rank)
        live = False
        if (self._rank, number - 1) in list_segments(self._run_dir):
            names, live = read_names(segment_path(self._run_dir, self._rank, number - 1))
            self._names.merge(names.table())
            known = known or len(names) > 0
        if live or (number and not known):  # two writers, or a lost names file: never one id for two names
            self._names.skip_to(number << 16)

    def _lose(self, step: int, error: Exception) -> None:
        self.lost_frames += 1
        reason = str(error) or type(error).__name__
        number = step if isinstance(step, int | np.integer) else -1
        if self._loss is None:
            self._loss = _Loss(0, number, number, reason)
        self._loss.frames += 1
        self._loss.last_step = number
        self._warn(f"rows of step {step} are lost, and more may be: {reason}; training goes on")

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            with suppress(RuntimeWarning):  # where warnings are errors, training still goes on
                warnings.warn(f"stabilitykit: {message}", RuntimeWarning, stacklevel=4)
