import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainers import datasets
from trainers.cli import main

QUICK = ["--backbone", "mnistmlp", "--stop_after", "2", "--monitor", "0", "--non_verbose", "1", "--num_threads", "1"]
ROOT = Path(__file__).parents[2]


def run(folder: Path, *flags: str) -> dict[str, object]:
    assert main([*QUICK, "--run_dir", str(folder), *flags]) == 0
    results: dict[str, object] = json.loads((folder / "results.json").read_text())
    return results


def complaint(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main([*QUICK, *flags]) == 2
    text = capsys.readouterr().err
    assert text.startswith("python -m trainers: ")
    assert text.count("\n") == 1
    assert "expected" in text
    return text


def test_a_run_learns_and_leaves_its_results(tmp_path: Path) -> None:
    results = run(tmp_path / "run", "--seed", "7", "--lr", "0.1")

    assert results["class_il"] > 50
    assert results["task_il"] >= results["class_il"]
    assert [len(row) for row in results["class_il_matrix"]] == [1, 2]
    assert (results["seed"], results["num_steps"], results["finished"]) == (7, 64, True)
    assert results["command"][:3] == ["python", "-m", "trainers"]
    assert results["cpu_seconds"] > 0


def test_results_hold_what_continual_learning_reports(tmp_path: Path) -> None:
    results = run(tmp_path / "run", "--model", "derpp", "--lr", "0.1", "--stop_after", "3")

    class_il, task_il = results["class_il_matrix"], results["task_il_matrix"]
    assert results["class_il"] == pytest.approx(sum(class_il[2]) / 3)
    assert results["task_il"] == pytest.approx(sum(task_il[2]) / 3)
    drops = [max(row[task] for row in class_il[task:2]) - class_il[2][task] for task in (0, 1)]
    assert results["forgetting"] == pytest.approx(sum(drops) / 2)
    assert results["bwt"] == pytest.approx(sum(class_il[2][task] - class_il[task][task] for task in (0, 1)) / 2)
    gains = [
        after - before for after, before in zip(results["task_il_before"], results["task_il_untrained"], strict=True)
    ]
    assert len(gains) == 2
    assert results["fwt_task_il"] == pytest.approx(sum(gains) / 2)
    assert results["fwt"] <= 0


def test_sgd_forgets_replay_forgets_less_and_joint_training_is_above_both(tmp_path: Path) -> None:
    flags = ("--lr", "0.1", "--stop_after", "3", "--batch_size", "16")
    sgd, er, joint = (run(tmp_path / model, "--model", model, *flags) for model in ("sgd", "er", "joint"))

    assert sgd["class_il"] < er["class_il"] < joint["class_il"]
    assert sgd["forgetting"] > er["forgetting"] > 0
    assert joint["forgetting"] is joint["fwt"] is None
    assert (joint["finished"], joint["tasks_seen"]) == (True, 3)


@pytest.mark.parametrize("model", ["sgd", "joint", "er", "der", "derpp", "causal-der"])
def test_a_seed_decides_everything(tmp_path: Path, model: str) -> None:
    first, second = (run(tmp_path / name, "--model", model, "--seed", "5") for name in ("a", "b"))
    other = run(tmp_path / "c", "--model", model, "--seed", "6")

    assert first["last_loss"] == second["last_loss"] != other["last_loss"]
    assert first["class_il_matrix"] == second["class_il_matrix"]


def test_the_guides_eight_together_finish_with_batch_norm_frozen(tmp_path: Path) -> None:
    results = run(tmp_path / "run", "--guards", "guide", "--backbone", "resnet8", "--pool", "4", "--lr", "0.1")

    assert results["num_skipped"] == 0
    assert results["guards"]["freeze_bn"] == 1
    assert results["train_eval_gaps"] == [0, 0]


def test_all_guards_standing_by_train_the_same_bits_as_none(tmp_path: Path) -> None:
    flags = ("--model", "derpp", "--backbone", "resnet8", "--pool", "4")

    bare, guarded = (run(tmp_path / guards, *flags, "--guards", guards) for guards in ("none", "all"))

    assert set(guarded["guards"].values()) == {0}
    assert guarded["last_loss"] == bare["last_loss"]
    assert guarded["class_il_matrix"] == bare["class_il_matrix"]


def test_a_run_that_diverges_under_checks_ends_with_exit_code_1_and_the_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*QUICK, "--run_dir", str(tmp_path / "run"), "--lr", "1e30"])

    assert code == 1
    error = capsys.readouterr().err
    assert error.startswith("python -m trainers: step ")
    assert error.count("\n") == 1


