import copy
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from stabilitykit.errors import UsageError
from trainers.batch import Batch
from trainers.buffer import BufferConfig
from trainers.experiment import ExperimentConfig, build_trainer
from trainers.methods.causal_der import CausalConfig
from trainers.networks import NetworkConfig
from trainers.optimisation import OptimizerConfig
from trainers.precision import PrecisionConfig
from trainers.progress import NoProgress
from trainers.trainer import Trainer
from trainers.watching import WatchConfig

BARE = WatchConfig(monitor=False)
UNSANITISED = BufferConfig(sanitise=False)


def make_trainer(folder: Path, **options: object) -> Trainer:
    defaults: dict[str, object] = {"network": NetworkConfig(pool=2), "watch": BARE, "seed": 3, "method": "derpp"}
    return build_trainer(ExperimentConfig(run_dir=folder, **(defaults | options)), NoProgress())


def take_steps(trainer: Trainer, count: int, task: int = 0) -> None:
    trainer.begin_task(task)
    for batch, _ in zip(trainer.stream.batches(task, 0), range(count), strict=False):
        trainer.train_step(batch)


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in trainer.network.state_dict().values()])


def test_a_step_is_the_ten_line_definition_of_derpp_bit_for_bit(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    take_steps(trainer, 3)
    buffer, batch = trainer.step.method.buffer, next(trainer.stream.batches(0, 0))
    network, generator = copy.deepcopy(trainer.network), buffer.generator.clone_state()
    examples, labels, logits = buffer.examples.clone(), buffer.labels.clone(), buffer.logits.clone()

    trainer.train_step(batch)

    optimizer = torch.optim.SGD(network.parameters(), lr=0.03)
    first, second = (torch.randperm(len(labels), generator=generator)[:32] for _ in range(2))
    outputs = network(batch.inputs)
    loss = cross_entropy(outputs, batch.labels)
    loss = loss + 0.3 * mse_loss(network(examples[first]), logits[first])
    loss = loss + 0.5 * cross_entropy(network(examples[second]), labels[second])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for (name, expected), actual in zip(
        network.state_dict().items(), trainer.network.state_dict().values(), strict=True
    ):
        assert torch.equal(actual, expected), name
    assert torch.equal(buffer.logits[-len(batch.labels) :], outputs.detach())


@pytest.mark.parametrize("mode", [1, 2, 3, 4])
def test_a_causal_computation_whose_result_is_unused_changes_no_bit(tmp_path: Path, mode: int) -> None:
    plain = make_trainer(tmp_path / "derpp")
    causal = CausalConfig(mode=mode, weight=0.0, refresh_every=1, interval=1, num_interventions=4)
    scored = make_trainer(tmp_path / "causal", method="causal-der", causal=causal)

    for task in (0, 1):
        take_steps(plain, 3, task)
        take_steps(scored, 3, task)

    assert torch.equal(weights(plain), weights(scored))
    assert not torch.equal(plain.step.method.buffer.importance, scored.step.method.buffer.importance)
    assert all(
        mine.training == theirs.training
        for mine, theirs in zip(plain.network.modules(), scored.network.modules(), strict=True)
    )


@pytest.mark.parametrize("mode", [1, 2, 3, 4])
def test_every_importance_mode_changes_what_is_learnt(tmp_path: Path, mode: int) -> None:
    plain = make_trainer(tmp_path / "derpp")
    causal = CausalConfig(mode=mode, weight=0.9, warmup_tasks=1, refresh_every=2, interval=2, num_interventions=16)
    scored = make_trainer(tmp_path / "causal", method="causal-der", causal=causal)

    for task in (0, 1):
        take_steps(plain, 4, task)
        take_steps(scored, 4, task)

    assert not torch.equal(weights(plain), weights(scored))
    assert weights(scored).isfinite().all()
    assert scored.step.method.num_bad_scores == 0


def test_without_isolation_scoring_moves_the_statistics_of_batch_norm(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "derpp")
    causal = CausalConfig(weight=0.0, refresh_every=1, isolate=False)
    leaky = make_trainer(tmp_path / "causal", method="causal-der", causal=causal)

    take_steps(plain, 3)
    take_steps(leaky, 3)

    assert not torch.equal(plain.network.bn1.running_mean, leaky.network.bn1.running_mean)


def test_the_blend_changes_what_is_drawn_once_the_warm_up_is_over(tmp_path: Path) -> None:
    runs = [
        make_trainer(tmp_path / str(weight), method="causal-der", causal=CausalConfig(weight=weight, warmup_tasks=1))
        for weight in (0.0, 1.0)
    ]

    for run in runs:
        take_steps(run, 2, task=0)
    same_in_task_0 = torch.equal(*map(weights, runs))
    for run in runs:
        take_steps(run, 2, task=1)

    assert same_in_task_0
    assert not torch.equal(*map(weights, runs))


def test_a_step_put_back_and_run_again_is_bit_identical(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", method="causal-der")
    take_steps(trainer, 2)
    owners = (trainer.network, trainer.step.optimizer, trainer.step.method.buffer, trainer.step.method.transform)
    before = [copy.deepcopy(owner.state_dict()) for owner in owners]
    batch = next(trainer.stream.batches(1, 0))

    first = trainer.step(batch), weights(trainer)
    for owner, state in zip(owners, before, strict=True):
        owner.load_state_dict(state)
    second = trainer.step(batch), weights(trainer)

    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def spoilt(batch: Batch) -> Batch:
    return batch._replace(inputs=batch.inputs.clone().index_fill_(0, torch.tensor([2]), math.nan))


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_bad_inputs_leave_weights_and_statistics_as_they_were(tmp_path: Path, policy: str) -> None:
    watch = WatchConfig(monitor=False, on_nonfinite=policy, snapshot_every=1)
    trainer = make_trainer(tmp_path / "run", watch=watch)
    take_steps(trainer, 2)
    before = weights(trainer)

    loss = trainer.train_step(spoilt(next(trainer.stream.batches(0, 0))))

    assert loss is None
    assert torch.equal(weights(trainer), before)


def test_bad_weights_are_rolled_back_to_the_last_good_snapshot(tmp_path: Path) -> None:
    watch = WatchConfig(monitor=False, on_nonfinite="rollback", snapshot_every=3)
    trainer = make_trainer(tmp_path / "run", watch=watch)
    take_steps(trainer, 4)
    with torch.no_grad():
        trainer.network.classifier.weight[0, 0] = math.inf

    loss = trainer.train_step(next(trainer.stream.batches(0, 0)))

    assert loss is None
    assert weights(trainer).isfinite().all()
    assert trainer.step.method.buffer.num_steps == 3


def test_with_checks_a_bad_loss_updates_nothing_and_stores_nothing_even_when_it_is_only_recorded(
    tmp_path: Path,
) -> None:
    trainer = make_trainer(
        tmp_path / "run", watch=WatchConfig(monitor=False, on_nonfinite="record"), buffer=UNSANITISED
    )
    take_steps(trainer, 2)
    trainer.step.method.buffer.logits[:] = math.inf
    before = [entry.clone() for entry in trainer.network.parameters()]

    loss = trainer.train_step(next(trainer.stream.batches(0, 0)))

    assert loss is not None
    assert not loss.isfinite()
    assert all(torch.equal(*pair) for pair in zip(before, trainer.network.parameters(), strict=True))
    assert trainer.step.method.buffer.num_steps == 2


def test_without_checks_a_bad_loss_ruins_the_weights(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", watch=WatchConfig(monitor=False, check=False), buffer=UNSANITISED)
    take_steps(trainer, 2)
    trainer.step.method.buffer.logits[:] = math.inf

    trainer.train_step(next(trainer.stream.batches(0, 0)))

    assert not weights(trainer).isfinite().all()


def test_a_scaler_that_overflows_skips_its_step_and_lowers_its_scale(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "run", network=NetworkConfig(name="mnistmlp"), precision=PrecisionConfig(format="fp16")
    )
    scaler = trainer.step.precision.scaler
    scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**40})
    before = weights(trainer)

    take_steps(trainer, 1)

    assert scaler.get_scale() == 2.0**39
    assert torch.equal(weights(trainer), before)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains(tmp_path: Path, precision: str) -> None:
    trainer = make_trainer(
        tmp_path / "run", network=NetworkConfig(name="mnistmlp"), precision=PrecisionConfig(format=precision)
    )
    before = weights(trainer)

    take_steps(trainer, 3)

    assert weights(trainer).isfinite().all()
    assert not torch.equal(weights(trainer), before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.full((32,), 10)}, "labels: got 10, expected 0 to 9"),
        ({"labels": torch.full((32,), -1)}, "labels: got -1, expected 0 to 9"),
        ({"labels": torch.zeros(32)}, "labels: got torch.float32, expected torch.int64"),
        ({"inputs": torch.zeros(32, 3, 8, 8)}, r"batch: got inputs \[32, 3, 8, 8\] with 32 labels, expected"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"with 5 labels, expected"),
    ],
)
def test_a_batch_that_cannot_be_right_is_refused_before_it_touches_anything(
    tmp_path: Path, changes: dict[str, torch.Tensor], message: str
) -> None:
    trainer = make_trainer(tmp_path / "run")
    before = weights(trainer)
    batch = next(trainer.stream.batches(0, 0))._replace(**changes)

    with pytest.raises(UsageError, match=message):
        trainer.train_step(batch)

    assert torch.equal(weights(trainer), before)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": OptimizerConfig(name="adamw")},
        {"optimizer": OptimizerConfig(momentum=0.9, nesterov=True)},
        {"clip_norm": 0.01},
        {"batch_size": 16},
        {"seed": 4},
        {"buffer": BufferConfig(clamp_logits=0.01)},
        {"buffer": BufferConfig(minibatch_size=8)},
    ],
)
def test_every_option_changes_what_is_learned(tmp_path: Path, options: dict[str, object]) -> None:
    plain, other = make_trainer(tmp_path / "plain"), make_trainer(tmp_path / "other", **options)

    take_steps(plain, 2)
    take_steps(other, 2)

    assert not torch.equal(weights(plain), weights(other))


