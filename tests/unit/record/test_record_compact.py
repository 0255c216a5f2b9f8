import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stabilitykit.read import open_run
from stabilitykit.record import Recorder
from stabilitykit.record.columns import table_schema
from stabilitykit.record.compact import compact, encode_part, main
from stabilitykit.record.folder import list_segments, part_path, segment_path
from stabilitykit.record.frame import FrameKind, encode_frame
from stabilitykit.schema import ROWS, TABLES, TENSOR_ROW, Event

Rows = np.ndarray


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def part_rows(run_dir: Path, table: str, number: int = 0) -> list[tuple[object, ...]]:
    part = pq.ParquetFile(part_path(run_dir, table, 0, number)).read()
    return [tuple(row.values()) for row in part.to_pylist()]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(
    counts=st.lists(st.sampled_from([*ROWS]).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, 9))), max_size=6)
)
def test_a_part_holds_the_rows_of_its_segment_bit_for_bit(
    run_dir: Path, random_rows: Callable[..., Rows], counts: list[tuple[str, int]]
) -> None:
    shutil.rmtree(run_dir, ignore_errors=True)
    recorder = Recorder(run_dir, attempt=1)
    written: dict[str, list[bytes]] = {table: [] for table in ROWS}
    for step, (table, count) in enumerate(counts):
        rows = random_rows(table, count, step)
        recorder.write(step, **{table: rows})
        written[table] += [step.to_bytes(8, "little") + row.tobytes() for row in rows]
    recorder.close()

    parts = compact(run_dir)

    assert list_segments(run_dir) == []
    assert {part.parts[-3] for part in parts} - {"rollup"} == {table for table in ROWS if written[table]}
    for part in parts:
        table = part.parts[-3]
        if table == "rollup":
            continue
        assert sorted(packed_rows(part, table)) == sorted(written[table])


def packed_rows(part: Path, table: str) -> list[bytes]:
    stored = pq.ParquetFile(part).read()
    assert set(stored["attempt"].to_pylist()) == {1}
    rows = np.empty(len(stored), ROWS[table])
    for name in ROWS[table].names or ():
        rows[name] = stored[name].to_numpy()
    steps = stored["step"].to_pylist()
    return [step.to_bytes(8, "little") + row.tobytes() for step, row in zip(steps, rows, strict=True)]


def test_tensors_are_stored_series_by_series(run_dir: Path) -> None:
    recorder = Recorder(run_dir)
    for step in range(3):
        rows = np.zeros(4, TENSOR_ROW)
        rows["tensor"], rows["role"] = [1, 0, 1, 0], [0, 1, 1, 0]
        recorder.write(step, tensors=rows)
    recorder.close()

    part = compact(run_dir)[0]

    stored = pq.ParquetFile(part).read()
    keys = list(zip(*(stored[name].to_pylist() for name in ("tensor", "role", "step")), strict=True))
    assert keys == sorted(keys)


def test_a_part_has_the_promised_columns_encodings_and_facts(run_dir: Path) -> None:
    recorder = Recorder(run_dir)
    number = recorder.tensor_id("head")
    recorder.write(5, tensors=np.zeros(300, TENSOR_ROW), events=[Event(kind="task", message="é", data={"task": 1})])
    recorder.close()

    compact(run_dir)

    part = pq.ParquetFile(part_path(run_dir, "tensors", 0, 0))
    group = part.metadata.row_group(0)
    columns = {group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)}
    assert "BYTE_STREAM_SPLIT" in columns["max"].encodings
    assert "DELTA_BINARY_PACKED" in columns["step"].encodings
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert part.schema_arrow.remove_metadata() == table_schema("tensors")
    assert part.metadata.metadata[b"stabilitykit.schema"] == b"1"
    assert f'"id": {number}, "name": "head"'.encode() in part.metadata.metadata[b"stabilitykit.names"]
    assert part_rows(run_dir, "events")[0][3:] == ("task", "info", "", "é", '{"task": 1}')


def test_only_sealed_segments_are_taken_unless_all_is_asked_for(run_dir: Path) -> None:
    recorder = Recorder(run_dir, segment_bytes=1)
    for step in range(3):
        recorder.write(step, steps=np.zeros(1, ROWS["steps"]))

    assert len(compact(run_dir)) == 2
    assert list_segments(run_dir) == [(0, 2)]
    assert compact(run_dir, include_open=True) == []  # its writer lives
    recorder._segment.close()  # as a kill would
    assert compact(run_dir) == []
    assert len(compact(run_dir, include_open=True)) == 1
    assert list_segments(run_dir) == []


def test_a_writer_goes_on_beside_the_compactor_with_numbers_of_its_own(run_dir: Path) -> None:
    recorder = Recorder(run_dir, segment_bytes=1)
    for step in range(4):
        assert recorder.write(step, steps=np.zeros(1, ROWS["steps"]))
        compact(run_dir, include_open=True)
    recorder.close()
    compact(run_dir)

    resumed = Recorder(run_dir, attempt=1)
    resumed.write(4, steps=np.zeros(1, ROWS["steps"]))
    resumed.close()
    compact(run_dir)

    assert [part_rows(run_dir, "steps", number)[0][:2] for number in range(5)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 4),
    ]


