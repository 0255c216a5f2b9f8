import math

import pytest
import torch
from torch import Tensor

from stabilitykit.errors import UsageError
from trainers.buffer import BufferConfig, ReplayBuffer
from trainers.seeding import generator

SHAPE, NUM_CLASSES = (1, 2, 2), 3


def make_buffer(**options: object) -> ReplayBuffer:
    return ReplayBuffer(BufferConfig(**options), SHAPE, NUM_CLASSES, generator(0, "buffer"))


def offer(buffer: ReplayBuffer, count: int, *, logits: Tensor | None = None, task: int = 0) -> None:
    examples = torch.rand(count, *SHAPE)
    labels = torch.zeros(count, dtype=torch.int64)
    logits = torch.zeros(count, NUM_CLASSES) if logits is None else logits
    buffer.insert(examples, labels, logits, torch.ones(count), task)


def test_every_offer_is_held_with_the_same_probability_whenever_it_came() -> None:
    capacity, offers, runs = 10, 50, 2000
    held = torch.zeros(offers)
    buffer = make_buffer(size=capacity, minibatch_size=4)
    empty = {name: value.clone() if isinstance(value, Tensor) else value for name, value in buffer.state_dict().items()}

    for run in range(runs):
        buffer.load_state_dict(empty | {"generator": generator(run, "law").get_state()})
        for _ in range(offers // 5):
            offer(buffer, 5)
        held[buffer.uids] += 1

    expected = runs * capacity / offers
    spread = math.sqrt(expected * (1 - capacity / offers))
    assert (held - expected).abs().max() < 4.5 * spread


def test_the_slots_fill_in_order_and_every_offer_counts_from_the_first() -> None:
    buffer = make_buffer(size=8)

    offer(buffer, 5)

    assert buffer.uids.tolist() == [0, 1, 2, 3, 4]
    assert (len(buffer), buffer.n_seen, buffer.num_steps) == (5, 5, 1)
    assert len(buffer.examples) == 5


def test_a_row_that_is_not_finite_is_refused_and_counted() -> None:
    buffer = make_buffer(size=8)
    logits = torch.zeros(3, NUM_CLASSES)
    logits[1, 2] = math.inf

    offer(buffer, 3, logits=logits)

    assert len(buffer) == 2
    assert buffer.sanitiser.num_rejected == 1
    assert buffer.logits.isfinite().all()


def test_without_sanitising_whatever_comes_is_stored() -> None:
    buffer = make_buffer(size=8, sanitise=False)

    offer(buffer, 2, logits=torch.full((2, NUM_CLASSES), math.nan))

    assert buffer.logits.isnan().all()


def test_teachers_are_stored_as_they_are_unless_a_clamp_is_asked_for() -> None:
    plain, clamped = make_buffer(size=4), make_buffer(size=4, clamp_logits=10.0)
    logits = torch.full((1, NUM_CLASSES), 64.0)

    offer(plain, 1, logits=logits)
    offer(clamped, 1, logits=logits)

    assert plain.logits.max() == 64
    assert clamped.logits.max() == 10


def test_an_audit_drops_the_bad_slot_and_keeps_the_others_whole() -> None:
    buffer = make_buffer(size=8, audit_every=1)
    offer(buffer, 4)
    examples = buffer.examples.clone()
    buffer.logits[1] = math.nan

    dropped = buffer.audit()

    assert dropped == 1
    assert buffer.uids.tolist() == [0, 2, 3]
    assert torch.equal(buffer.examples, examples[[0, 2, 3]])


def test_a_draw_has_no_slot_twice_and_shrinks_to_what_is_there() -> None:
    buffer = make_buffer(size=16, minibatch_size=8)
    offer(buffer, 5)

    even, weighted = buffer.draw(), buffer.draw(torch.full((5,), 0.2))

    assert sorted(even.tolist()) == sorted(weighted.tolist()) == [0, 1, 2, 3, 4]


def test_a_restored_state_draws_and_accepts_the_same_again() -> None:
    buffer = make_buffer(size=6, minibatch_size=3)
    offer(buffer, 9)
    state = {name: value.clone() if isinstance(value, Tensor) else value for name, value in buffer.state_dict().items()}
    logits = torch.randn(4, NUM_CLASSES)

    offer(buffer, 4, logits=logits)
    first = (buffer.draw(), buffer.uids.clone(), buffer.logits.clone())
    buffer.load_state_dict(state)
    offer(buffer, 4, logits=logits)

    assert all(torch.equal(*pair) for pair in zip(first, (buffer.draw(), buffer.uids, buffer.logits), strict=True))


@pytest.mark.parametrize(
    "options", [{"size": 0}, {"minibatch_size": 0}, {"clamp_logits": math.nan}, {"audit_every": -1}]
)
def test_impossible_options_name_their_flag(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"^--\w+: got .*, expected "):
        BufferConfig(**options)
