"""Traps S1 to S25, those of the stability guide's snippets, where they concern the trainer.

The guards' own are in tests/unit/guards.  S3 is an import that this trainer does not have; S17 is no trap: a second
backward over a freed graph raises by itself.
"""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from trainer_steps import MakeTrainer, take_steps

from stabilitykit.errors import NonFiniteError, UsageError
from trainers.batch import Batch
from trainers.buffer import BufferConfig
from trainers.cli import main
from trainers.methods.causal_der import CausalConfig
from trainers.methods.sgd import ReplayConfig
from trainers.networks import NetworkConfig
from trainers.optimisation import OptimizerConfig, ScheduleConfig
from trainers.precision import PrecisionConfig
from trainers.trainer import Trainer, TrainerConfig
from trainers.watching import WatchConfig

SKIP = WatchConfig(monitor=False, on_nonfinite="skip")
ROLLBACK = WatchConfig(monitor=False, on_nonfinite="rollback", snapshot_every=1)


def next_batch(trainer: Trainer, task: int = 0) -> Batch:
    return next(trainer.stream.batches(task, 0))


def weights(trainer: Trainer) -> Tensor:
    return torch.cat([value.flatten().double() for value in trainer.network.state_dict().values()])


def spoilt(batch: Batch, value: float = math.nan) -> Batch:
    inputs = batch.inputs.clone()
    inputs[1, 0, 0, 0] = value
    return batch._replace(inputs=inputs)


def norms(trainer: Trainer) -> list[nn.BatchNorm2d]:
    return [module for module in trainer.network.modules() if isinstance(module, nn.BatchNorm2d)]


def test_s1_statistics_stay_frozen_through_evaluation_and_the_next_task(make: MakeTrainer) -> None:
    trainer = make(trainer=TrainerConfig(freeze_bn="on"))
    take_steps(trainer, 3)
    trainer.end_task(0)
    means = [layer.running_mean.clone() for layer in norms(trainer)]

    take_steps(trainer, 3, task=1)

    assert all(torch.equal(mean, layer.running_mean) for mean, layer in zip(means, norms(trainer), strict=True))
    assert trainer.results.train_eval_gaps == [0]


def test_s2_freezing_toggles_no_tracking_flag_and_both_modes_normalise_alike(make: MakeTrainer) -> None:
    trainer = make(trainer=TrainerConfig(freeze_bn="on"))
    take_steps(trainer, 3)
    trainer.end_task(0)

    assert all(layer.track_running_stats for layer in norms(trainer))
    assert trainer.gap(1) == 0


def test_s4_a_wrong_class_at_a_large_logit_still_gets_a_gradient(make: MakeTrainer) -> None:
    trainer = make(network=NetworkConfig(name="mnistmlp"), buffer=BufferConfig(clamp_logits=10))
    batch = next_batch(trainer)
    with torch.no_grad():
        trainer.network.classifier.bias[9] = 14.0

    trainer.train_step(batch)

    assert trainer.network.classifier.bias.grad[9] > 0.9


def test_s5_an_infinite_logit_is_refused_before_the_clamp_could_make_it_ten(make: MakeTrainer) -> None:
    buffer = make(buffer=BufferConfig(clamp_logits=10)).step.method.buffer
    logits = torch.zeros(2, 10)
    logits[0, 0] = math.inf

    buffer.insert(torch.rand(2, 1, 28, 28), torch.zeros(2, dtype=torch.int64), logits, torch.ones(2), 0)

    assert buffer.uids.tolist() == [0]
    assert buffer.logits.abs().max() == 0


@pytest.mark.parametrize("labels", [torch.full((32,), 200), torch.full((32,), -1), torch.full((32,), 1.0)])
def test_s6_labels_are_judged_by_range_and_dtype_not_by_isfinite(make: MakeTrainer, labels: Tensor) -> None:
    trainer = make()
    before = weights(trainer)

    with pytest.raises(UsageError, match="labels"):
        trainer.train_step(next_batch(trainer)._replace(labels=labels))

    assert torch.equal(weights(trainer), before)


def test_s7_a_run_whose_weights_are_gone_ends_instead_of_returning_zeros(make: MakeTrainer) -> None:
    trainer = make(watch=WatchConfig(monitor=False, on_nonfinite="rollback", max_skips=3))
    with torch.no_grad():
        trainer.network.stages[0][0].conv1.weight[0] = math.nan  # not the classifier

    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        take_steps(trainer, 10)


def test_s8_a_bad_batch_does_not_reach_the_statistics_of_batch_norm(make: MakeTrainer) -> None:
    trainer = make(watch=SKIP)
    take_steps(trainer, 2)
    before = weights(trainer)

    assert trainer.train_step(spoilt(next_batch(trainer))) is None

    assert torch.equal(weights(trainer), before)
    assert all(layer.running_var.isfinite().all() for layer in norms(trainer))


