from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stabilitykit.errors import UnreadableRunError
from stabilitykit.read import open_run
from stabilitykit.record.ending import this_process, write_ending
from stabilitykit.schema import (
    Diagnosis,
    Origin,
)

Write = Callable[..., None]


def test_a_path_that_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UnreadableRunError, match="expected a run folder; check the path"):
            open_run(path)


def test_a_newer_major_schema_is_refused_with_what_to_do(run_dir: Path, write_meta: Write) -> None:
    write_meta(schema_version=2)

    with pytest.raises(UnreadableRunError, match="schema version 2, expected at most 1; update stabilitykit"):
        open_run(run_dir)


@pytest.mark.parametrize("ending", ["completed", "raised"])
def test_an_ending_file_says_how_it_ended(run_dir: Path, ending: Any, write_meta: Write) -> None:
    write_meta(attempts=[{"attempt": 0} | this_process()])
    write_ending(run_dir, ending, 41, "boom")

    run = open_run(run_dir)

    assert run.ending == ending
    assert (run.ending_facts["step"], run.ending_facts["error"]) == (41, "boom")


def test_without_an_ending_the_same_living_process_means_running(run_dir: Path, write_meta: Write) -> None:
    write_meta(attempts=[{"attempt": 0} | this_process()])

    assert open_run(run_dir).ending == "running"
    assert open_run(run_dir).ending_facts == {}


@pytest.mark.parametrize(
    "change", [{"process_start": "1"}, {"machine": "elsewhere"}, {"pid": 2**22 + 1}, {"pid": None}]
)
def test_without_an_ending_another_process_or_machine_means_killed(
    run_dir: Path, change: dict[str, Any], write_meta: Write
) -> None:
    write_meta(attempts=[{"attempt": 0} | this_process() | change])

    assert open_run(run_dir).ending == "killed"


def test_the_ending_of_an_earlier_attempt_is_not_taken_for_the_last_one(run_dir: Path, write_meta: Write) -> None:
    write_meta(attempts=[{"attempt": 0, "pid": 1}, {"attempt": 1} | this_process()])
    write_ending(run_dir, "raised", 41, attempt=0)

    assert open_run(run_dir).ending == "running"


def test_diagnoses_are_read_oldest_first(run_dir: Path, write_meta: Write) -> None:
    write_meta()
    for number, file in enumerate(["diagnosis.json", "diagnosis-0002.json", "diagnosis-0010.json"]):
        diagnosis = Diagnosis(origin=Origin(step=number, phase="forward", kind="nan"))
        (run_dir / file).write_text(diagnosis.to_json())

    run = open_run(run_dir)

    assert [diagnosis.origin.step for diagnosis in run.diagnoses] == [0, 1, 2]
    assert run.diagnosis == run.diagnoses[0]
