"""A run folder belongs to one process at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stabilitykit as sk
from stabilitykit.monitor import runfile
from stabilitykit.record.ending import machine_id, process_start, write_ending

QUIET = sk.MonitorConfig(report=False, compact=False)


def test_of_two_that_find_a_folder_new_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, late = runfile._facts, []

    def meanwhile(*arguments: Any) -> dict[str, Any]:
        with pytest.raises(
            sk.RunFolderError, match=r"another process is attaching to it.*choose another run_dir"
        ) as why:
            runfile.RunFile.open(*arguments)
        late.append(why.value)
        return facts(*arguments)

    monkeypatch.setattr(runfile, "_facts", meanwhile)

    sk.attach(nn.Linear(2, 2), None, tmp_path / "run", config=QUIET).close()

    assert len(late) == 1
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())["attempts"]) == 1
    assert not any((tmp_path / "run" / "tmp").iterdir())


def test_a_run_whose_process_is_at_it_is_not_gone_on_with_until_it_has_ended(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    sk.attach(nn.Linear(2, 2), None, run_dir, config=QUIET).close()
    resumed = QUIET.replace(resume=True)

    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]) as process:
        facts = json.loads((run_dir / "run.json").read_text())
        other = {"pid": process.pid, "process_start": process_start(process.pid), "machine": machine_id()}
        facts["attempts"].append({"attempt": 1} | other)
        (run_dir / "run.json").write_text(json.dumps(facts))
        with pytest.raises(sk.RunFolderError, match=f"process {process.pid} still records into it"):
            sk.attach(nn.Linear(2, 2), None, run_dir, config=resumed)

        write_ending(run_dir, "completed", 0, attempt=1)
        sk.attach(nn.Linear(2, 2), None, run_dir, config=resumed).close()
        process.kill()

    assert len(json.loads((run_dir / "run.json").read_text())["attempts"]) == 3


def test_a_killed_run_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    dead = {"attempt": 0, "pid": 2**22 + 1, "process_start": "1", "machine": machine_id()}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"attempts": [dead]}))

    sk.attach(nn.Linear(2, 2), None, tmp_path / "run", config=QUIET.replace(resume=True)).close()

    assert sk.open_run(tmp_path / "run").ending == "completed"


@pytest.mark.parametrize("content", ["[]", '{"attempts": 3}', '{"attempts": [3]}', "{"])
def test_a_damaged_run_json_is_not_gone_on_with(content: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(content)

    with pytest.raises(sk.RunFolderError, match="run folder"):
        sk.attach(nn.Linear(2, 2), None, tmp_path / "run", config=QUIET.replace(resume=True))

    assert (tmp_path / "run" / "run.json").read_text() == content


def faulty_attempt(run_dir: Path, config: sk.MonitorConfig, bad: int, *, wrapped: bool = True) -> sk.Monitor:
    """Steps up to the eighth; from `bad` on, each is given a NaN."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    with sk.attach(model, optimizer, run_dir, config=config, on_nonfinite="record") as monitor:
        train_step = monitor.replayable(step) if wrapped else step
        for index in range(config.first_step, 8):
            train_step(torch.full((3, 2), torch.nan if index >= bad else 1.0))
    return monitor


def test_a_resumed_attempt_leaves_the_diagnosis_of_the_run_s_first_fault(tmp_path: Path) -> None:
    faulty_attempt(tmp_path / "run", QUIET, bad=7)
    first = (tmp_path / "run" / "diagnosis.json").read_bytes()

    faulty_attempt(tmp_path / "run", QUIET.replace(resume=True, first_step=3), bad=6)

    assert (tmp_path / "run" / "diagnosis.json").read_bytes() == first
    assert [found.origin.step for found in sk.open_run(tmp_path / "run").diagnoses] == [7, 6, 7]


@pytest.mark.parametrize("wrapped", [True, False])
def test_faults_beyond_those_replayed_are_events_and_no_files(wrapped: bool, tmp_path: Path) -> None:
    monitor = faulty_attempt(tmp_path / "run", QUIET.replace(replays=2), bad=1, wrapped=wrapped)

    run = sk.open_run(tmp_path / "run")
    assert run.diagnosis.verdict == monitor.diagnosis.verdict
    assert [file.name for file in sorted(run.path.glob("diag*"))] == ["diagnosis-0002.json", "diagnosis.json"]
    assert run.events()["step"].tolist() == [1, 2, 3, 4, 5, 6, 7]