def test_s9_a_rollback_brings_the_momentum_back_with_the_weights(make: MakeTrainer) -> None:
    trainer = make(watch=ROLLBACK, optimizer=OptimizerConfig(momentum=0.9))
    take_steps(trainer, 3)
    for state in trainer.step.optimizer.state.values():
        state["momentum_buffer"].fill_(math.nan)
    batch = next_batch(trainer)

    trainer.train_step(batch)
    loss = trainer.train_step(batch)

    assert loss is not None
    assert loss.isfinite()
    assert weights(trainer).isfinite().all()


def test_s10_a_skipped_step_is_skipped_whole(make: MakeTrainer) -> None:
    trainer = make(watch=SKIP, optimizer=OptimizerConfig(momentum=0.9), buffer=BufferConfig(sanitise=False))
    take_steps(trainer, 2)
    buffer, state = trainer.step.method.buffer, copy.deepcopy(trainer.step.optimizer.state_dict()["state"])
    buffer.logits[:] = 3e38  # finite, and its square is not

    loss = trainer.train_step(next_batch(trainer))

    assert loss is None
    assert buffer.num_steps == 2
    for key, held in trainer.step.optimizer.state_dict()["state"].items():
        assert torch.equal(held["momentum_buffer"], state[key]["momentum_buffer"])


@pytest.mark.parametrize(("scale", "moves"), [(1e25, True), (math.inf, False)])
def test_s11_clipping_neither_zeroes_huge_gradients_nor_spreads_infinite_ones(
    make: MakeTrainer, scale: float, moves: bool
) -> None:
    trainer = make(network=NetworkConfig(name="mnistmlp"), clip_norm=1.0, watch=SKIP)
    trainer.network.classifier.bias.register_hook(lambda gradient: gradient.sign() * scale)
    before = weights(trainer)

    trainer.train_step(next_batch(trainer))

    assert weights(trainer).isfinite().all()
    assert torch.equal(weights(trainer), before) is not moves


def test_s12_the_norm_that_is_reported_is_the_one_before_clipping(make: MakeTrainer) -> None:
    free, clipped = make(), make(clip_norm=0.01)

    for trainer in (free, clipped):
        take_steps(trainer, 1)

    assert clipped.step.grad_norm == free.step.grad_norm > 0.01


def test_s13_a_step_that_did_not_count_is_none_and_counted_not_a_loss_of_zero(make: MakeTrainer) -> None:
    trainer = make(watch=SKIP)
    take_steps(trainer, 1)
    batch = spoilt(next_batch(trainer))

    loss = trainer.train_step(batch)
    trainer.count(batch, loss)

    assert loss is None
    assert trainer.results.num_skipped == 1
    assert math.isnan(trainer.results.last_loss)


def test_s14_every_task_trains_at_the_schedules_rate_whatever_happened_to_the_optimizer(make: MakeTrainer) -> None:
    trainer = make(schedule=ScheduleConfig(over_tasks="on"), network=NetworkConfig(name="mnistmlp"))
    rates = []

    for task in range(5):
        for group in trainer.step.optimizer.param_groups:
            group["lr"] = 123.0  # what rebuilding an optimizer does: the base rate is back
        take_steps(trainer, 1, task)
        rates.append(trainer.step.optimizer.param_groups[0]["lr"])

    expected = [max(0.1, 0.5 * (1 + math.cos(math.pi * task / 5))) * 0.03 for task in range(5)]
    assert rates == pytest.approx(expected)


