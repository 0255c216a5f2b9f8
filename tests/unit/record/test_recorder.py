import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stabilitykit.record import Recorder
from stabilitykit.record.folder import list_segments, segment_path
from stabilitykit.record.scan import SegmentLog, decode_log, read_segment
from stabilitykit.record.segment import is_live
from stabilitykit.schema import ROWS, SCHEMA_VERSION, TENSOR_ROW, Event

Rows = np.ndarray
SAME_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
WRITES = st.lists(
    st.fixed_dictionaries(
        {"step": st.integers(-5, 2**40), "events": st.lists(st.text(), max_size=2)},
        optional={table: st.integers(0, 3) for table in ROWS},
    ),
    max_size=8,
)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def logs(run_dir: Path) -> list[SegmentLog]:
    return [read_segment(segment_path(run_dir, *key)) for key in list_segments(run_dir)]


def recorded_steps(run_dir: Path, table: str = "steps") -> list[int]:
    return [step for log in logs(run_dir) if table in log.tables for step in log.tables[table].step.tolist()]


def events(run_dir: Path) -> list[Event]:
    return [entry.event for log in logs(run_dir) for entry in log.events]


def no_room(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@SAME_FOLDER
@given(writes=WRITES, segment_bytes=st.sampled_from([1, 3000, 48 << 20]))
def test_any_rows_in_any_order_come_back_bit_for_bit(
    run_dir: Path, random_rows: Callable[..., Rows], writes: list[dict[str, Any]], segment_bytes: int
) -> None:
    shutil.rmtree(run_dir, ignore_errors=True)
    recorder = Recorder(run_dir, attempt=3, segment_bytes=segment_bytes)
    expected: dict[str, list[tuple[int, bytes]]] = {table: [] for table in ROWS}
    for number, write in enumerate(writes):
        rows = {table: random_rows(table, write[table], number) for table in ROWS if table in write}
        for table in rows:
            expected[table] += [(write["step"], row.tobytes()) for row in rows[table]]
        told = [Event(kind="note", message=text, wall_time=1.0) for text in write["events"]]

        assert recorder.write(write["step"], events=told, **rows)
    recorder.close()

    found = logs(run_dir)
    for table in ROWS:
        tables = [log.tables[table] for log in found if table in log.tables]
        assert expected[table] == [
            (step, row.tobytes()) for rows in tables for step, row in zip(rows.step.tolist(), rows.rows, strict=True)
        ]
        assert all((rows.attempt == 3).all() for rows in tables)
    assert [event.message for event in events(run_dir)] == [text for write in writes for text in write["events"]]
    assert all(log.sealed for log in found)


def test_a_strided_view_is_written_as_it_reads(run_dir: Path, random_rows: Callable[..., Rows]) -> None:
    rows = random_rows("tensors", 10)

    Recorder(run_dir).write(0, tensors=rows[::3])

    assert logs(run_dir)[0].tables["tensors"].rows.tobytes() == rows[::3].tobytes()


def test_an_event_keeps_facts_that_json_does_not_know(run_dir: Path) -> None:
    odd = Event(kind="guard", message="\udcff.py", data={"norm": float("inf"), "shape": (2, 3), "type": np.float32(1)})

    assert Recorder(run_dir).write(4, events=[odd])

    [event] = events(run_dir)
    assert event.message == "\\udcff.py"
    assert event.data == {"norm": "inf", "shape": [2, 3], "type": 1.0}
    assert event.wall_time > 0


def test_a_segment_is_sealed_when_full_and_the_next_one_repeats_the_names(run_dir: Path) -> None:
    recorder = Recorder(run_dir, segment_bytes=10_000)
    recorder.tensor_id("head", kind="module", dtype="float32", shape=(2, 3))

    for step in range(30):
        recorder.write(step, tensors=np.zeros(10, TENSOR_ROW))

    found = logs(run_dir)
    assert recorder.num_sealed == len(found) - 1 > 2
    assert [log.sealed for log in found] == [True] * (len(found) - 1) + [False]
    assert all(log.names.tensors[0]["name"] == "head" for log in found)
    assert all(path.stat().st_size < 11_000 for path in (run_dir / "wal/rank=0").iterdir())


def test_the_same_name_and_kind_have_one_id_also_in_later_attempts(run_dir: Path) -> None:
    first = Recorder(run_dir)
    ids = [first.tensor_id(name, kind=kind) for name, kind in [("a", "module"), ("a", "parameter"), ("b", "module")]]
    loss = first.scalar_id("loss")
    first.write(0)

    second = Recorder(run_dir, attempt=1)

    assert ids == [0, 1, 2]
    assert first.tensor_id("a", kind="module") == second.tensor_id("a", kind="module") == 0
    assert second.tensor_id("b", kind="module") == 2
    assert second.scalar_id("loss") == loss
    assert second.tensor_id("new") not in ids


def test_ids_survive_the_loss_of_the_names_file(run_dir: Path) -> None:
    first = Recorder(run_dir)
    first.tensor_id("a")
    number = first.tensor_id("b")
    first.write(0)
    first.close()
    (run_dir / "tensors.json").write_text("{")

    assert Recorder(run_dir, attempt=1).tensor_id("b") == number


def test_two_writers_on_one_folder_never_give_one_id_to_two_names(run_dir: Path) -> None:
    first = Recorder(run_dir)
    first.write(0)
    second = Recorder(run_dir)

    assert first.tensor_id("mine") != second.tensor_id("yours")
    assert first.write(1)
    assert second.write(1)
    assert len(list_segments(run_dir)) == 2


def test_names_are_published_as_a_file_that_is_replaced_whole(run_dir: Path) -> None:
    recorder = Recorder(run_dir)
    recorder.tensor_id("w", kind="parameter", dtype="float16", shape=(3,))
    recorder.scalar_id("loss/ce")

    recorder.write(0)

    assert json.loads((run_dir / "tensors.json").read_text()) == {
        "tensors": [{"id": 0, "name": "w", "dtype": "float16", "shape": [3], "kind": "parameter"}],
        "scalars": [{"id": 0, "name": "loss/ce"}],
    }
    assert not any((run_dir / "tmp").iterdir())


def test_a_log_says_its_own_row_layout_so_that_columns_can_be_added_later(small_log: bytes) -> None:
    start = small_log.index(b'{"schema_version"')
    body, _ = json.JSONDecoder().raw_decode(small_log[start:].decode("latin-1"))

    assert body["schema_version"] == SCHEMA_VERSION
    assert [tuple(column) for column in body["rows"]["tensors"]] == TENSOR_ROW.descr


def test_rows_of_a_wrong_dtype_are_refused_with_a_warning_and_the_rest_goes_on(run_dir: Path) -> None:
    recorder = Recorder(run_dir)

    with pytest.warns(RuntimeWarning, match=r"expected schema.ROWS\['steps'\]"):
        assert not recorder.write(0, steps=np.zeros(1, TENSOR_ROW))

    assert recorder.write(1, steps=np.zeros(1, ROWS["steps"]))
    assert recorded_steps(run_dir) == [1]


@pytest.mark.parametrize(
    "outcomes", ["ok short ok", "ok error error ok ok", "short ok", "ok stuck ok", "stuck error ok"]
)
def test_on_a_full_disk_exactly_the_acknowledged_steps_are_there(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, outcomes: str
) -> None:
    check_faulty_writes(run_dir, monkeypatch, outcomes.split())


@SAME_FOLDER
@given(outcomes=st.lists(st.sampled_from(["ok", "short", "error", "stuck"]), max_size=12))
def test_however_writes_fail_exactly_the_acknowledged_steps_are_there(run_dir: Path, outcomes: list[str]) -> None:
    shutil.rmtree(run_dir, ignore_errors=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_faulty_writes(run_dir, monkeypatch, outcomes)


def check_faulty_writes(run_dir: Path, monkeypatch: pytest.MonkeyPatch, outcomes: list[str]) -> None:
    """Each write meets an outcome: `short` writes half, `stuck` half that cannot be cut off again either."""
    real_writev, real_ftruncate = os.writev, os.ftruncate
    fate: Iterator[str] = iter(outcomes)

    def writev(descriptor: int, buffers: Sequence[Any]) -> int:
        outcome = next(fate, "ok")
        if outcome == "error":
            return no_room()
        if outcome == "ok":
            return real_writev(descriptor, buffers)
        if outcome == "stuck":
            monkeypatch.setattr(os, "ftruncate", no_room)
        content = b"".join(bytes(buffer) for buffer in buffers)
        return os.write(descriptor, content[: len(content) // 2])

    monkeypatch.setattr(os, "writev", writev)
    recorder = Recorder(run_dir)
    recorder.tensor_id("head")
    acknowledged = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(len(outcomes)):
            if recorder.write(step, steps=np.zeros(1, ROWS["steps"])):
                acknowledged.append(step)
            monkeypatch.setattr(os, "ftruncate", real_ftruncate)

    lost = sum(outcome != "ok" for outcome in outcomes)
    assert recorded_steps(run_dir) == acknowledged == [n for n, outcome in enumerate(outcomes) if outcome == "ok"]
    assert recorder.lost_frames == lost
    recorder.close()
    assert sum(event.data["frames"] for event in events(run_dir) if event.kind == "lost_rows") == lost


def test_after_a_torn_write_that_cannot_be_cut_off_a_new_segment_is_begun(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_faulty_writes(run_dir, monkeypatch, ["ok", "stuck", "ok", "ok"])

    assert [len(log.tables["steps"].rows) for log in logs(run_dir)] == [1, 2]


def test_a_recorder_that_nobody_closed_gives_its_lock_back(run_dir: Path) -> None:
    recorder = Recorder(run_dir)
    recorder.write(0, steps=np.zeros(1, ROWS["steps"]))
    with (run_dir / "wal/rank=0/segment-000000.log").open("rb") as file:
        assert is_live(file.fileno())

        del recorder

        assert not is_live(file.fileno())


def test_the_first_loss_warns_and_the_others_do_not(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(run_dir)
    monkeypatch.setattr(os, "writev", no_room)

    with pytest.warns(RuntimeWarning, match="No space left") as warned:
        assert [recorder.write(step) for step in range(3)] == [False] * 3

    assert len(warned) == 1
    assert recorder.lost_frames == 3


def test_a_loss_is_itself_recorded_once_there_is_room_again(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(run_dir)
    with monkeypatch.context() as full:
        full.setattr(os, "writev", no_room)
        with pytest.warns(RuntimeWarning, match="No space left"):
            recorder.write(7)
        recorder.write(8)

    recorder.write(9)
    recorder.write(10)

    [event] = events(run_dir)
    assert (event.kind, event.data["frames"]) == ("lost_rows", 2)
    assert "steps 7 to 8" in event.message


def test_a_warning_that_is_an_error_does_not_reach_training(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "writev", no_room)

    with warnings.catch_warnings():
        warnings.simplefilter("error")

        assert not Recorder(run_dir).write(0)


def test_a_folder_that_cannot_be_made_costs_the_rows_only(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    recorder = Recorder(tmp_path / "file" / "run")
    recorder.tensor_id("head")

    with pytest.warns(RuntimeWarning, match="lost"):
        assert not recorder.write(0)
    recorder.close()

    assert recorder.lost_frames == 1


def test_a_read_only_folder_costs_the_rows_until_it_is_writable(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(run_dir)
    recorder.tensor_id("head")

    def read_only(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as locked:
        locked.setattr(os, "open", read_only)
        with pytest.warns(RuntimeWarning, match="Read-only"):
            assert not recorder.write(0)

    assert recorder.write(1, steps=np.zeros(1, ROWS["steps"]))
    assert recorded_steps(run_dir) == [1]


@pytest.mark.parametrize(("segment_bytes", "sync_seconds"), [(1, 3600), (48 << 20, 0)])
def test_a_deleted_run_folder_is_noticed_and_not_brought_back(
    run_dir: Path, segment_bytes: int, sync_seconds: float
) -> None:
    recorder = Recorder(run_dir, segment_bytes=segment_bytes, sync_seconds=sync_seconds)
    assert recorder.write(0)
    shutil.rmtree(run_dir)

    with pytest.warns(RuntimeWarning, match="deleted|gone"):
        acknowledged = [recorder.write(step) for step in (1, 2)]
    recorder.tensor_id("late")
    recorder.close()

    assert acknowledged == [False, False]
    assert not run_dir.exists()


def test_a_deleted_log_is_noticed_at_the_next_sync_and_a_new_one_is_begun(run_dir: Path) -> None:
    recorder = Recorder(run_dir, sync_seconds=3600)
    assert recorder.write(0, steps=np.zeros(1, ROWS["steps"]))
    (run_dir / "wal/rank=0/segment-000000.log").unlink()
    assert recorder.write(1, steps=np.zeros(1, ROWS["steps"]))

    with pytest.warns(RuntimeWarning, match="deleted"):
        assert not recorder.write(2, events=[Event(kind="nonfinite", message="", severity="error")])  # which syncs

    assert recorder.write(3, steps=np.zeros(1, ROWS["steps"]))
    assert recorded_steps(run_dir) == [3]
    [event] = events(run_dir)
    assert event.kind == "lost_rows"
    assert "the log has been deleted, with the 5 frames it held" in event.message


def test_a_script_that_changes_its_directory_changes_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir.mkdir()
    monkeypatch.chdir(run_dir.parent)
    recorder = Recorder(Path(run_dir.name), segment_bytes=1)
    recorder.write(0, steps=np.zeros(1, ROWS["steps"]))

    monkeypatch.chdir("/")

    assert recorder.write(1, steps=np.zeros(1, ROWS["steps"]))
    assert recorded_steps(run_dir) == [0, 1]


def test_a_failing_sync_warns_and_loses_no_acknowledged_step(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(run_dir, sync_seconds=0)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", no_room)
        with pytest.warns(RuntimeWarning, match="power cut"):
            assert recorder.write(0, steps=np.zeros(1, ROWS["steps"]))

    assert recorder.write(1, steps=np.zeros(1, ROWS["steps"]))

    assert recorded_steps(run_dir) == [0, 1]
    assert len(list_segments(run_dir)) == 2


def test_an_error_event_is_synced_at_once_and_other_writes_are_not(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    recorder = Recorder(run_dir, sync_seconds=3600)

    recorder.write(0, events=[Event(kind="task", message="")])
    before = len(synced)
    recorder.write(1, events=[Event(kind="nonfinite", message="", severity="error")])

    assert (before, len(synced)) == (0, 1)


def test_an_unwritable_names_file_is_retried_and_costs_no_step(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(run_dir)
    recorder.tensor_id("head")
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", no_room)
        assert recorder.write(0)
    assert not (run_dir / "tensors.json").exists()

    recorder.close()

    assert json.loads((run_dir / "tensors.json").read_text())["tensors"][0]["name"] == "head"


def test_after_close_nothing_is_written_and_close_may_be_repeated(run_dir: Path) -> None:
    recorder = Recorder(run_dir)
    recorder.write(0)
    recorder.close()
    size = (run_dir / "wal/rank=0/segment-000000.log").stat().st_size

    recorder.close()

    assert not recorder.write(1)
    assert (run_dir / "wal/rank=0/segment-000000.log").stat().st_size == size


def test_a_log_cut_anywhere_gives_a_prefix_of_its_rows_and_says_so(small_log: bytes) -> None:
    whole = contents(decode_log(small_log, "log", 0.0))

    for size in range(len(small_log)):
        log = decode_log(small_log[:size], "log", 0.0)

        assert all(whole[table][: len(rows)] == rows for table, rows in contents(log).items())
        assert not log.sealed
        assert [entry.event.kind for entry in log.events if entry.event.kind != "task"] in ([], ["damaged_log"])


def test_whatever_bit_flips_rows_are_exact_or_absent_and_the_damage_is_told(small_log: bytes) -> None:
    whole = contents(decode_log(small_log, "log", 0.0))

    for bit in range(len(small_log) * 8):
        damaged = bytearray(small_log)
        damaged[bit // 8] ^= 1 << bit % 8
        log = decode_log(bytes(damaged), "log", 0.0)

        left = contents(log)
        assert all(set(rows) <= set(whole[table]) for table, rows in left.items())
        assert len({step for table in whole for step, _ in set(whole[table]) - set(left.get(table, []))}) <= 1
        assert log.names.tensors[0]["name"] == "block.0"  # said twice
        assert [entry.event.kind for entry in log.events].count("damaged_log") == 1


def contents(log: SegmentLog) -> dict[str, list[tuple[int, bytes]]]:
    rows = {
        table: [(step, row.tobytes()) for step, row in zip(found.step.tolist(), found.rows, strict=True)]
        for table, found in log.tables.items()
    }
    told = [(entry.step, repr(entry.event).encode()) for entry in log.events if entry.event.kind != "damaged_log"]
    return rows | ({"events": told} if told else {})


def test_damage_names_the_steps_around_it(small_log: bytes) -> None:
    frame = small_log.index(b"task 1")

    log = decode_log(small_log[:frame] + b"T" + small_log[frame + 1 :], "segment-000000.log", 0.0)

    [entry] = log.events
    assert entry.event.message.startswith("segment-000000.log: damaged frames: 1 (")
    assert "after step 0 and before step 2" in entry.event.message
