"""A sweep: methods times seeds in processes, restarted, on Ray, and its table."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest

from trainers.checkpoint import read_checkpoint
from trainers.cli import main
from trainers.jobs import plan, prepare, run_here
from trainers.run_state import sole_owner

ROOT = Path(__file__).parents[2]
FLAGS = ["--backbone", "mnistmlp", "--stop_after", "2", "--monitor", "0", "--batch_size", "100"]
CAUSAL = "causal-der --use_causal_sampling 4"


def sweep(out: Path, *options: str, common: list[str] | None = None) -> int:
    return main(["sweep", "--out", str(out), *options, "--", *(FLAGS if common is None else common)])


def test_a_sweep_trains_every_method_with_every_seed_and_prints_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = sweep(tmp_path, "--methods", "derpp", CAUSAL, "--seeds", "0", "1", "--jobs", "2")

    assert code == 0
    rows = pq.read_table(tmp_path / "runs.parquet").to_pylist()
    assert [(row["method"], row["seed"]) for row in rows] == [("derpp", 0), (CAUSAL, 0), ("derpp", 1), (CAUSAL, 1)]
    summary = json.loads((tmp_path / "summary.json").read_text())
    expected = sum(rows[i + 1]["class_il"] - rows[i]["class_il"] for i in (0, 2)) / 2
    assert summary["methods"][1]["differences"]["class_il"]["mean"] == pytest.approx(expected)
    assert (tmp_path / "table.md").read_text().count("\n") == 4
    assert "derpp, seed 1: Class-IL" in capsys.readouterr().out


def test_a_second_call_trains_nothing_that_is_finished_and_adds_what_is_new(tmp_path: Path) -> None:
    assert sweep(tmp_path, "--methods", "derpp", "--seeds", "0") == 0
    first = (tmp_path / "derpp" / "seed=0" / "results.json").stat().st_mtime_ns

    assert sweep(tmp_path, "--methods", "derpp", "sgd", "--seeds", "0") == 0

    assert (tmp_path / "derpp" / "seed=0" / "results.json").stat().st_mtime_ns == first
    assert len(pq.read_table(tmp_path / "runs.parquet")) == 2


def test_a_sweep_killed_half_way_goes_on_where_it_was(tmp_path: Path) -> None:
    flags = [*FLAGS, "--n_epochs", "40", "--checkpoint_every", "5"]
    command = [sys.executable, "-m", "trainers", "sweep", "--out", str(tmp_path / "out"), "--methods", "derpp"]
    command += ["--seeds", "3", "--jobs", "1", "--", *flags]
    folder = tmp_path / "out" / "derpp" / "seed=3"
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    while not (folder / "checkpoint.safetensors").exists() or read_checkpoint(folder)["results"]["num_steps"] < 20:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    assert sweep(tmp_path / "out", "--methods", "derpp", "--seeds", "3", "--jobs", "1", common=flags) == 0
    assert main(["--model", "derpp", *flags, "--seed", "3", "--run_dir", str(tmp_path / "whole")]) == 0

    whole, resumed = (json.loads((run / "results.json").read_text()) for run in (tmp_path / "whole", folder))
    assert whole["last_loss"] == resumed["last_loss"]
    assert whole["class_il_matrix"] == resumed["class_il_matrix"]


def test_a_run_that_fails_is_named_and_the_others_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = sweep(tmp_path, "--methods", "derpp", "derpp --lr 1e30", "--seeds", "0")

    assert code == 1
    captured = capsys.readouterr()
    assert "derpp --lr 1e30, seed 0: exit code 1: python -m trainers: step " in captured.err
    assert len(pq.read_table(tmp_path / "runs.parquet")) == 1


def test_a_run_that_complains_at_length_is_not_held_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONVERBOSE", "1")  # more than a pipe holds
    running = run_here(plan(["derpp --lr -1"], [0], FLAGS, tmp_path), 1)
    ends = time.monotonic() + 60

    outcome = next(entry for entry in running if entry is not None or time.monotonic() > ends)

    running.close()
    assert outcome is not None
    assert outcome.exit_code == 2


def test_what_an_attempt_left_before_its_first_checkpoint_is_cleared(tmp_path: Path) -> None:
    (job,) = plan(["derpp"], [0], [], tmp_path)
    job.folder.mkdir(parents=True)
    (job.folder / "lock").write_text("")

    arguments = prepare(job)

    assert arguments[:2] == ["--model", "derpp"]
    assert not job.folder.exists()


def test_what_an_attempt_is_still_writing_is_left_to_it(tmp_path: Path) -> None:
    (job,) = plan(["derpp"], [0], [], tmp_path)
    job.folder.mkdir(parents=True)

    with sole_owner(job.folder):
        prepare(job)

        assert job.folder.exists()


def test_an_abandoned_sweep_leaves_no_process_behind(tmp_path: Path) -> None:
    running = run_here(plan(["derpp"], [0, 1], [*FLAGS, "--n_epochs", "500"], tmp_path), 2)
    assert next(running) is None

    running.close()

    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed


def test_a_terminated_sweep_takes_its_processes_with_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainers", "sweep", "--out", str(tmp_path / "out"), "--methods", "derpp"]
    command += ["--seeds", "0", "--jobs", "1", "--", *FLAGS, "--n_epochs", "500"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "out" / "derpp" / "seed=0" / "checkpoint.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.05)

    process.terminate()

    assert process.wait() == 128 + signal.SIGTERM
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "derpp", "--jobs", "0"], "--jobs: got 0, expected 1 or more"),
        (["--methods", "derpp", "derpp"], "--methods: got one twice"),
        (["--methods", "derpp", "--seeds", "1", "1"], "--seeds: got one twice"),
        (["--methods", "derpp", "--baseline", "er"], "--baseline: got 'er', expected one of derpp"),
        (["--methods", "lwf"], "--model: got 'lwf', expected one of"),
        (["--methods", "derpp --lr fast"], "--lr: got 'fast', expected a number"),
    ],
)
def test_a_bad_sweep_is_one_line_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert sweep(tmp_path / "out", *options) == 2

    error = capsys.readouterr().err
    assert error.startswith(f"python -m trainers: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_sweeps_flags_may_not_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(tmp_path, "--methods", "sgd", "--seeds", "0") == 0

    assert sweep(tmp_path, "--methods", "sgd", "--seeds", "0", common=[*FLAGS, "--lr", "0.1"]) == 2
    assert "holds a sweep with" in capsys.readouterr().err


class FakeRay(ModuleType):
    """Ray's few functions, one task at a time."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.calls: list[str] = []

    def init(self, address: str, **options: object) -> None:
        if address == "nowhere:1":
            raise ConnectionError("Could not find any running Ray instance.")
        self.calls.append(f"init {address}")

    def remote(self, **options: object) -> Callable[..., object]:
        def decorate(function: Callable[..., object]) -> object:
            class Remote:
                @staticmethod
                def remote(*args: object) -> tuple[object, ...]:
                    return (function, *map(tuple, args))

            return Remote

        return decorate

    def wait(self, references: list[object], **options: object) -> tuple[list[object], list[object]]:
        return references[:1], references[1:]

    def get(self, reference: tuple[Callable[..., object], tuple[str, ...]]) -> object:
        function, arguments = reference
        return function(list(arguments))

    def shutdown(self) -> None:
        self.calls.append("shutdown")


