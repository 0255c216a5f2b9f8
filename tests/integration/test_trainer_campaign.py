import json
from pathlib import Path

import pytest

from trainers.cli import main

FLAGS = ["--runs", "2", "--healthy", "1", "--faults", "bad_image", "--jobs", "2"]


def test_a_campaign_ends_in_one_json_line_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = []
    for _ in range(2):
        assert main(["campaign", *FLAGS, "--out", str(tmp_path)]) == 0
        printed.append(json.loads(capsys.readouterr().out.splitlines()[-1]))

    assert printed[0] == printed[1]
    assert printed[0] | {"cpu_seconds": 0} == {
        "guards": "all",
        "runs": 2,
        "survived": 2,
        "kept_accuracy": 2,
        "detected": 2,
        "origin_correct": 2,
        "false_alarms": 0,
        "cpu_seconds": 0,
    }
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3


def test_a_fault_that_does_not_exist_is_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["campaign", "--faults", "typo", "--out", str(tmp_path)]) == 2
    assert "got 'typo', expected all, or a list of" in capsys.readouterr().err
