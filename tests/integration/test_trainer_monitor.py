import json
from pathlib import Path

import pytest
import torch

from stabilitykit import open_run
from trainers import demo
from trainers.cli import configure, main
from trainers.experiment import build_trainer
from trainers.flags import parse
from trainers.progress import NoProgress

SHORT = ["--backbone", "mnistmlp", "--stop_after", "2", "--non_verbose", "1", "--num_threads", "1"]


@pytest.mark.parametrize("mode", ["1", "2", "3", "4"])
def test_a_monitored_run_trains_bit_for_bit_like_a_bare_one(tmp_path: Path, mode: str) -> None:
    causal = ["--use_causal_sampling", mode, "--causal_eval_interval", "10", "--causal_warmup_tasks", "0"]
    for monitor in ("0", "1"):
        assert main([*SHORT, *causal, "--monitor", monitor, "--run_dir", str(tmp_path / monitor)]) == 0

    bare, watched = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("0", "1"))
    assert watched["last_loss"] == bare["last_loss"]
    assert watched["class_il_matrix"] == bare["class_il_matrix"]
    assert json.loads((tmp_path / "1" / "run.json").read_text())["results"]["class_il"] == bare["class_il"]


def test_a_monitored_run_records_how_far_the_network_has_left_its_stored_logits(tmp_path: Path) -> None:
    assert main([*SHORT, "--model", "derpp", "--run_dir", str(tmp_path / "run")]) == 0

    buffer = open_run(tmp_path / "run").buffer().query("drift_slots > 0")
    assert len(buffer) > 0
    assert (buffer["teacher_drift"] > 0).all()


def test_a_monitored_run_that_diverges_prints_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*SHORT, "--run_dir", str(tmp_path / "run"), "--lr", "1e30"])

    assert code == 1
    assert "first Inf" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "ending.json").read_text())["ending"] == "raised"


def test_the_demos_first_run_goes_non_finite_in_its_second_task(tmp_path: Path) -> None:
    flags = [*demo.COMMAND, "--guards", "none", "--monitor", "0", "--run_dir", str(tmp_path / "run")]
    torch.set_num_threads(1)
    trainer = build_trainer(configure(parse(flags), ()), NoProgress())

    trainer.begin_task(0)
    first = [trainer.train_step(batch) for epoch in range(2) for batch in trainer.stream.batches(0, epoch)]
    trainer.begin_task(1)
    second = [trainer.train_step(batch) for batch in trainer.stream.batches(1, 0)]

    assert all(loss is not None and loss.isfinite() for loss in first)
    assert not all(loss is not None and loss.isfinite() for loss in second[:8])


def test_the_demo_never_takes_a_folder_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "demo-before").mkdir()
    (tmp_path / "demo-before-2").mkdir()

    assert demo.fresh_folder(tmp_path, "demo-before").name == "demo-before-3"
    assert demo.fresh_folder(tmp_path, "demo-after").name == "demo-after"