def test_a_run_that_only_skips_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--lr", "1e30", "--on_nonfinite", "skip", "--max_skips", "5"]

    code = main([*QUICK, "--run_dir", str(tmp_path / "run"), *flags])

    assert code == 1
    assert "5 steps in a row" in capsys.readouterr().err


def test_a_run_that_only_records_goes_on_to_the_end_and_is_never_right(tmp_path: Path) -> None:
    results = run(tmp_path / "run", "--lr", "1e30", "--on_nonfinite", "record", "--validate_step", "0")

    assert results["num_skipped"] > 50
    assert results["class_il"] == 0


def test_a_folder_with_a_run_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text("mine")

    text = complaint(capsys, "--run_dir", str(tmp_path))

    assert "holds another run" in text
    assert (tmp_path / "results.json").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")

    complaint(capsys, "--run_dir", str(tmp_path / "file" / "run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)

    complaint(capsys, "--run_dir", str(tmp_path))


@pytest.mark.parametrize("name", ["seq-mnist", "seq-cifar10", "seq-cifar100", "seq-fmnist"])
def test_missing_data_are_one_line_and_no_folder_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(datasets, "DEBIAN", {})
    text = complaint(
        capsys, "--dataset", name, "--base_path", str(tmp_path / "data"), "--run_dir", str(tmp_path / "run")
    )

    assert "--download 1" in text
    assert not (tmp_path / "run").exists()


def test_an_archive_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cifar100.npz").write_text("no archive")

    complaint(capsys, "--dataset", "seq-cifar100", "--base_path", str(tmp_path), "--run_dir", str(tmp_path / "run"))


def test_cifar100_from_an_archive_goes_through_augmentation_and_training(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (300, 32, 32, 3), np.uint8)
    labels = np.arange(300) % 100
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}
    np.savez(tmp_path / "cifar100.npz", **arrays)

    flags = ["--dataset", "seq-cifar100", "--base_path", str(tmp_path), "--backbone", "resnet8", "--pool", "4"]
    results = run(tmp_path / "run", *flags)

    assert results["num_steps"] == 2


@pytest.mark.parametrize("flags", [["--lr", "fast"], ["--frobnicate"], ["--dataset", "seq-svhn"]])
def test_a_bad_command_is_one_line_on_stderr_and_exit_code_2(flags: list[str]) -> None:
    command = [sys.executable, "-m", "trainers", *flags]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("mode", ["1", "2", "3", "4"])
@pytest.mark.parametrize("name", ["perm-mnist", "rot-mnist"])
def test_causal_der_runs_on_domains_where_a_task_graph_has_no_meaning(tmp_path: Path, name: str, mode: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (300, 28, 28), np.uint8)
    for part in ("train", "t10k"):
        for kind, array in (("images-idx3", images), ("labels-idx1", (np.arange(300) % 10).astype(np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (tmp_path / f"{part}-{kind}-ubyte").write_bytes(header + array.tobytes())

    flags = ["--dataset", name, "--base_path", str(tmp_path), "--use_causal_sampling", mode]
    results = run(tmp_path / "run", *flags, "--causal_eval_interval", "2", "--causal_warmup_tasks", "0")

    assert results["class_il_matrix"] == results["task_il_matrix"]
    assert "task_graph" not in results
    assert (results["num_tasks"], results["num_steps"]) == (2, 20)
