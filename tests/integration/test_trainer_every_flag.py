"""Every flag changes what a run does, or is listed as accepted and ignored."""

import functools
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from trainers import datasets, flags
from trainers.checkpoint import read_checkpoint
from trainers.cli import main

BASE = ("--backbone", "mnistmlp", "--pool", "4", "--batch_size", "100", "--minibatch_size", "20", "--buffer_size", "60",
        "--stop_after", "2", "--monitor", "0", "--non_verbose", "1", "--num_threads", "1", "--lr", "0.1")  # fmt: skip
NORMED = ("--backbone", "resnet8")
CAUSAL = ("--causal_warmup_tasks", "0", "--causal_weight", "0.9", "--importance_refresh", "3")
INTERVENING = (*CAUSAL, "--use_causal_sampling", "3", "--causal_eval_interval", "3", "--causal_num_interventions", "8",
               "--causal_num_probes", "8")  # fmt: skip
HYBRID = (*INTERVENING, "--use_causal_sampling", "2", "--causal_hybrid_candidates", "24")
STEPPED = ("--lr_scheduler", "multisteplr", "--lr_milestones", "1", "--n_epochs", "2")
EXPLODING = ("--lr", "1e30")

# Flag: what it is given, and the flags under which it matters.
CHANGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "--model": ("derpp", CAUSAL),
    "--joint": ("1", ()),
    "--dataset": ("seq-mnist", ()),
    "--num_tasks": ("10", ()),
    "--permute_classes": ("1", ()),
    "--validation": ("20", ()),
    "--seed": ("9", ()),
    "--stop_after": ("1", ()),
    "--dataset_config": ("10tasks", ()),
    "--backbone": ("resnet8", ()),
    "--norm": ("group", NORMED),
    "--pool": ("2", ()),
    "--n_epochs": ("2", ()),
    "--batch_size": ("50", ()),
    "--drop_last": ("1", ("--batch_size", "300")),
    "--optimizer": ("adamw", ()),
    "--lr": ("0.05", ()),
    "--optim_wd": ("0.1", ()),
    "--optim_mom": ("0.9", ()),
    "--optim_nesterov": ("1", ("--optim_mom", "0.9")),
    "--lr_scheduler": ("multisteplr", ("--lr_milestones", "1", "--n_epochs", "2")),
    "--lr_milestones": ("2", STEPPED),
    "--sched_multistep_lr_gamma": ("0.5", STEPPED),
    "--buffer_size": ("30", ()),
    "--minibatch_size": ("10", ()),
    "--buffer_policy": ("class_balanced", ()),
    "--alpha": ("0.9", ()),
    "--beta": ("0.9", ()),
    "--kd": ("kl", ()),
    "--kd_temperature": ("4", ("--kd", "kl")),
    "--replay_draws": ("1", ()),
    "--replay_warmup_tasks": ("1", ()),
    "--asymmetric_ce": ("1", ()),
    "--use_causal_sampling": ("0", CAUSAL),
    "--causal_weight": ("0.1", CAUSAL),
    "--causal_warmup_tasks": ("9", CAUSAL),
    "--causal_balance": ("past", CAUSAL),
    "--importance_refresh": ("0", CAUSAL),
    "--causal_eval_interval": ("4", INTERVENING),
    "--causal_num_interventions": ("16", INTERVENING),
    "--causal_num_probes": ("2", INTERVENING),
    "--causal_hybrid_candidates": ("12", HYBRID),
    "--true_micro_steps": ("3", INTERVENING),
    "--true_temp_lr": ("5.0", INTERVENING),
    "--enable_causal_graph_learning": ("0", ()),
    "--graph_order": ("free", ("--graph_sparsity", "0.01")),
    "--graph_sparsity": ("0.02", ()),
    "--irm_weight": ("1.0", ()),
    "--guards": ("guide", ()),
    "--use_lr_decay": ("1", ("--stop_after", "3")),
    "--mixed_precision": ("bf16", ()),
    "--amp_scope": ("replay", ("--mixed_precision", "bf16")),
    "--disable_amp": ("1", ("--mixed_precision", "bf16")),
    "--freeze_bn": ("1", NORMED),
    "--sanitise_buffer": ("0", (*EXPLODING, "--validate_step", "0", "--on_nonfinite", "record")),
    "--clamp_logits": ("0.1", ()),
    "--isolate_causal": ("0", (*NORMED, *CAUSAL)),
    "--validate_step": ("0", EXPLODING),
    "--on_nonfinite": ("record", EXPLODING),
    "--rollback_lr": ("0.001", ("--lr", "30", "--on_nonfinite", "rollback", "--max_skips", "1000")),
    "--max_skips": ("3", (*EXPLODING, "--on_nonfinite", "skip")),
    "--clip_grad": ("0.1", ()),
    "--adaptive_replay_weights": ("1", ()),
}
# What they change is not what is learnt; each has a test below or in the file named.
ELSEWHERE = {
    "--buffer_audit_every": "test_trainer_buffer.py",
    "--base_path": "test_trainer_streams.py",
    "--download": "here",
    "--run_dir": "here",
    "--resume": "test_trainer_resume.py",
    "--checkpoint_every": "here",
    "--monitor": "here",
    "--record_every": "here",
    "--num_threads": "here",
    "--non_verbose": "here",
    "--device": "here",
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@functools.cache
def outcome(*chosen: str) -> tuple[object, ...]:
    """Exit code and a digest of weights, buffer and results of a short run."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        code = main([*BASE, *chosen, "--run_dir", str(folder)])
        if not (folder / "checkpoint.safetensors").exists():
            return (code,)
        state = read_checkpoint(folder)
    digest = hashlib.sha256()
    for part in ("network", "buffer"):
        for key, value in sorted(state[part].items()):
            held = value.flatten().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
            digest.update(key.encode() + held)
    results = {
        key: state["results"][key] for key in ("num_steps", "num_skipped", "class_il_matrix", "last_loss", "facts")
    }
    return code, digest.hexdigest(), repr(results)


def known_flags() -> set[str]:
    parser = flags.build_parser()
    return {option for action in parser._actions for option in action.option_strings if option.startswith("--")}


def test_no_flag_is_forgotten() -> None:
    assert known_flags() == {"--help", *CHANGES, *ELSEWHERE, *flags.IGNORED}


@pytest.mark.parametrize("flag", CHANGES)
def test_the_flag_changes_what_the_run_does(flag: str) -> None:
    value, context = CHANGES[flag]

    assert outcome(*context, flag, value) != outcome(*context)


@pytest.mark.parametrize("flag", flags.IGNORED)
def test_a_flag_that_is_ignored_changes_nothing(flag: str) -> None:
    assert outcome(flag, "1") == outcome()


def test_download_is_handed_to_torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []

    def reader(root: Path, train: bool, download: bool) -> None:
        asked.append(download)
        raise RuntimeError

    monkeypatch.setattr(datasets, "_reader", lambda source: reader)

    for value in ("0", "1"):
        main([*BASE, "--dataset", "seq-cifar10", "--base_path", str(tmp_path), "--download", value])

    assert asked == [False, True]


def test_run_dir_names_the_folder_and_monitor_fills_it_with_a_record(tmp_path: Path) -> None:
    for monitor in ("0", "1"):
        assert main([*BASE, "--stop_after", "1", "--run_dir", str(tmp_path / monitor), "--monitor", monitor]) == 0

    assert not (tmp_path / "0" / "run.json").exists()
    assert json.loads((tmp_path / "1" / "run.json").read_text())["results"]["finished"]


def test_record_every_sets_the_cadence(tmp_path: Path) -> None:
    import stabilitykit as sk

    recorded = []
    for every in ("2", "5"):
        folder = tmp_path / every
        assert (
            main([*BASE, "--stop_after", "1", "--run_dir", str(folder), "--monitor", "1", "--record_every", every]) == 0
        )
        recorded.append(sorted(set(sk.open_run(folder).tensors()["step"])))

    assert recorded == [[0, 2, 4, 6, 8], [0, 5]]


def test_checkpoint_every_sets_when_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    monkeypatch.setattr(
        "trainers.trainer.write_checkpoint", lambda folder, state: written.append(state["results"]["num_steps"])
    )

    main([*BASE, "--stop_after", "1", "--run_dir", str(tmp_path / "a"), "--checkpoint_every", "4"])
    main([*BASE, "--stop_after", "1", "--run_dir", str(tmp_path / "b"), "--checkpoint_every", "0"])

    assert written == [0, 4, 8, 10, 0, 10]


def test_num_threads_is_set(tmp_path: Path) -> None:
    main([*BASE, "--stop_after", "1", "--run_dir", str(tmp_path / "a"), "--num_threads", "2"])

    assert torch.get_num_threads() == 2


def test_non_verbose_is_silent_but_for_the_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = []
    for value in ("0", "1"):
        main([*BASE, "--stop_after", "1", "--run_dir", str(tmp_path / value), "--non_verbose", value])
        lengths.append(len(capsys.readouterr().out.splitlines()))

    assert lengths[0] > lengths[1] == 1


def test_a_device_there_is_none_of_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BASE, "--device", "cuda"]) == 2
    assert "--device" in capsys.readouterr().err