def test_s15_a_scoring_that_raises_leaves_every_module_in_its_mode(
    make: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(method="causal-der", causal=CausalConfig(refresh_every=1), trainer=TrainerConfig(freeze_bn="on"))
    take_steps(trainer, 2)
    trainer.end_task(0)
    trainer.begin_task(1)
    modes = [module.training for module in trainer.network.modules()]

    def fail(*_: object) -> Tensor:
        raise ZeroDivisionError

    monkeypatch.setattr("trainers.methods.causal_der.heuristic_importance", fail)
    with pytest.raises(ZeroDivisionError):
        trainer.train_step(next_batch(trainer, 1))

    assert [module.training for module in trainer.network.modules()] == modes
    assert not any(layer.training for layer in norms(trainer))


def test_s16_the_graph_is_fitted_by_its_own_means_and_not_dropped(make: MakeTrainer) -> None:
    trainer = make(method="causal-der", causal=CausalConfig(graph_sparsity=0.0))
    for task in (0, 1):
        take_steps(trainer, 4, task)
        trainer.end_task(task)

    graph = trainer.results.facts["task_graph"]

    assert len(graph) == 2
    assert graph[0][1] != 0


def test_s18_the_stored_logits_are_those_of_the_training_forward(make: MakeTrainer) -> None:
    trainer = make(method="der")
    take_steps(trainer, 2)
    batch, twin = next_batch(trainer), copy.deepcopy(trainer.network)

    trainer.train_step(batch)

    stored = trainer.step.method.buffer.logits[-len(batch.labels) :]
    assert torch.equal(stored, twin(batch.inputs).detach())
    assert torch.equal(twin.bn1.running_mean != trainer.network.bn1.running_mean, torch.ones(16, dtype=torch.bool))


def test_s18_no_forward_sees_inputs_that_were_not_normalised(make: MakeTrainer) -> None:
    trainer = make()
    seen: list[Tensor] = []
    trainer.network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    class Marked(type(trainer.stream.transform)):  # type: ignore[misc]
        def normalise(self, examples: Tensor) -> Tensor:
            return examples - 100

    for transform in (trainer.stream.transform, trainer.step.method.transform):
        transform.__class__ = Marked
    take_steps(trainer, 2)

    assert len(seen) == 4  # the batch of the first step; batch and two replays of the second
    assert all(inputs.max() <= -99 for inputs in seen)


def test_s19_teachers_are_stored_raw_in_float32(make: MakeTrainer) -> None:
    buffer = make().step.method.buffer
    logits = torch.tensor([[64.25, -33.1, *[0.0] * 8]])

    buffer.insert(torch.rand(1, 1, 28, 28), torch.zeros(1, dtype=torch.int64), logits, torch.ones(1), 0)

    assert buffer.logits.dtype == torch.float32
    assert torch.equal(buffer.logits, logits)


def test_s20_the_checks_bring_as_few_numbers_to_the_host_for_many_parameters_as_for_few(
    make: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for name in ("mnistmlp", "resnet8"):
        trainer = make(network=NetworkConfig(name=name, pool=4, norm="group"))
        take_steps(trainer, 2)
        batch, brought = next_batch(trainer), 0
        with monkeypatch.context() as patch:
            for method in ("__bool__", "__float__", "__int__", "item", "tolist"):
                original = getattr(Tensor, method)

                def counted(tensor: Tensor, original: object = original) -> object:
                    nonlocal brought
                    brought += 1
                    return original(tensor)  # type: ignore[operator]

                patch.setattr(Tensor, method, counted)
            trainer.train_step(batch)
        counts.append(brought)

    assert counts[0] == counts[1]


def test_s21_what_went_wrong_is_in_structured_files_and_the_exit_code(tmp_path: Path) -> None:
    flags = ["--backbone", "mnistmlp", "--lr", "1e30", "--stop_after", "1", "--non_verbose", "1", "--monitor", "0"]

    ended = main([*flags, "--run_dir", str(tmp_path / "raised")])
    recorded = main([*flags, "--on_nonfinite", "record", "--run_dir", str(tmp_path / "recorded")])

    assert (ended, recorded) == (1, 0)
    assert json.loads((tmp_path / "recorded" / "results.json").read_text())["num_skipped"] > 0


def test_s22_a_rollback_keeps_the_rehearsal_memory_and_the_learning_rate(make: MakeTrainer) -> None:
    trainer = make(watch=ROLLBACK)
    take_steps(trainer, 4)
    buffer = trainer.step.method.buffer
    uids = buffer.uids.clone()
    with torch.no_grad():
        trainer.network.classifier.weight[0] = math.inf

    assert trainer.train_step(next_batch(trainer)) is None

    assert len(buffer) >= len(uids) - 32  # back at most one step
    assert trainer.step.optimizer.param_groups[0]["lr"] == 0.03


def test_s23_replay_weights_are_constant_unless_asked_otherwise(make: MakeTrainer) -> None:
    constant = make(replay=ReplayConfig(alpha=0.3, beta=0.4)).step.method
    falling = make(replay=ReplayConfig(alpha=0.3, beta=0.4, adaptive="on")).step.method

    assert [constant.weights(task) for task in (0, 4)] == [(0.3, 0.4)] * 2
    assert falling.weights(4) == pytest.approx((0.15, 0.2))


def test_s24_float16_covers_every_forward_and_true_gradients_are_clipped(make: MakeTrainer) -> None:
    trainer = make(
        network=NetworkConfig(name="mnistmlp"),
        precision=PrecisionConfig(format="fp16"),
        clip_norm=1e-3,
    )
    dtypes: list[torch.dtype] = []
    trainer.network.fc1.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))

    take_steps(trainer, 2)

    assert dtypes == [torch.float16] * 4
    assert trainer.step.grad_norm < 100  # not times the scale of 4,096
    total = torch.linalg.vector_norm(torch.stack([g.norm() for g in trainer.step.gradients()]))
    assert float(total) == pytest.approx(1e-3, rel=1e-3)


def test_s25_every_step_is_counted_and_every_stored_sample_has_an_importance(make: MakeTrainer) -> None:
    trainer = make(watch=SKIP, method="causal-der")
    take_steps(trainer, 2)
    batch = spoilt(next_batch(trainer))
    trainer.count(batch, trainer.train_step(batch))

    assert trainer.results.num_steps == 3
    assert len(trainer.step.method.buffer.importance) == 64
    assert trainer.step.method.buffer.importance.isfinite().all()


def test_every_trap_has_a_test_or_a_reason() -> None:
    tests = Path(__file__).parents[1]
    text = "".join(path.read_text() for path in tests.rglob("test_*.py"))
    named = set(re.findall(r"def test_([so]\d+)_", text))

    reasons = {"s3", "s17", "o26"}
    expected = {f"s{number}" for number in range(1, 26)} | {f"o{number}" for number in range(1, 29)}
    assert expected - named - reasons == set()
