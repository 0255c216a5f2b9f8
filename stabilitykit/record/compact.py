"""Sealed segments into parquet parts: `python -m stabilitykit.record.compact RUN [--all]`, in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stabilitykit.errors import RunFolderError
from stabilitykit.record.columns import STORED_TABLES, log_table
from stabilitykit.record.folder import list_segments, names_path, part_path, replace_file, segment_path, sync_folder
from stabilitykit.record.footer import FOOTER_KEY, UNSTAMPED, stamp_footer
from stabilitykit.record.names import Names, load_names
from stabilitykit.record.scan import STORAGE_ORDER, SegmentLog, read_descriptor
from stabilitykit.record.segment import take_lock
from stabilitykit.schema import SCHEMA_VERSION

ROW_GROUP_ROWS = 16_384  # one series of 10 M rows in 40 ms; of 131,072 it takes 230 ms and saves 3 % of the bytes
_DELTA = frozenset({"step", "order", "zeros"})  # differ by little from row to row


def compact(run_dir: Path, *, include_open: bool = False) -> list[Path]:
    """Turn a run's segments into parts and remove them, one after the other.

    It may be killed anywhere and run again: a part is moved into place whole, a segment goes when all its parts are
    durable, and readers take from a segment only what has no part yet. A segment that cannot be compacted is left as
    it was, and the others are.

    Args:
        run_dir: the run folder.
        include_open: also segments that a killed writer left unsealed; a living writer's is never touched.

    Returns:
        The new parts.

    Raises:
        RunFolderError: segments could not be read, or parts not written; it is raised when all others are done.
    """
    parts: list[Path] = []
    failures: list[str] = []
    for rank, number in list_segments(run_dir):
        try:
            parts += _compact_segment(run_dir, rank, number, include_open)
        except (OSError, pa.ArrowException) as error:
            path = segment_path(run_dir, rank, number)
            if os.path.lexists(path):  # else another compactor was faster
                failures.append(f"{path.name}: {error}")
    if failures:
        raise RunFolderError(
            f"compact: {len(failures)} of the segments of {run_dir} cannot become parts: {', '.join(failures)}; "
            "the log is unharmed and can be read; see to the cause and run this again"
        )
    return parts


def _compact_segment(run_dir: Path, rank: int, number: int, include_open: bool) -> list[Path]:
    path = segment_path(run_dir, rank, number)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        locked = take_lock(descriptor)
        if locked is False:
            return []
        log = read_descriptor(descriptor, path, is_growing=lambda: False)
        if not (log.sealed or (include_open and locked)):
            return []
        parts = [written for table in STORED_TABLES if (written := _write_part(run_dir, table, rank, number, log))]
        _keep_names(run_dir, rank, log)
        os.unlink(path)  # noqa: PTH108 - one seam of `os` calls that the fault tests can cut
        sync_folder(path.parent)
        return parts
    finally:
        os.close(descriptor)


def _write_part(run_dir: Path, table: str, rank: int, number: int, log: SegmentLog) -> Path | None:
    """The part of one table, None where there is nothing to write or it was written before a kill."""
    path = part_path(run_dir, table, rank, number)
    if path.exists():
        return None
    rows = log_table(log, table)
    if rows is None:
        return None
    facts: dict[str, object] = {"schema": SCHEMA_VERSION, "rank": rank, "segment": number, "last_step": log.last_step}
    if table in ("tensors", "scalars"):  # should the names file ever be lost
        facts["names"] = json.dumps({table: log.names.table()[table]})
    metadata = {f"stabilitykit.{name}": str(fact) for name, fact in facts.items()}
    replace_file(run_dir, path, encode_part(rows, metadata))
    return path


def encode_part(rows: pa.Table, facts: Mapping[str, str]) -> bytes:
    """A table as a parquet file: byte-stream-split floats, deltas, dictionaries elsewhere, zstd, page checksums."""
    types = {field.name: field.type for field in rows.schema}
    encodings = {name: "BYTE_STREAM_SPLIT" for name, kind in types.items() if pa.types.is_floating(kind)}
    encodings |= {name: "DELTA_BINARY_PACKED" for name in types if name in _DELTA}
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        rows.schema,
        compression="zstd",
        compression_level=1,
        use_dictionary=[name for name in types if name not in encodings],
        column_encoding=encodings,
        sorting_columns=pq.SortingColumn.from_ordering(rows.schema, _storage_order(rows.schema.names)),
        store_schema=False,  # it would say the facts a second time; plain parquet types are enough
        write_page_checksum=True,
        write_page_index=True,
    ) as writer:
        writer.write_table(rows, row_group_size=ROW_GROUP_ROWS)
        writer.add_key_value_metadata({**facts, FOOTER_KEY: UNSTAMPED})
    return stamp_footer(bytes(sink.getvalue()))


def _storage_order(names: Sequence[str]) -> list[str]:
    return [name for name in STORAGE_ORDER if name in names]


def _keep_names(run_dir: Path, rank: int, log: SegmentLog) -> None:
    """See to it that names outlive the log: usually the recorder has written them long ago."""
    path = names_path(run_dir, rank)
    names = Names()
    readable = load_names(path, names)
    known = len(names)
    names.merge(log.names.table())
    if not readable or len(names) > known:
        replace_file(run_dir, path, json.dumps(names.table()).encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 0 when all is done, 1 when segments had to be left."""
    parser = argparse.ArgumentParser(prog="python -m stabilitykit.record.compact", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--all", action="store_true", help="also segments a killed writer left open")
    options = parser.parse_args(arguments)
    try:
        compact(options.run, include_open=options.all)
    except RunFolderError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
