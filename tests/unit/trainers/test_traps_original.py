"""Traps O1 to O28, those of the first Causal-DER implementations, where they concern the trainer.

O26 is X-DER's logit transplant, which this trainer does not have.
"""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from trainer_steps import MakeTrainer, take_steps

from trainers.batch import Batch
from trainers.buffer import BufferConfig, ReplayBuffer
from trainers.graph import acyclicity, task_graph
from trainers.importance import FLOOR, blended_probabilities, head_influence, heuristic_importance
from trainers.intervention import Intervention, Samples
from trainers.irm import irm_penalty
from trainers.methods.causal_der import CausalConfig
from trainers.networks import NETWORKS, NetworkConfig, build_network
from trainers.seeding import generator
from trainers.trainer import Trainer
from trainers.watching import WatchConfig

MODES = [1, 2, 3, 4]
SKIP = WatchConfig(monitor=False, on_nonfinite="skip")


def scoring(make: MakeTrainer, mode: int, **options: object) -> Trainer:
    causal = CausalConfig(
        mode=mode, weight=0.9, warmup_tasks=0, refresh_every=1, interval=1, num_interventions=4, num_probes=8,
        hybrid_candidates=8, **options,
    )  # fmt: skip
    trainer = make(method="causal-der", causal=causal)
    take_steps(trainer, 3)
    return trainer


def next_batch(trainer: Trainer, task: int = 1) -> Batch:
    return next(trainer.stream.batches(task, 0))


def statistics(network: nn.Module) -> Tensor:
    return torch.cat([entry.double().flatten() for entry in network.buffers()])


def plain_buffer(size: int, **options: object) -> ReplayBuffer:
    return ReplayBuffer(BufferConfig(size=size, **options), (1,), 10, generator(0, "buffer"))


def offer(buffer: ReplayBuffer, count: int, task: int = 0, importance: float = 1.0) -> None:
    labels = torch.full((count,), task % 10)
    buffer.insert(torch.zeros(count, 1), labels, torch.zeros(count, 10), torch.full((count,), importance), task)


def test_o1_the_graph_adds_no_term_to_the_loss(make: MakeTrainer) -> None:
    trainer = scoring(make, 1)
    batch = next_batch(trainer)
    draws = trainer.step.method.draw(batch)

    terms = trainer.step.method.losses(batch, trainer.step.method.forward(batch, draws), draws)

    assert set(terms) == {"ce", "kd", "replay_ce"}


@pytest.mark.parametrize("scale", [1.0, 3.0, 5.0])
def test_o2_the_acyclicity_of_large_weights_is_finite(scale: float) -> None:
    assert math.isfinite(acyclicity(torch.full((10, 10), scale)))


def test_o3_an_intervention_intervenes_and_its_failure_is_not_hidden(
    make: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = scoring(make, 3)
    _, effects = trainer.step.method.intervene(next_batch(trainer))
    assert len(set(effects.tolist())) == 4

    def fail(*_: object) -> Tensor:
        raise RuntimeError("Sizes of tensors must match")

    monkeypatch.setattr(Intervention, "effect", fail)
    with pytest.raises(RuntimeError, match="Sizes"):
        trainer.train_step(next_batch(trainer))


def test_o4_the_dummy_scale_multiplies_the_logits_not_the_loss() -> None:
    logits, labels = torch.tensor([[-30.0, 30.0]]), torch.tensor([0])

    flat = irm_penalty([(torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))])
    steep = irm_penalty([(logits, labels)])

    assert flat == 0  # a loss of log 2, and no slope
    assert float(steep) == pytest.approx(60.0**2)


def test_o5_a_bad_sample_is_kept_out_of_the_forward_not_zeroed_in_the_loss(make: MakeTrainer) -> None:
    trainer = make(watch=SKIP)
    take_steps(trainer, 2)
    batch = next_batch(trainer, 0)
    inputs = batch.inputs.clone()
    inputs[0] = math.nan

    loss = trainer.train_step(batch._replace(inputs=inputs))

    assert loss is None
    assert all(entry.isfinite().all() for entry in trainer.network.parameters())
    assert all(entry.grad is None or entry.grad.isfinite().all() for entry in trainer.network.parameters())


