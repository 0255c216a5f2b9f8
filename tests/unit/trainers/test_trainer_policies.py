import math

import pytest
import torch
from torch import Tensor

from stabilitykit.errors import UsageError
from trainers.buffer import BufferConfig, ReplayBuffer
from trainers.seeding import generator

SHAPE, NUM_CLASSES = (1, 2, 2), 5


def make_buffer(policy: str, size: int, seed: int = 0) -> ReplayBuffer:
    return ReplayBuffer(BufferConfig(size=size, policy=policy), SHAPE, NUM_CLASSES, generator(seed, "buffer"))


def offer(buffer: ReplayBuffer, labels: Tensor, importance: Tensor | None = None) -> None:
    count = len(labels)
    importance = torch.ones(count) if importance is None else importance
    buffer.insert(torch.rand(count, *SHAPE), labels, torch.randn(count, NUM_CLASSES), importance, task=0)


@pytest.mark.parametrize("policy", ["reservoir", "class_balanced", "importance"])
def test_every_policy_fills_up_first_and_counts_every_offer(policy: str) -> None:
    buffer = make_buffer(policy, size=10)

    offer(buffer, torch.arange(7) % NUM_CLASSES)
    first = buffer.uids.tolist()
    offer(buffer, torch.arange(40) % NUM_CLASSES)

    assert first == list(range(7))
    assert (len(buffer), buffer.n_seen) == (10, 47)
    assert len(set(buffer.uids.tolist())) == 10


@pytest.mark.parametrize("policy", ["class_balanced", "importance"])
def test_stored_columns_stay_together(policy: str) -> None:
    buffer = make_buffer(policy, size=8)
    labels = torch.arange(64) % NUM_CLASSES

    for part in labels.split(16):
        offer(buffer, part)

    assert torch.equal(buffer.labels, labels[buffer.uids])


def test_a_class_balanced_buffer_holds_as_many_of_the_rare_class_as_of_the_others() -> None:
    buffer = make_buffer("class_balanced", size=20)
    stream = torch.cat([torch.zeros(400), torch.ones(300), torch.full((5,), 2), torch.full((200,), 3)]).long()
    shuffled = stream[torch.randperm(len(stream), generator=generator(0, "stream"))]

    for part in shuffled.split(32):
        offer(buffer, part)

    counts = torch.bincount(buffer.labels, minlength=4).tolist()
    assert counts[2] == 5
    assert max(counts) - min(counts[0], counts[1], counts[3]) <= 1


def test_within_a_class_every_offer_is_held_with_the_same_probability() -> None:
    held = torch.zeros(40)
    for seed in range(600):
        buffer = make_buffer("class_balanced", size=8, seed=seed)
        for part in (torch.arange(40) % 2).split(8):
            offer(buffer, part)
        held[buffer.uids] += 1

    expected = 600 * 8 / 40
    assert (held - expected).abs().max() < 4.5 * math.sqrt(expected * 0.8)


def test_a_weighted_reservoir_of_one_slot_holds_an_offer_in_proportion_to_its_importance() -> None:
    importance = torch.tensor([0.1, 0.2, 0.3, 0.4])
    held = torch.zeros(4)

    for seed in range(2000):
        buffer = make_buffer("importance", size=1, seed=seed)
        offer(buffer, torch.zeros(4, dtype=torch.int64), importance)
        held[buffer.uids] += 1

    spread = (2000 * importance * (1 - importance)).sqrt()
    assert ((held - 2000 * importance).abs() < 4 * spread).all()


def test_a_weighted_reservoir_survives_importance_that_is_not_finite() -> None:
    buffer = make_buffer("importance", size=2)
    importance = torch.tensor([math.nan, 1.0, math.inf, 0.0, 1.0, -1.0])

    offer(buffer, torch.zeros(6, dtype=torch.int64), importance)

    assert buffer.storage["keys"].isfinite().all()
    assert sorted(buffer.uids.tolist()) == [1, 4]


@pytest.mark.parametrize("policy", ["class_balanced", "importance"])
def test_a_restored_policy_accepts_the_same_again(policy: str) -> None:
    buffer = make_buffer(policy, size=6)
    offer(buffer, torch.arange(20) % 3)
    state = {name: value.clone() if isinstance(value, Tensor) else value for name, value in buffer.state_dict().items()}

    offer(buffer, torch.arange(20) % 4, torch.linspace(0, 1, 20))
    first = buffer.uids.clone()
    buffer.load_state_dict(state)
    offer(buffer, torch.arange(20) % 4, torch.linspace(0, 1, 20))

    assert torch.equal(first, buffer.uids)


def test_an_unknown_policy_names_its_flag() -> None:
    with pytest.raises(UsageError, match="--buffer_policy: got 'fifo', expected one of reservoir"):
        BufferConfig(policy="fifo")
