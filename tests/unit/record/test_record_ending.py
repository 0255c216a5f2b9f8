import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stabilitykit.record.ending import is_running, machine_id, process_start, this_process, write_ending


def test_an_ending_holds_the_step_the_error_and_the_attempt(tmp_path: Path) -> None:
    assert write_ending(tmp_path, "raised", 41, "NonFiniteError: loss", attempt=2)

    body = json.loads((tmp_path / "ending.json").read_text())
    assert {key: body[key] for key in ("ending", "step", "error", "attempt")} == {
        "ending": "raised",
        "step": 41,
        "error": "NonFiniteError: loss",
        "attempt": 2,
    }
    assert body["wall_time"] > 1e9


def test_an_ending_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ending(tmp_path, "raised", 1)

    def no_room(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", no_room)

    assert not write_ending(tmp_path, "completed", 2)
    assert json.loads((tmp_path / "ending.json").read_text())["step"] == 1
    assert not any((tmp_path / "tmp").iterdir())


def test_a_machine_has_one_opaque_id() -> None:
    assert machine_id() == machine_id()
    assert len(machine_id()) == 16
    assert os.uname().nodename not in machine_id()


def test_this_process_is_running_and_not_elsewhere_nor_as_another_one() -> None:
    facts = this_process()
    pid, started, machine = int(facts["pid"]), str(facts["process_start"]), str(facts["machine"])

    assert is_running(pid, started, machine)
    assert not is_running(pid, started, "0123456789abcdef")
    assert not is_running(pid, "1", machine)


@pytest.mark.parametrize("name", ["a b) c", "python"])
def test_a_start_time_is_found_behind_any_process_name(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to("/bin/sleep")
    with subprocess.Popen([tmp_path / name, "30"]) as process:
        started = process_start(process.pid)
        process.kill()

    assert int(started) >= int(process_start(os.getpid())) > 0


def test_a_killed_child_that_nobody_waited_for_is_not_running() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"]) as process:
        started = process_start(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

        assert not is_running(process.pid, started, machine_id())


def test_a_process_that_never_was_has_no_start_time() -> None:
    assert process_start(2**22 + 1) == ""
