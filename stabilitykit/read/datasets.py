"""Arrow datasets of one table with one schema, from files and from memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds

from stabilitykit.record.columns import table_schema

UNREADABLE = (OSError, pa.ArrowException)
_FORMAT = ds.ParquetFileFormat(
    default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
)
_PARTITIONING = ds.partitioning(pa.schema([("rank", pa.int32())]), flavor="hive")


def full_schema(table: str) -> pa.Schema:
    """A table's columns and `rank`, which files have in their path."""
    return table_schema(table).append(pa.field("rank", pa.int32()))


def from_files(run_dir: Path, table: str, files: Iterable[Path]) -> ds.Dataset:
    """Parts of a table below `run_dir`."""
    return ds.dataset(
        [str(file) for file in files],
        schema=full_schema(table),
        format=_FORMAT,
        partitioning=_PARTITIONING,
        partition_base_dir=str(run_dir / table),  # a `rank=` further up is none of ours
    )


def from_memory(table: str, pieces: Iterable[tuple[int, pa.Table]]) -> ds.Dataset:
    """Rows that came from a log, each piece with its rank."""
    schema = full_schema(table)
    return ds.dataset(pa.concat_tables([_conform(rows, rank, schema) for rank, rows in pieces]), schema=schema)


def joined(table: str, children: Sequence[ds.Dataset]) -> ds.Dataset:
    """The rows of all children."""
    if not children:
        return ds.dataset(full_schema(table).empty_table())
    return children[0] if len(children) == 1 else ds.UnionDataset(full_schema(table), children)


def _conform(rows: pa.Table, rank: int, schema: pa.Schema) -> pa.Table:
    """`rows` with exactly the schema's columns: those an older log lacks are null, those of a newer one left out."""
    given = set(rows.schema.names)
    columns = [rows[name] if name in given else pa.nulls(len(rows), schema.field(name).type) for name in schema.names]
    columns[schema.names.index("rank")] = pa.repeat(pa.scalar(rank, pa.int32()), len(rows))
    return pa.table(columns, schema=schema)
