import os
import random
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from stabilitykit.read import Run, open_run
from stabilitykit.record import Recorder
from stabilitykit.record.compact import compact
from stabilitykit.record.folder import part_path

Write = Callable[..., None]


def test_unreadable_json_is_told_and_the_rest_is_read(run_dir: Path, write_steps: Write) -> None:
    write_steps(Recorder(run_dir), range(2))
    for file in ("run.json", "ending.json", "diagnosis.json"):
        (run_dir / file).write_text('{"cut')

    run = open_run(run_dir)

    assert (run.meta, run.ending, run.diagnosis) == ({}, "killed", None)
    assert [sentence.split()[0] for sentence in run.damage] == ["run.json", "ending.json", "diagnosis.json"]
    assert len(run.steps()) == 2


def test_a_torn_tail_is_told_once_the_writer_is_gone(run_dir: Path, write_steps: Write) -> None:
    recorder = Recorder(run_dir)
    write_steps(recorder, range(3))
    path = run_dir / "wal/rank=0/segment-000000.log"
    os.truncate(path, path.stat().st_size - 5)

    growing = open_run(run_dir)
    assert growing.damage == []
    assert growing.steps()["step"].tolist() == [0, 1]
    recorder._segment.close()  # as a kill would
    killed = open_run(run_dir)

    [sentence] = killed.damage
    assert sentence.startswith("wal/rank=0/segment-000000.log: a torn tail of ")
    assert sentence.endswith("after step 1 was cut")
    pd.testing.assert_frame_equal(killed.steps(), growing.steps())


def test_lost_writes_are_told(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(run_dir)

    def no_room(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "writev", no_room)
        with pytest.warns(RuntimeWarning, match="No space left"):
            recorder.write(3)
    recorder.write(4)

    assert open_run(run_dir).damage == ["writes lost at step 3: 1, [Errno 28] No space left on device"]


def test_damage_reads_the_same_from_the_log_and_from_the_parts(run_dir: Path, write_steps: Write) -> None:
    recorder = Recorder(run_dir)
    write_steps(recorder, range(6))
    recorder.close()
    path = run_dir / "wal/rank=0/segment-000000.log"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    before = open_run(run_dir)
    view = before.steps(), before.tensors(), before.events(), before.damage

    compact(run_dir)

    after = open_run(run_dir)
    for mine, yours in zip(view, (after.steps(), after.tensors(), after.events()), strict=False):
        pd.testing.assert_frame_equal(mine, yours)
    assert after.damage == view[3]
    assert len(after.steps()) == 5


def test_whatever_bit_of_a_part_flips_rows_are_exact_or_absent_and_the_loss_is_told(
    run_dir: Path, write_steps: Write
) -> None:
    recorder = Recorder(run_dir)
    write_steps(recorder, range(20))
    recorder.close()
    compact(run_dir)
    path = part_path(run_dir, "tensors", 0, 0)
    content, whole = path.read_bytes(), rows_of(open_run(run_dir))
    noise = random.Random(0)

    for _ in range(150):
        damaged = bytearray(content)
        damaged[noise.randrange(len(content))] ^= 1 << noise.randrange(8)
        path.write_bytes(damaged)
        run = open_run(run_dir)

        left = rows_of(run)
        assert left <= whole
        assert left == whole or run.damage
        assert len(run.steps()) == 20


def rows_of(run: Run) -> set[tuple[str, ...]]:
    return set(run.tensors().astype(str).itertuples(index=False, name=None))


def test_a_damaged_row_group_leaves_the_others_readable(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, write_steps: Write
) -> None:
    monkeypatch.setattr("stabilitykit.record.compact.ROW_GROUP_ROWS", 10)
    recorder = Recorder(run_dir)
    write_steps(recorder, range(20))
    recorder.close()
    compact(run_dir)
    path = part_path(run_dir, "tensors", 0, 0)
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)

    run = open_run(run_dir)

    assert len(run.tensors()) == 70
    [sentence] = run.damage
    assert sentence.startswith("tensors/rank=0/part-000000.parquet: row group 0 is damaged and was skipped")


def test_an_empty_or_foreign_part_is_told_and_skipped(run_dir: Path, write_steps: Write) -> None:
    write_steps(Recorder(run_dir), range(2))
    for number, content in ((7, b""), (8, b"not parquet at all")):
        path = part_path(run_dir, "steps", 0, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    run = open_run(run_dir)

    assert len(run.steps()) == 2
    assert [sentence.split()[0] for sentence in run.damage] == [
        "steps/rank=0/part-000007.parquet",
        "steps/rank=0/part-000008.parquet",
    ]


def test_a_segment_that_is_a_dangling_link_is_passed_over(run_dir: Path, write_steps: Write) -> None:
    write_steps(Recorder(run_dir), range(2))
    (run_dir / "wal/rank=0/segment-000009.log").symlink_to(run_dir / "nowhere")

    assert len(open_run(run_dir).steps()) == 2


def test_a_segment_that_cannot_be_read_is_told_and_skipped(run_dir: Path, write_steps: Write) -> None:
    write_steps(Recorder(run_dir), range(2))
    (run_dir / "wal/rank=0/segment-000009.log").mkdir()

    run = open_run(run_dir)

    assert len(run.steps()) == 2
    assert run.damage[0].startswith("wal/rank=0/segment-000009.log cannot be read and was skipped")
