"""A run that was killed and resumed ends in the weights of the run that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import stabilitykit as sk
from trainers.checkpoint import read_checkpoint
from trainers.cli import main

ROOT = Path(__file__).parents[2]
SHORT = ["--stop_after", "2", "--non_verbose", "1", "--num_threads", "1", "--checkpoint_every", "7", "--seed", "4"]
COMMANDS = {
    "causal-der": ["--model", "causal-der", "--backbone", "resnet8", "--pool", "4", "--freeze_bn", "1",
                   "--use_causal_sampling", "3", "--causal_eval_interval", "5", "--causal_num_interventions", "4",
                   "--causal_warmup_tasks", "0", "--optim_mom", "0.9", "--buffer_policy", "class_balanced"],
    "derpp": ["--model", "derpp", "--backbone", "mnistmlp", "--optimizer", "adam", "--lr", "0.001", "--n_epochs", "2",
              "--mixed_precision", "fp16", "--buffer_policy", "importance", "--clip_grad", "0.5"],
}  # fmt: skip


class Killed(Exception):
    """In place of a kill: nothing of the process's own cleaning up is looked at."""


def run_until(folder: Path, command: list[str], steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until so many steps are taken, then drop everything."""
    from trainers.trainer import Trainer

    taken = 0
    count = Trainer.count

    def counting(self: Trainer, *args: object) -> None:
        nonlocal taken
        count(self, *args)
        taken += 1
        if taken == steps:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "count", counting)
        with pytest.raises(Killed):
            main([*command, "--run_dir", str(folder)])


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    state = read_checkpoint(folder)
    tensors = {f"network.{name}": value for name, value in state["network"].items()}
    return tensors | {f"buffer.{name}": v for name, v in state["buffer"].items() if isinstance(v, torch.Tensor)}


def assert_same_run(whole: Path, resumed: Path) -> None:
    expected, found = final_state(whole), final_state(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    one, other = (json.loads((folder / "results.json").read_text()) for folder in (whole, resumed))
    for results in (one, other):
        del results["command"], results["cpu_seconds"]
    assert one == other


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_resumed_at_any_step_ends_in_the_same_bits(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*SHORT, *COMMANDS[name], "--monitor", "0"]
    assert main([*command, "--run_dir", str(tmp_path / "whole")]) == 0

    for steps in (1, 7, 31, 32, 33, 40):
        folder = tmp_path / f"killed-{steps}"
        run_until(folder, command, steps, monkeypatch)
        assert main(["--resume", str(folder)]) == 0
        assert_same_run(tmp_path / "whole", folder)


def test_a_run_killed_with_signal_9_several_times_ends_in_the_same_bits(tmp_path: Path) -> None:
    command = [*SHORT, *COMMANDS["causal-der"]]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    assert main([*command, "--monitor", "0", "--run_dir", str(tmp_path / "whole")]) == 0
    folder = tmp_path / "killed"
    flags = [*command, "--run_dir", str(folder)]
    kills = 0

    for milestone in (10, 30, 50):
        process = subprocess.Popen(
            [sys.executable, "-m", "trainers", *flags], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
        )
        while process.poll() is None:
            if (folder / "checkpoint.safetensors").exists():
                state = read_checkpoint(folder)
                if state["results"]["num_steps"] >= milestone:
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.02)
        kills += process.wait() == -signal.SIGKILL
        flags = ["--resume", str(folder)]
    assert main(flags) == 0

    assert kills >= 2
    assert_same_run(tmp_path / "whole", folder)
    run = sk.open_run(folder)
    assert len(run.meta["attempts"]) == kills + 1
    assert run.steps()["step"].tolist() == list(range(64))


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*SHORT, *COMMANDS["derpp"], "--monitor", "0", "--stop_after", "1", "--run_dir", str(tmp_path / "run")]
    assert main(command) == 0
    before = final_state(tmp_path / "run")

    assert main(["--resume", str(tmp_path / "run")]) == 0

    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in final_state(tmp_path / "run").items())


def test_resuming_with_another_setting_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*SHORT, *COMMANDS["derpp"], "--monitor", "0", "--stop_after", "1", "--run_dir", str(tmp_path / "run")]
    assert main(command) == 0

    code = main(["--resume", str(tmp_path / "run"), "--buffer_size", "77"])

    assert code == 2
    assert "got buffer.size 77, expected the run's own 200" in capsys.readouterr().err


def test_resuming_where_nothing_is_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--resume", str(tmp_path / "nowhere")])

    assert code == 2
    assert "no checkpoint.safetensors" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainers.trainer.write_checkpoint", full)

    code = main([*SHORT, *COMMANDS["derpp"], "--monitor", "0", "--stop_after", "1", "--run_dir", str(tmp_path / "r")])

    assert code == 0