def test_a_buffer_of_which_nothing_is_fit_to_be_replayed_is_emptied_and_the_step_trains_without(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    take_steps(trainer, 2)
    trainer.step.method.buffer.logits[:] = math.inf

    loss = trainer.train_step(next(trainer.stream.batches(0, 0)))

    assert loss is not None
    assert loss.isfinite()
    assert trainer.step.guards.counts()["buffer"] == 1
    assert len(trainer.step.method.buffer) == 32


def test_a_monitored_run_that_rolls_back_is_diagnosed_and_goes_on(tmp_path: Path) -> None:
    watch = WatchConfig(on_nonfinite="rollback", snapshot_every=2)
    trainer = make_trainer(tmp_path / "run", watch=watch, network=NetworkConfig(name="mnistmlp"))
    take_steps(trainer, 4)
    with torch.no_grad():
        trainer.network.classifier.weight[0, 0] = math.inf

    lost = trainer.train_step(next(trainer.stream.batches(0, 0)))
    kept = trainer.train_step(next(trainer.stream.batches(0, 0)))
    trainer.watch.close()

    assert lost is None
    assert kept is not None
    assert weights(trainer).isfinite().all()
    assert trainer.watch.diagnosis.origin.phase == "weights"
    assert list((tmp_path / "run" / "quarantine").iterdir())
