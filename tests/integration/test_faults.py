import random
from pathlib import Path

import pytest
import torch

from trainers.experiment import build_trainer
from trainers.faults import FAULTS, MARGIN, Fault, Truth
from trainers.flags import GUARDS
from trainers.progress import NoProgress
from trainers.trial import BATCHES_PER_TASK, NETS, Named, Spec, configure, healthy_twin, is_right, run_trial, train

ALL = tuple(GUARDS)
STARTS = [0, BATCHES_PER_TASK]
TOTAL = 2 * BATCHES_PER_TASK


def spec(fault: str, guards: tuple[str, ...] = ALL, *, step: int | None = None, net: str = "mnistmlp") -> Spec:
    kind = FAULTS.get(fault, Fault)
    candidates = list(kind.steps(STARTS, TOTAL))
    chosen = candidates[len(candidates) // 2] if step is None else step
    net = "convnet" if kind.needs_batch_norm else net
    return Spec(index=0, seed=0, net=net, num_tasks=2, fault=fault, step=chosen, guards=guards)


def test_there_are_enough_faults_and_each_says_what_a_user_would_see() -> None:
    assert len(FAULTS) >= 20
    assert all(kind.__doc__ and len(kind.__doc__) > 40 for kind in FAULTS.values())
    assert {kind.guard for kind in FAULTS.values()} <= set(GUARDS)


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_strikes_where_a_run_is_under_way_and_leaves_it_time(name: str) -> None:
    steps = FAULTS[name].steps(STARTS, TOTAL)

    assert steps
    assert min(steps) > 0
    assert max(steps) < TOTAL - MARGIN


@pytest.mark.parametrize("name", FAULTS)
def test_with_all_guards_every_fault_is_survived_and_named(name: str, tmp_path: Path) -> None:
    outcome = train(spec(name))

    assert outcome.survived, outcome.error
    assert outcome.detected
    assert outcome.origin_correct, outcome.named


@pytest.mark.parametrize("name", ["bad_image", "nan_weight", "infinite_rate", "buffer_logits_nan", "sqrt_at_zero"])
def test_without_guards_the_same_fault_is_fatal_and_the_monitor_alone_names_it(name: str, tmp_path: Path) -> None:
    outcome = train(spec(name, guards=()))

    assert not outcome.survived
    assert outcome.origin_correct, outcome.named


@pytest.mark.parametrize("name", ["bad_label", "buffer_label", "nan_sampling_weights"])
def test_without_guards_an_impossible_index_ends_the_run_with_an_exception(name: str, tmp_path: Path) -> None:
    outcome = train(spec(name, guards=()))

    assert not outcome.survived
    assert outcome.detected
    assert outcome.error.startswith(("IndexError", "RuntimeError"))


@pytest.mark.parametrize("net", NETS)
def test_a_healthy_trial_raises_no_alarm_and_is_its_own_twin(net: str, tmp_path: Path) -> None:
    outcome = run_trial(spec("healthy", net=net, step=-1), tmp_path)

    assert outcome.survived
    assert outcome.kept_accuracy
    assert outcome.alarms == 0
    assert not outcome.detected


def test_a_fault_that_never_strikes_leaves_the_run_bit_for_bit_its_twin(tmp_path: Path) -> None:
    weights = []
    for name in ("healthy", "nan_weight"):
        trainer = build_trainer(configure(spec("healthy", step=-1), tmp_path / name), NoProgress())
        FAULTS.get(name, Fault)(trainer, 10**6, random.Random(0)).plant()
        trainer.fit()
        trainer.watch.close()
        weights.append(torch.cat([entry.flatten() for entry in trainer.network.parameters()]))

    assert torch.equal(*weights)


def test_a_twin_is_measured_once(tmp_path: Path) -> None:
    wanted = spec("bad_image").twin

    first = healthy_twin(wanted, tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_text(kept.read_text().replace(str(first["class_il"]), "12.5"))

    assert healthy_twin(wanted, tmp_path)["class_il"] == 12.5


@pytest.mark.parametrize(
    ("named", "right"),
    [
        (Named(step=5, phase="data", samples=(3, 9)), True),
        (Named(step=5, phase="data"), True),
        (Named(step=4, phase="data", samples=(3,)), False),
        (Named(step=5, phase="forward", samples=(3,)), False),
        (Named(step=5, phase="data", samples=(4,)), False),
        (Named(step=5, phase="data", tensor="labels"), False),
    ],
)
def test_a_name_is_right_when_step_phase_tensor_and_samples_are(named: Named, right: bool) -> None:
    truth = Truth(first=5, last=5, phases=frozenset({"data"}), tensor="inputs", samples=frozenset({3}))

    assert is_right(named, truth) == right