def test_o6_a_loss_that_is_not_finite_is_never_replaced_by_a_number(make: MakeTrainer) -> None:
    trainer = make(watch=WatchConfig(monitor=False, on_nonfinite="record"))
    with torch.no_grad():
        trainer.network.classifier.bias[0] = math.nan

    loss = trainer.train_step(next_batch(trainer, 0))

    assert loss is not None
    assert loss.isnan()


def test_o7_a_bad_replay_term_does_not_leave_fine_tuning_behind(make: MakeTrainer) -> None:
    trainer = make(watch=SKIP, buffer=BufferConfig(sanitise=False))
    take_steps(trainer, 2)
    trainer.step.method.buffer.logits[:] = 3e38
    before = copy.deepcopy(trainer.network.state_dict())

    loss = trainer.train_step(next_batch(trainer, 0))

    assert loss is None
    assert trainer.step.guards.validation.num_acted == 1
    assert all(torch.equal(before[name], value) for name, value in trainer.network.state_dict().items())


@pytest.mark.parametrize("mode", [1, 4])
def test_o8_scores_come_from_one_forward_in_eval_mode(make: MakeTrainer, mode: int) -> None:
    trainer = scoring(make, mode)
    forwards: list[tuple[int, bool]] = []
    trainer.network.bn1.register_forward_hook(
        lambda module, inputs, output: forwards.append((len(inputs[0]), module.training))
    )
    before = statistics(trainer.network)

    trainer.step.method.refresh(next_batch(trainer))

    assert forwards == [(len(trainer.step.method.buffer), False)]
    assert torch.equal(statistics(trainer.network), before)


@pytest.mark.parametrize("mode", MODES)
def test_o9_no_scoring_moves_statistics_gradients_or_modes(make: MakeTrainer, mode: int) -> None:
    trainer = scoring(make, mode)
    before, modes = statistics(trainer.network), [module.training for module in trainer.network.modules()]
    gradients = [entry.grad.clone() for entry in trainer.network.parameters()]

    trainer.step.method.refresh(next_batch(trainer))

    assert torch.equal(statistics(trainer.network), before)
    assert [module.training for module in trainer.network.modules()] == modes
    found = [entry.grad for entry in trainer.network.parameters()]
    assert all(torch.equal(*pair) for pair in zip(gradients, found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_o10_importance_of_logits_whose_exponential_overflows_is_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[300.0, 0.0], [0.0, 300.0]], dtype=dtype)
    labels = torch.tensor([0, 0])

    assert heuristic_importance(logits, labels).isfinite().all()
    assert head_influence(torch.ones(2, 3), logits, labels).isfinite().all()


def test_o11_a_logit_beyond_float16_is_stored_as_it_is() -> None:
    buffer = plain_buffer(2)

    buffer.insert(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), torch.full((1, 10), 7e4), torch.ones(1), 0)

    assert buffer.logits.dtype == buffer.examples.dtype == torch.float32
    assert buffer.logits.max() == 7e4


@pytest.mark.parametrize("policy", ["reservoir", "class_balanced", "importance"])
def test_o12_every_offer_is_counted(policy: str) -> None:
    buffer = plain_buffer(8, policy=policy)

    for _ in range(5):
        offer(buffer, 7)

    assert buffer.n_seen == 35
    assert buffer.uids.max() > 27  # later offers get in as well
    assert buffer.uids.max() <= 34


def test_o13_ten_tasks_of_equal_size_hold_about_as_many_slots_each() -> None:
    buffer = plain_buffer(500)

    for task in range(10):
        for _ in range(50):
            offer(buffer, 100, task)

    counts = torch.bincount(buffer.task_labels, minlength=10)
    assert counts.sum() == 500
    assert 25 <= counts.min() <= counts.max() <= 80


