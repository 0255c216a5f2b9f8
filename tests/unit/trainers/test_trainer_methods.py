import copy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, mse_loss

from trainers.experiment import ExperimentConfig, build_trainer
from trainers.methods.sgd import ReplayConfig
from trainers.networks import NetworkConfig
from trainers.progress import NoProgress
from trainers.trainer import Trainer
from trainers.watching import WatchConfig

LR, ALPHA, BETA = 0.03, 0.3, 0.5


def make_trainer(folder: Path, method: str, **replay: object) -> Trainer:
    config = ExperimentConfig(
        run_dir=folder,
        method=method,
        seed=3,
        network=NetworkConfig(pool=4),
        watch=WatchConfig(monitor=False),
        replay=ReplayConfig(alpha=ALPHA, beta=BETA, **replay),
    )
    trainer = build_trainer(config, NoProgress())
    trainer.begin_task(0)
    for batch, _ in zip(trainer.stream.batches(0, 0), range(3), strict=False):
        trainer.train_step(batch)
    return trainer


@pytest.mark.parametrize(
    ("method", "replay"),
    [
        ("sgd", {}),
        ("joint", {}),
        ("er", {}),
        ("der", {}),
        ("der", {"kd": "kl", "temperature": 3.0}),
        ("derpp", {"draws": 1}),
        ("derpp", {"kd": "kl"}),
    ],
)
def test_a_step_of_every_method_is_its_definition_bit_for_bit(
    tmp_path: Path, method: str, replay: dict[str, object]
) -> None:
    trainer = make_trainer(tmp_path / "run", method, **replay)
    buffer, batch = trainer.step.method.buffer, next(trainer.stream.batches(0, 0))
    network, draws = copy.deepcopy(trainer.network), buffer.generator.clone_state()
    examples, labels, logits = buffer.examples.clone(), buffer.labels.clone(), buffer.logits.clone()

    trainer.train_step(batch)

    def drawn() -> torch.Tensor:
        return torch.randperm(len(labels), generator=draws)[:32]

    def distilled(outputs: torch.Tensor, teachers: torch.Tensor) -> torch.Tensor:
        if replay.get("kd") != "kl":
            return mse_loss(outputs, teachers)
        heat = replay.get("temperature", 2.0)
        student, teacher = (outputs / heat).log_softmax(1), (teachers / heat).log_softmax(1)
        return heat**2 * kl_div(student, teacher, reduction="batchmean", log_target=True)

    if method in ("sgd", "joint"):
        loss = cross_entropy(network(batch.inputs), batch.labels)
    elif method == "er":
        slots = drawn()
        outputs = network(torch.cat([batch.inputs, examples[slots]]))
        loss = cross_entropy(outputs, torch.cat([batch.labels, labels[slots]]))
    else:
        loss = cross_entropy(network(batch.inputs), batch.labels)
        slots = drawn()
        outputs = network(examples[slots])
        loss = loss + ALPHA * distilled(outputs, logits[slots])
        if method == "derpp" and replay.get("draws") == 1:
            loss = loss + BETA * cross_entropy(outputs, labels[slots])
        elif method == "derpp":
            slots = drawn()
            loss = loss + BETA * cross_entropy(network(examples[slots]), labels[slots])
    loss.backward()
    torch.optim.SGD(network.parameters(), lr=LR).step()
    for (name, expected), actual in zip(
        network.state_dict().items(), trainer.network.state_dict().values(), strict=True
    ):
        assert torch.equal(actual, expected), name


@pytest.mark.parametrize(("method", "stores"), [("sgd", False), ("joint", False), ("er", True), ("der", True)])
def test_only_methods_that_replay_store(tmp_path: Path, method: str, stores: bool) -> None:
    trainer = make_trainer(tmp_path / "run", method)

    assert trainer.step.method.buffer.n_seen == (96 if stores else 0)


def test_er_stores_the_batch_alone_not_what_it_replayed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", "er")
    batch = next(trainer.stream.batches(0, 0))

    trainer.train_step(batch)

    assert torch.equal(trainer.step.method.buffer.examples[-32:], batch.examples)


@pytest.mark.parametrize("method", ["er", "der", "derpp", "causal-der"])
def test_a_buffer_whose_every_slot_has_gone_bad_is_emptied_and_the_step_goes_on(tmp_path: Path, method: str) -> None:
    trainer = make_trainer(tmp_path / "run", method)
    trainer.step.method.buffer.logits[:] = float("nan")

    loss = trainer.train_step(next(trainer.stream.batches(0, 0)))

    assert loss is not None
    assert loss.isfinite()
    assert len(trainer.step.method.buffer) == 32


@pytest.mark.parametrize("method", ["sgd", "er", "derpp", "causal-der"])
def test_the_asymmetric_cross_entropy_of_a_batch_is_that_over_its_own_and_later_classes(
    tmp_path: Path, method: str
) -> None:
    trainer = make_trainer(tmp_path / "run", method, asymmetric_ce=True)
    batch = next(trainer.stream.batches(2, 0))
    logits = torch.randn(len(batch.labels), 10, requires_grad=True)

    loss = trainer.step.method.losses(batch, logits, None)["ce"]
    loss.backward()

    assert batch.task == 2
    assert torch.equal(loss, cross_entropy(logits[:, 4:], batch.labels - 4))
    assert not logits.grad[:, :4].any()


def test_replays_decide_among_all_classes_beside_an_asymmetric_cross_entropy(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", "er", asymmetric_ce=True)
    method, batch = trainer.step.method, next(trainer.stream.batches(2, 0))
    draws = method.draw(batch)
    logits = torch.randn(64, 10)

    loss = method.losses(batch, logits, draws)["ce"]

    own = cross_entropy(logits[:32, 4:], batch.labels - 4)
    torch.testing.assert_close(loss, (own + cross_entropy(logits[32:], draws.ce.labels)) / 2)
