"""The tables of a run folder: parquet parts and the segments that have no part yet, read as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from stabilitykit.read.backlog import Backlog, Key
from stabilitykit.read.datasets import UNREADABLE, from_files, joined
from stabilitykit.record.columns import STORED_TABLES
from stabilitykit.record.folder import list_parts, list_segments, names_path, part_path, segment_path
from stabilitykit.record.footer import is_footer_damaged
from stabilitykit.record.names import Names, load_names

Result = TypeVar("Result")


class Store:
    """What a run folder held when it was first read; a compactor at work meanwhile changes nothing.

    Attributes:
        damage: sentences about parts that could not be read, grows while reading.
    """

    def __init__(self, run_dir: Path) -> None:
        self.damage: list[str] = []
        self._run_dir = run_dir
        self._backlog = Backlog(run_dir, self._tell)
        self._names: dict[int, Names] = {}
        self._sound: dict[Path, bool] = {}
        self._list()

    def dataset(self, table: str) -> ds.Dataset:
        """A table of the whole run, `rank` included."""
        pending = self._pending(table)  # may find that a segment has become parts: before the parts are taken
        files = list(self._sound_parts(table))
        return joined(table, [*([from_files(self._run_dir, table, files)] if files else []), *pending])

    def read(self, table: str, columns: Sequence[str] | None = None, where: pc.Expression | None = None) -> pa.Table:
        """The rows of a table; what is damaged in a part costs itself and is told in `damage`."""
        dataset = self.dataset(table)
        try:
            return dataset.to_table(columns=columns, filter=where)
        except UNREADABLE:
            schema = dataset.schema if columns is None else pa.schema([dataset.schema.field(name) for name in columns])
            return pa.concat_tables([schema.empty_table(), *self._salvage(dataset, columns, where)])

    def names(self, rank: int) -> Names:
        """The names behind a rank's ids: from its names file, its log and, where there is no such file, its parts."""
        if rank not in self._names:
            self._names[rank] = names = Names()
            known = load_names(names_path(self._run_dir, rank), names)
            for table in STORED_TABLES:
                self._while_listed(self._backlog.load, table)
            self._backlog.merge_names(rank, names)
            if not known:  # the compactor brings the file up to date before a log goes
                self._merge_part_names(rank, names)
        return self._names[rank]

    def ranks(self) -> list[int]:
        """Every rank that recorded something, 0 always."""
        keys = [*self._segments, *(key for parts in self._parts.values() for key in parts)]
        return sorted({0, *(rank for rank, _ in keys)})

    def _list(self) -> None:
        # segments first: one that is compacted in between shows up twice, never not at all
        listed = list_segments(self._run_dir)
        self._segments = [key for key in listed if segment_path(self._run_dir, *key).exists()]  # no dangling links
        self._parts = {table: list_parts(self._run_dir, table) for table in STORED_TABLES}

    def _pending(self, table: str) -> list[ds.Dataset]:
        """The rows of the segments that have no part of this table yet."""
        return self._while_listed(lambda keys: list(self._backlog.datasets(keys, table)), table)

    def _while_listed(self, use: Callable[[list[Key]], Result], table: str) -> Result:
        """What `use` makes of the segments without a part of this table, which may become parts meanwhile."""
        while True:
            parts = set(self._parts[table])
            with suppress(FileNotFoundError):
                return use([key for key in self._segments if key not in parts])
            self._list()

    def _sound_parts(self, table: str) -> Iterator[Path]:
        """The parts of a table, without those whose footer is damaged: what it says of its pages may be anything."""
        for key in self._parts[table]:
            path = part_path(self._run_dir, table, *key)
            if path not in self._sound:
                self._sound[path] = self._is_sound(path)
            if self._sound[path]:
                yield path

    def _is_sound(self, path: Path) -> bool:
        try:
            if not is_footer_damaged(path):
                return True
            self._tell(f"{_short(path)} has a damaged footer and was skipped")
        except OSError as error:
            self._tell(f"{_short(path)} cannot be read and was skipped: {error}")
        return False

    def _salvage(
        self, dataset: ds.Dataset, columns: Sequence[str] | None, where: pc.Expression | None
    ) -> Iterator[pa.Table]:
        """What can be read, row group by row group."""
        for fragment in dataset.get_fragments():
            path = Path(getattr(fragment, "path", ""))
            try:
                pieces = fragment.split_by_row_group() if isinstance(fragment, ds.ParquetFileFragment) else [fragment]
            except UNREADABLE as error:
                self._tell(f"{_short(path)} cannot be read and was skipped: {error}")
                continue
            for number, piece in enumerate(pieces):
                try:
                    yield piece.to_table(schema=dataset.schema, columns=columns, filter=where)
                except UNREADABLE as error:
                    self._tell(f"{_short(path)}: row group {number} is damaged and was skipped: {error}")

    def _tell(self, sentence: str) -> None:
        if sentence not in self.damage:
            self.damage.append(sentence)

    def _merge_part_names(self, rank: int, names: Names) -> None:
        for table in ("tensors", "scalars"):
            for path in self._sound_parts(table):
                if path.parent.name == f"rank={rank}":
                    with suppress(*UNREADABLE):
                        names.merge_text((pq.read_metadata(path).metadata or {}).get(b"stabilitykit.names", b"{}"))


def _short(path: Path) -> str:
    return "/".join(path.parts[-3:])