@pytest.mark.parametrize("mode", [1, 4])
def test_o14_scores_follow_the_network_instead_of_staying_what_they_were(make: MakeTrainer, mode: int) -> None:
    trainer = scoring(make, mode)
    method = trainer.step.method
    method.refresh(next_batch(trainer))
    before = method.buffer.importance.clone()
    with torch.no_grad():
        trainer.network.classifier.weight.neg_()

    method.refresh(next_batch(trainer))

    assert not torch.equal(method.buffer.importance, before)


def test_o15_the_newest_task_has_edges_in_its_column() -> None:
    torch.manual_seed(0)
    first = torch.randn(300)
    responses = torch.stack([first, torch.randn(300), first + 0.3 * torch.randn(300)], 1)

    graph = task_graph(responses, 0.1)

    assert graph[0, 2] > 0.5
    assert not graph[2].any()


def test_o16_edges_come_from_the_present_network_and_unrelated_tasks_have_none(make: MakeTrainer) -> None:
    torch.manual_seed(0)
    unrelated = torch.randn(2000, 3).relu() + 5  # the cosine of such means is nearly 1 for any pair
    assert not task_graph(unrelated, 0.1).any()

    trainer = scoring(make, 1, graph_sparsity=0.01)
    take_steps(trainer, 3, task=1)
    before = trainer.step.method.task_graph(1)
    with torch.no_grad():
        trainer.network.classifier.weight[:2].neg_()
    after = trainer.step.method.task_graph(1)

    assert before is not None
    assert after is not None
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", NETWORKS)
def test_o17_every_network_has_features_its_classifier_turns_into_logits(name: str) -> None:
    network = build_network(NetworkConfig(name=name), (1, 28, 28), 10).eval()
    images = torch.rand(2, 1, 28, 28)

    assert torch.equal(network.classifier(network.features(images)), network(images))


def test_o18_samples_are_known_by_numbers_that_are_never_used_again() -> None:
    buffer = plain_buffer(4)
    seen: set[int] = set()

    for _ in range(20):
        offer(buffer, 3)
        before = seen.copy()
        seen |= set(buffer.uids.tolist())
        buffer.logits[0] = math.nan
        buffer.quarantine()
        assert len(set(buffer.uids.tolist())) == len(buffer)
        assert all(uid in before or uid >= buffer.n_seen - 3 for uid in buffer.uids.tolist())


