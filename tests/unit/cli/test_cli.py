import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_runs import write_run

from stabilitykit.cli.main import COMMANDS, build_parser, main

ROOT = Path(__file__).parents[3]


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    return write_run(tmp_path / "healthy", num_steps=12)


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    return write_run(tmp_path / "faulty", fault=True, ending="raised")


def test_report_writes_into_the_run_folder_and_prints_the_path(
    healthy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(healthy)]) == 0

    assert capsys.readouterr().out == f"{healthy / 'report.html'}\n"
    assert (healthy / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_report_writes_the_image_as_well_where_it_is_told(
    faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "elsewhere" / "r.html"

    code = main(["report", str(faulty), "--out", str(out), "--png"])

    assert code == 1
    assert capsys.readouterr().out.splitlines() == [str(out), str(out.with_suffix(".png"))]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("kind", "name"), [("text", "report.txt"), ("json", "report.json")])
def test_report_knows_the_other_formats(healthy: Path, kind: str, name: str) -> None:
    assert main(["report", str(healthy), "--format", kind]) == 0

    assert "No non-finite value in 12 steps" in (healthy / name).read_text()


def test_postmortem_tells_a_fault_and_exits_1(faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["postmortem", str(faulty)]) == 1

    printed = capsys.readouterr().out
    assert "first Inf" in printed
    assert "\x1b" not in printed


def test_postmortem_for_machines_is_json(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["postmortem", str(healthy), "--json"]) == 0

    assert json.loads(capsys.readouterr().out)["level"] == "fine"


def test_a_killed_run_is_a_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed = write_run(tmp_path / "killed", num_steps=5, ending="killed")

    assert main(["postmortem", str(killed)]) == 1

    assert "the process was killed after step 4" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_a_bad_path_gives_one_line_and_exit_code_2(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path / "no\nsuch")]) == 2

    error = capsys.readouterr().err
    assert error.startswith("stabilitykit: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_no_run_is_unreadable(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path)]) == 3

    assert "expected a run folder" in capsys.readouterr().err


def test_a_run_of_a_newer_version_is_unreadable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text('{"schema_version": 99}')

    assert main(["report", str(tmp_path)]) == 3

    assert "update stabilitykit" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_a_usage_error(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(healthy), "--out", "/proc/none/r.html"]) == 2

    assert "give another path with --out" in capsys.readouterr().err


def test_no_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2

    assert "usage: stabilitykit" in capsys.readouterr().err


def test_every_command_explains_itself() -> None:
    for name in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            build_parser().parse_args([name, "--help"])


def test_python_m_stabilitykit_helps_without_torch_or_tables() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "stabilitykit", "--help"]

    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)

    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "postmortem" in done.stdout
    assert "argparse" in loaded
    assert not loaded & {"torch", "pandas", "pyarrow", "matplotlib", "jinja2", "rich", "numpy"}


def test_a_reader_that_stops_early_causes_no_traceback(faulty: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        command = [sys.executable, "-m", "stabilitykit", "postmortem", str(faulty)]
        done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)

    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_cannot_show_every_character_is_given_the_rest(faulty: Path, encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "stabilitykit", "postmortem", str(faulty)]

    done = subprocess.run(command, capture_output=True, env=environment, check=False, cwd=ROOT)

    assert (done.returncode, done.stderr) == (1, b"")
    assert b"first Inf" in done.stdout


def test_what_nobody_foresaw_is_no_finding(
    healthy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("phase")

    monkeypatch.setattr("stabilitykit.report.text.render", fail)

    assert main(["postmortem", str(healthy)]) == 3

    assert capsys.readouterr().err.endswith(f"error: {healthy}: cannot be shown, see above: KeyError('phase')\n")


@pytest.mark.parametrize(
    "damage", ['{"attempts": [3]}', '{"attempts": 3}', '{"attempts": [{"attempt": "x"}]}', '{"modules": 3}', "[]"]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_run_json_is_told_in_the_report(
    command: str, damage: str, healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (healthy / "run.json").write_text(damage)
    arguments = [command, str(healthy), *(["--out", str(tmp_path / "r.txt")] if command == "report" else [])]

    assert main(arguments) == 0

    told = (tmp_path / "r.txt").read_text() if command == "report" else capsys.readouterr().out
    assert "run.json" in told


def test_a_report_of_a_phase_that_this_version_does_not_know_can_be_made(faulty: Path) -> None:
    diagnosis = json.loads((faulty / "diagnosis.json").read_text())
    diagnosis["origin"]["phase"] = "evaluation"
    (faulty / "diagnosis.json").write_text(json.dumps(diagnosis))

    assert main(["report", str(faulty)]) == 1


def test_the_name_of_the_file_tells_the_format(healthy: Path, tmp_path: Path) -> None:
    assert main(["report", str(healthy), "--out", str(tmp_path / "y.PNG")]) == 0
    assert main(["report", str(healthy), "--out", str(tmp_path / "y.txt")]) == 0
    assert main(["report", str(healthy), "--out", str(tmp_path / "y.out")]) == 0

    assert (tmp_path / "y.PNG").read_bytes().startswith(b"\x89PNG")
    assert "<" not in (tmp_path / "y.txt").read_text()[:100]
    assert (tmp_path / "y.out").read_text().startswith("<!DOCTYPE html>")


def test_a_format_that_the_name_of_the_file_denies_is_refused(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(healthy), "--out", str(tmp_path / "y.png"), "--format", "html"]) == 2

    assert "y.png: got --format html, expected png by the file's name" in capsys.readouterr().err
    assert not (tmp_path / "y.png").exists()


def test_a_dash_is_standard_output(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert main(["report", str(healthy), "--out", "-", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["level"] == "fine"
    assert main(["report", str(healthy), "--out", "-", "--format", "png"]) == 2

    assert not (tmp_path / "-").exists()
