"""The segments that have no part yet: in memory, and beyond a bound as parts of the reader's own."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds

from stabilitykit.read.datasets import from_files, from_memory
from stabilitykit.record.columns import log_table
from stabilitykit.record.compact import encode_part
from stabilitykit.record.folder import part_path, segment_path
from stabilitykit.record.names import Names
from stabilitykit.record.scan import SegmentLog, read_segment

MEMORY_BYTES = 256 << 20  # of log; each costs about two bytes of memory
_LARGE = ("tensors", "rollup")
Key = tuple[int, int]  # rank, number of a segment


class Backlog:
    """Decodes each segment once; what it saw then stays, though the segment may grow or become parts.

    A run killed before anything was compacted may leave more log than fits in memory. So of segments beyond
    MEMORY_BYTES only the short tables are kept, and their tensors, when asked for, become parts in a temporary folder
    that goes with this object.
    """

    def __init__(self, run_dir: Path, tell: Callable[[str], None]) -> None:
        """Nothing is read yet; `tell` takes sentences about segments that cannot be."""
        self._run_dir, self._tell = run_dir, tell
        self._logs: dict[Key, SegmentLog] = {}
        self._tables: dict[tuple[Key, str], pa.Table | None] = {}
        self._on_disk: set[Key] = set()
        self._num_bytes = 0
        self._folder: Path | None = None

    def load(self, keys: Iterable[Key]) -> None:
        """Decode these segments, unless it has been done.

        Raises:
            FileNotFoundError: one of them has become parts.
        """
        for key in sorted(set(keys) - self._logs.keys()):
            log = self._read(key, None)
            self._num_bytes += log.num_bytes
            if self._num_bytes > MEMORY_BYTES:
                log.tables.pop("tensors", None)
                self._on_disk.add(key)
            self._logs[key] = log

    def datasets(self, keys: Iterable[Key], table: str) -> Iterator[ds.Dataset]:
        """One table of these segments.

        Raises:
            FileNotFoundError: one of them has become parts.
        """
        keys = list(keys)
        self.load(keys)
        spilled = [key for key in keys if key in self._on_disk and table in _LARGE]
        files = [path for key in spilled if (path := self._spill(key, table)).exists()]
        if files and self._folder:
            yield from_files(self._folder, table, files)
        pieces = [(key[0], rows) for key in keys if (rows := self._table(key, table)) is not None]
        if pieces:
            yield from_memory(table, pieces)

    def merge_names(self, rank: int, names: Names) -> None:
        """Add the names that the loaded segments of a rank hold."""
        for (owner, _), log in self._logs.items():
            if owner == rank:
                names.merge(log.names.table())

    def _read(self, key: Key, limit: int | None) -> SegmentLog:
        path = segment_path(self._run_dir, *key)
        try:
            return read_segment(path, limit)
        except FileNotFoundError:
            raise
        except OSError as error:
            self._tell(f"{'/'.join(path.parts[-3:])} cannot be read and was skipped: {error}")
            return SegmentLog()

    def _table(self, key: Key, table: str) -> pa.Table | None:
        if (key, table) not in self._tables:
            self._tables[key, table] = log_table(self._logs[key], table)
        return self._tables[key, table]

    def _spill(self, key: Key, table: str) -> Path:
        """Where the table of a segment is as a part; there is none if the segment has no such rows."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="stabilitykit-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        path = part_path(self._folder, table, *key)
        if not path.exists():
            log = self._read(key, self._logs[key].num_bytes)
            for large in _LARGE:
                rows = log_table(log, large)
                if rows is not None:
                    file = part_path(self._folder, large, *key)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(encode_part(rows, {}))
        return path
