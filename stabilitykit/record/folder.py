"""Where a run folder keeps what, and how one of its files is replaced in one move."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from stabilitykit.schema import TABLES

_SEGMENT = re.compile(r"segment-(\d{6,})\.log")
_PART = re.compile(r"part-(\d{6,})\.parquet")
_DIAGNOSIS = re.compile(r"diagnosis(?:-(\d{4,}))?\.json")
_RANK = re.compile(r"rank=(\d+)")


def wal_folder(run_dir: Path, rank: int) -> Path:
    """Folder of a rank's log."""
    return run_dir / "wal" / f"rank={rank}"


def segment_path(run_dir: Path, rank: int, number: int) -> Path:
    """A segment of a rank's log."""
    return wal_folder(run_dir, rank) / f"segment-{number:06d}.log"


def part_path(run_dir: Path, table: str, rank: int, number: int) -> Path:
    """What the segment of the same number becomes, for one table."""
    return run_dir / table / f"rank={rank}" / f"part-{number:06d}.parquet"


def names_path(run_dir: Path, rank: int) -> Path:
    """Names behind a rank's ids; each rank numbers its own tensors."""
    return run_dir / ("tensors.json" if rank == 0 else f"tensors-rank={rank}.json")


def list_segments(run_dir: Path) -> list[tuple[int, int]]:
    """(rank, number) of every segment, in order."""
    return sorted(_list_numbered(run_dir / "wal", _SEGMENT))


def list_parts(run_dir: Path, table: str) -> list[tuple[int, int]]:
    """(rank, number) of every part of a table, in order."""
    return sorted(_list_numbered(run_dir / table, _PART))


def next_number(run_dir: Path, rank: int) -> int:
    """A segment number the rank has never used, whether as a segment or as a part."""
    used = [*list_segments(run_dir), *(entry for table in TABLES for entry in list_parts(run_dir, table))]
    return 1 + max((number for owner, number in used if owner == rank), default=-1)


def last_diagnosis(run_dir: Path) -> int:
    """The highest number of a diagnosis in the folder, 1 for `diagnosis.json`, 0 where there is none."""
    found = (_DIAGNOSIS.fullmatch(file.name) for file in run_dir.glob("diagnosis*.json"))
    return max((int(match[1] or 1) for match in found if match), default=0)


def replace_file(run_dir: Path, path: Path, content: bytes, *, durable: bool = True) -> None:
    """Make `content` the content of `path` in one move: a reader sees the old file or the new one.

    The temporary file lies in `RUN/tmp`: a stray file in a table's folder would break readers of whole folders.

    Raises:
        OSError: it could not be written; `path` is as it was.
    """
    temporary = run_dir / "tmp" / f"{'.'.join(path.relative_to(run_dir).parts)}.{os.getpid()}"
    temporary.parent.mkdir(exist_ok=True)  # not the run folder: whoever deleted it meant it
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write_all(temporary, content, durable)
        os.replace(temporary, path)  # noqa: PTH105 - one seam of `os` calls that the fault tests can cut
    except OSError:
        with suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108
        raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(path: Path, content: bytes, durable: bool) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        remaining = memoryview(content)
        while remaining:
            remaining = remaining[os.write(descriptor, remaining) :]
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _list_numbered(folder: Path, pattern: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    with suppress(FileNotFoundError, NotADirectoryError):
        for rank_folder in folder.iterdir():
            if rank := _RANK.fullmatch(rank_folder.name):
                with suppress(FileNotFoundError, NotADirectoryError):
                    for file in rank_folder.iterdir():
                        if match := pattern.fullmatch(file.name):
                            yield int(rank[1]), int(match[1])