def test_o19_both_sides_of_an_intervention_share_the_batch_the_probes_and_the_optimizers_own_step(
    make: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = scoring(make, 3)
    made: list[Intervention] = []
    original = Intervention.__init__

    def noted(self: Intervention, *args: object, **options: object) -> None:
        original(self, *args, **options)  # type: ignore[arg-type]
        made.append(self)

    monkeypatch.setattr(Intervention, "__init__", noted)
    batch = next_batch(trainer)
    slots, _ = trainer.step.method.intervene(batch)

    assert made[0].lr == trainer.step.optimizer.param_groups[0]["lr"]
    assert torch.equal(made[0].step.inputs, batch.inputs)
    candidates = trainer.step.method.inputs(slots).flatten(1)
    distances = torch.cdist(candidates, made[0].probes.inputs.flatten(1))
    assert distances.min() > 0
    unchanged = Samples(batch.inputs[:0], batch.labels[:0])
    assert unchanged.labels.numel() == 0
    assert torch.equal(made[0].probe_loss(made[0].updated(None)), made[0].baseline)


def test_o20_every_field_of_the_causal_configuration_is_reached_by_a_flag() -> None:
    from dataclasses import fields

    from trainers import flags
    from trainers.cli import configure

    given = {
        "--use_causal_sampling": "3", "--causal_weight": "0.5", "--causal_warmup_tasks": "7",
        "--importance_refresh": "8", "--causal_eval_interval": "9", "--causal_num_interventions": "10",
        "--causal_hybrid_candidates": "11", "--causal_num_probes": "12", "--true_micro_steps": "13",
        "--true_temp_lr": "0.14", "--irm_weight": "0.15", "--enable_causal_graph_learning": "0",
        "--graph_order": "free", "--graph_sparsity": "0.16", "--isolate_causal": "0",
        "--causal_balance": "past",
    }  # fmt: skip
    command = [part for pair in given.items() for part in pair]

    changed, default = configure(flags.parse(command), ()).causal, CausalConfig()

    assert all(getattr(changed, field.name) != getattr(default, field.name) for field in fields(CausalConfig))


def test_o21_influence_is_the_product_of_gradients_with_the_right_sign() -> None:
    torch.manual_seed(0)
    head, features, labels = (
        nn.Linear(3, 2).double(),
        torch.randn(4, 3, dtype=torch.float64),
        torch.tensor([0, 1, 0, 1]),
    )
    single = [
        torch.cat(
            [part.flatten() for part in torch.autograd.grad(cross_entropy(head(f[None]), y[None]), head.parameters())]
        )
        for f, y in zip(features, labels, strict=True)
    ]

    found = head_influence(features, head(features).detach(), labels)

    expected = [-sum(single[j] @ single[i] for j in range(4) if j != i) / 3 for i in range(4)]
    assert torch.allclose(found, torch.stack([torch.as_tensor(value) for value in expected]).detach())


def test_o22_replays_are_normalised_and_augmented_like_the_stream(make: MakeTrainer) -> None:
    trainer = make()
    take_steps(trainer, 2)
    method = trainer.step.method
    method.transform.normalises, method.transform.mean, method.transform.padding = True, torch.tensor(0.5), 4

    replay = method.replay(None)

    stored = method.buffer.examples[replay.slots]
    assert replay.inputs.min() < 0
    assert not torch.equal(replay.inputs, stored - 0.5)


def test_o23_a_sample_drawn_again_is_augmented_afresh(make: MakeTrainer) -> None:
    trainer = make(buffer=BufferConfig(size=4, minibatch_size=4))
    take_steps(trainer, 1)
    method = trainer.step.method
    method.transform.padding = 4

    first, second = method.replay(None), method.replay(None)

    order, again = first.slots.argsort(), second.slots.argsort()
    assert torch.equal(first.slots[order], second.slots[again])
    assert not torch.equal(first.inputs[order], second.inputs[again])


@pytest.mark.parametrize("mode", MODES)
def test_o24_nothing_grows_with_the_number_of_steps(make: MakeTrainer, mode: int) -> None:
    trainer = scoring(make, mode)

    def size(value: object) -> int:
        if isinstance(value, Tensor):
            return value.numel()
        if isinstance(value, dict | list | tuple | set):
            entries = value.values() if isinstance(value, dict) else value
            return 1 + sum(map(size, entries))
        return 1

    def held() -> int:
        parts = (trainer.step.method, trainer.step.method.buffer, trainer.step)
        return sum(size({name: part for name, part in vars(owner).items() if name != "guards"}) for owner in parts)

    take_steps(trainer, 8, task=1)
    before = held()
    take_steps(trainer, 8, task=1)

    assert held() == before


@pytest.mark.parametrize("mode", MODES)
def test_o25_scoring_draws_from_its_own_generator_alone(make: MakeTrainer, mode: int) -> None:
    trainer = scoring(make, mode)
    method = trainer.step.method
    streams = (method.buffer.generator, method.transform.generator, trainer.stream.transform.generator)
    before = [torch.get_rng_state(), *(stream.get_state() for stream in streams)]

    method.refresh(next_batch(trainer))

    after = [torch.get_rng_state(), *(stream.get_state() for stream in streams)]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_o27_equal_losses_do_not_make_the_scaling_divide_by_zero() -> None:
    scores = heuristic_importance(torch.zeros(5, 3), torch.zeros(5, dtype=torch.int64))

    assert torch.equal(scores, torch.zeros(5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_o28_scores_that_are_no_weights_count_as_the_least_and_the_draw_goes_on(bad: float) -> None:
    importance = torch.tensor([bad, 1.0, 0.5, bad])

    probabilities = blended_probabilities(importance, 1.0)

    assert float(probabilities[0]) == pytest.approx(FLOOR / (1.5 + 2 * FLOOR))
    assert torch.multinomial(probabilities, 4).sort().values.tolist() == [0, 1, 2, 3]
