import json
import subprocess
import sys
from pathlib import Path

import pytest

from trainers.cli import main

COMMAND = [sys.executable, "-m", "trainers", "campaign", "--runs", "2", "--healthy", "1", "--faults", "bad_image"]


def test_a_campaign_ends_in_one_json_line_and_goes_on_where_it_was(tmp_path: Path) -> None:
    printed = []
    for _ in range(2):
        done = subprocess.run([*COMMAND, "--out", str(tmp_path)], capture_output=True, text=True, check=True)
        printed.append(json.loads(done.stdout.splitlines()[-1]))

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