def test_compacting_again_does_nothing(run_dir: Path) -> None:
    recorder = Recorder(run_dir)
    recorder.write(0, steps=np.zeros(1, ROWS["steps"]))
    recorder.close()
    compact(run_dir)
    before = part_path(run_dir, "steps", 0, 0).stat()

    assert compact(run_dir, include_open=True) == []
    assert part_path(run_dir, "steps", 0, 0).stat() == before


def test_names_that_the_recorder_could_not_publish_are_kept(run_dir: Path) -> None:
    recorder = Recorder(run_dir)
    recorder.tensor_id("head")
    recorder.write(0, tensors=np.zeros(1, TENSOR_ROW))
    recorder.close()
    (run_dir / "tensors.json").unlink()

    compact(run_dir)

    assert '"name": "head"' in (run_dir / "tensors.json").read_text()


def test_on_a_full_disk_the_log_stays_and_the_command_says_so(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = Recorder(run_dir)
    recorder.write(0, steps=np.zeros(1, ROWS["steps"]))
    recorder.close()

    def no_room(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "write", no_room)
        assert main([str(run_dir)]) == 1

    assert "No space left on device; the log is unharmed" in capsys.readouterr().err
    assert list_segments(run_dir) == [(0, 0)]
    assert not any((run_dir / "tmp").iterdir())
    assert main([str(run_dir)]) == 0
    assert part_path(run_dir, "steps", 0, 0).exists()


def unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


def malformed(path: Path) -> None:
    frame = encode_frame(FrameKind.META, -1, 0, 0, [b'{"rows": {"steps": 7}}'])
    path.write_bytes(b"".join(frame) + path.read_bytes())


@pytest.mark.parametrize("spoil", [unreadable, malformed])
def test_a_segment_that_cannot_be_read_is_left_and_told_and_the_others_are_compacted(
    run_dir: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], None]
) -> None:
    recorder = Recorder(run_dir, segment_bytes=1)
    for step in range(3):
        recorder.write(step, steps=np.zeros(1, ROWS["steps"]))
    recorder.close()
    spoil(segment_path(run_dir, 0, 1))

    assert main([str(run_dir)]) == 1

    assert "1 of the segments of" in (told := capsys.readouterr().err)
    assert "segment-000001.log: [Errno" in told
    assert list_segments(run_dir) == [(0, 1)]
    run = open_run(run_dir)
    assert run.steps()["step"].tolist() == [0, 2]
    [sentence] = run.damage
    assert sentence.startswith("wal/rank=0/segment-000001.log cannot be read and was skipped")
    assert Recorder(run_dir, attempt=1).write(3)


def test_nothing_but_parquet_lies_in_the_tables_folders(run_dir: Path) -> None:
    recorder = Recorder(run_dir)
    recorder.write(0, events=[Event(kind="task", message="")], **{t: np.zeros(1, ROWS[t]) for t in ROWS})
    recorder.close()

    compact(run_dir)

    files = [file for table in TABLES for file in (run_dir / table).rglob("*") if file.is_file()]
    assert len(files) == len(TABLES)
    assert {file.suffix for file in files} == {".parquet"}


def test_a_damaged_segment_leaves_its_damage_in_the_events(run_dir: Path, small_log: bytes) -> None:
    path = run_dir / "wal/rank=0/segment-000000.log"
    path.write_bytes(small_log.replace(b"task 1", b"task 2"))

    compact(run_dir)

    [event] = part_rows(run_dir, "events")
    assert event[3] == "damaged_log"
    assert isinstance(event[6], str)
    assert "after step 0 and before step 2" in event[6]


def test_a_torn_segment_stays_locked_while_it_is_compacted(
    run_dir: Path, small_log: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_dir / "wal/rank=0/segment-000000.log"
    path.write_bytes(small_log[:-7])
    beside: list[list[Path]] = []
    real = encode_part

    def encode_beside_another(rows: pa.Table, facts: dict[str, str]) -> bytes:
        beside.append(compact(run_dir, include_open=True) if not beside else [])
        return real(rows, facts)

    monkeypatch.setattr("stabilitykit.record.compact.encode_part", encode_beside_another)

    parts = compact(run_dir, include_open=True)

    assert beside[0] == []
    assert len(parts) == len(beside) == 6


def test_pages_carry_checksums(run_dir: Path) -> None:
    recorder = Recorder(run_dir)
    rows = np.zeros(1000, TENSOR_ROW)
    rows["max"] = np.random.default_rng(0).random(1000)
    recorder.write(0, tensors=rows)
    recorder.close()
    part = compact(run_dir)[0]
    content = bytearray(part.read_bytes())

    content[len(content) // 4] ^= 1

    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(pa.BufferReader(bytes(content)), page_checksum_verification=True).read()