def test_on_ray_every_run_is_a_task_and_the_table_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay()
    monkeypatch.setitem(sys.modules, "ray", ray)

    assert sweep(tmp_path / "ray", "--methods", "derpp", "--seeds", "0", "1", "--ray", "head:6379") == 0
    assert sweep(tmp_path / "here", "--methods", "derpp", "--seeds", "0", "1") == 0

    assert ray.calls == ["init head:6379", "shutdown"]
    there, here = (pq.read_table(tmp_path / name / "runs.parquet").to_pylist() for name in ("ray", "here"))
    for one, other in zip(there, here, strict=True):
        assert (one["seed"], one["class_il"], one["fwt"]) == (other["seed"], other["class_il"], other["fwt"])


def test_without_ray_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)

    assert sweep(tmp_path, "--methods", "derpp", "--seeds", "0", "--ray", "auto") == 2
    assert "pip install '.[ray]'" in capsys.readouterr().err


def test_without_a_cluster_the_address_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay())

    assert sweep(tmp_path, "--methods", "derpp", "--seeds", "0", "--ray", "nowhere:1") == 2
    assert "--ray: got 'nowhere:1': Could not find" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_on_a_local_ray_cluster(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainers", "sweep", "--out", str(tmp_path), "--methods", "derpp", "sgd"]
    command += ["--seeds", "0", "1", "--ray", "local", "--", *FLAGS]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert len(pq.read_table(tmp_path / "runs.parquet")) == 4
