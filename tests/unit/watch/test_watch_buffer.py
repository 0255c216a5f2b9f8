"""The replay-buffer auditor: what is stored, before it is drawn."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import stabilitykit as sk
from stabilitykit.watch.buffer import full_audit
from trainers.buffer import BufferConfig, ReplayBuffer


def stored(slots: int = 6, **changes: Any) -> dict[str, Any]:
    """A sound buffer, with some of its tensors replaced."""
    sound = {
        "examples": torch.rand(slots, 2, 3),
        "labels": torch.arange(slots) % 3,
        "logits": torch.randn(slots, 3),
    }
    return sound | changes


def test_a_sound_buffer_has_no_findings() -> None:
    assert sk.audit_buffer(stored()) == ()


@pytest.mark.parametrize("field", ["examples", "logits"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_slots_that_are_not_finite_are_named(field: str, bad: float) -> None:
    buffer = stored()
    buffer[field][1].view(-1)[0] = bad
    buffer[field][4] = bad

    (finding,) = sk.audit_buffer(buffer)

    assert (finding.kind, finding.field, finding.slots) == ("nonfinite", field, (1, 4))
    assert "drop 1, 4" in finding.message


@pytest.mark.parametrize(("label", "bound"), [(-1, "0 to 2"), (3, "0 to 2"), (-100, "0 to 2")])
def test_a_label_that_no_class_has_is_named(label: int, bound: str) -> None:
    labels = torch.tensor([0, 1, label, 2, 0, 1])

    (finding,) = sk.audit_buffer(stored(labels=labels))

    assert (finding.kind, finding.slots) == ("label", (2,))
    assert bound in finding.message


def test_without_logits_only_negative_labels_can_be_told() -> None:
    buffer = stored(labels=torch.tensor([0, 99, -1, 2, 0, 1]))
    del buffer["logits"]

    (finding,) = sk.audit_buffer(buffer)

    assert finding.slots == (2,)


def test_labels_that_are_no_integers_are_refused_as_a_whole() -> None:
    (finding,) = sk.audit_buffer(stored(labels=torch.rand(6)))

    assert "expected integers" in finding.message


def test_a_row_counts_every_label_that_is_no_integer() -> None:
    assert full_audit(stored(labels=torch.rand(6))).row["bad_labels"][0] == 6


@pytest.mark.parametrize(
    "sound",
    [
        {"labels": torch.rand(6, 3)},  # class probabilities
        {"labels": torch.rand(6), "logits": torch.rand(6)},  # a regression
        {"labels": torch.rand(6), "logits": None},
        {"labels": torch.tensor([[0, 1], [2, -100]] * 3), "logits": torch.rand(6, 2, 3)},  # tokens, one left out
        {"labels": torch.zeros(6, 4, 4, dtype=torch.int64), "logits": torch.rand(6, 3, 4, 4)},  # pixels
        {"labels": torch.zeros(6, dtype=torch.uint8)},
        {"labels": torch.tensor([True, False] * 3)},
        {"examples": torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8)},
        {"examples": torch.rand(6, 3).half(), "logits": torch.full((6, 3), 60_000.0, dtype=torch.float16)},
        {"examples": torch.rand(6, 3, dtype=torch.float64) * 1e150},
    ],
    ids=lambda changed: " ".join(f"{name} {getattr(entry, 'dtype', '')}" for name, entry in changed.items()),
)
def test_what_is_unusual_but_right_is_no_finding(sound: dict[str, Any]) -> None:
    assert sk.audit_buffer(stored(**sound)) == ()


def test_a_target_that_is_not_finite_is_named() -> None:
    labels = torch.tensor([0.0, 1.0, math.nan, 2.0, math.inf, 3.0])

    (finding,) = sk.audit_buffer(stored(labels=labels, logits=None))

    assert (finding.kind, finding.field, finding.slots) == ("nonfinite", "labels", (2, 4))


def test_a_label_of_a_pixel_that_no_class_has_is_named_by_its_slot() -> None:
    labels = torch.zeros(6, 4, 4, dtype=torch.int64)
    labels[5, 3, 3] = 3

    (finding,) = sk.audit_buffer(stored(labels=labels, logits=torch.rand(6, 3, 4, 4)))

    assert (finding.kind, finding.slots) == ("label", (5,))
    assert "0 to 2" in finding.message


@pytest.mark.parametrize("field", ["examples", "logits"])
def test_a_finite_value_whose_square_overflows_is_named(field: str) -> None:
    buffer = stored()
    buffer[field][3].view(-1)[1] = -1e25
    buffer[field][4].view(-1)[1] = math.inf

    nonfinite, large = sk.audit_buffer(buffer)

    assert (nonfinite.kind, nonfinite.slots) == ("nonfinite", (4,))
    assert (large.kind, large.field, large.slots) == ("range", field, (3,))
    assert "beyond 1.84e+19, whose square overflows" in large.message


def test_a_buffer_that_holds_one_example_over_and_over_is_told() -> None:
    (finding,) = sk.audit_buffer(stored(20, examples=torch.ones(20, 4)))

    assert (finding.kind, finding.slots) == ("duplicate", tuple(range(1, 20)))
    assert "19 of 20 slots hold an example that an earlier slot holds" in finding.message


def test_a_few_repeated_examples_are_counted_but_no_finding() -> None:
    examples = torch.rand(100, 4)
    examples[[7, 50]] = examples[3].clone()

    audit = full_audit(stored(100, examples=examples))

    assert audit.findings == ()
    assert audit.row["duplicates"][0] == 2


def test_fields_that_do_not_line_up_are_told() -> None:
    (finding,) = sk.audit_buffer(stored(labels=torch.zeros(4).long()))

    assert (finding.kind, finding.field) == ("length", "labels")
    assert "examples 6, labels 4, logits 6" in finding.message


class Reservoir:
    """A buffer of which only a part is filled."""

    def __init__(self, filled: int) -> None:
        self.filled = filled
        self.examples = torch.full((6, 2), math.nan)
        self.examples[:filled] = 1.0
        self.labels = torch.full((6,), -1)
        self.labels[:filled] = 0
        self.logits = None

    def __len__(self) -> int:
        return self.filled


@pytest.mark.parametrize("filled", [0, 1, 5])
def test_slots_that_are_not_filled_yet_are_not_judged(filled: int) -> None:
    audit = full_audit(Reservoir(filled))

    assert audit.findings == ()
    assert (audit.row["capacity"][0], audit.row["filled"][0]) == (6, filled)


def test_an_object_without_tensors_is_refused_in_one_line() -> None:
    with pytest.raises(sk.UsageError, match="got a int without tensors, expected examples, labels or logits") as caught:
        sk.audit_buffer(3)

    assert "\n" not in str(caught.value)


def test_sizes_are_taken_over_the_finite_values() -> None:
    buffer = stored(logits=torch.tensor([[3.0, -4.0], [math.inf, math.nan]]), labels=torch.tensor([0, 1]))
    buffer["examples"] = torch.tensor([[7.0], [-9.0]])

    row = full_audit(buffer).row

    assert row["logit_absmax"][0] == 4.0
    assert row["logit_l2"][0] == pytest.approx(math.sqrt(25 / 2))
    assert row["example_absmax"][0] == 9.0
    assert row["bad_logits"][0] == 1


def test_half_precision_logits_do_not_overflow_their_own_measure() -> None:
    row = full_audit(stored(logits=torch.full((6, 3), 60_000.0, dtype=torch.float16))).row

    assert row["logit_l2"][0] == pytest.approx(60_000, rel=1e-3)


def test_the_row_holds_range_balance_and_age() -> None:
    buffer = stored(
        4,
        examples=torch.tensor([[-2.0], [0.5], [1.0], [3.0]]),
        labels=torch.tensor([0, 0, 0, 2]),
        inserted_steps=torch.tensor([0, 4, 6, 10]),
        num_steps=21,
    )

    row = full_audit(buffer).row[0]

    assert (row["example_min"], row["example_max"], row["example_absmax"]) == (-2.0, 3.0, 3.0)
    assert (row["num_classes"], row["least_held"], row["most_held"]) == (2, 1, 3)
    assert (row["age"], row["age_max"], row["age_share"]) == (15.0, 20.0, 0.75)


def test_uids_tell_the_age_as_a_share_of_the_run_but_not_in_steps() -> None:
    row = full_audit(stored(3, uids=torch.tensor([0, 50, 100]))).row[0]

    assert row["age_share"] == 0.5
    assert math.isnan(row["age"])


def test_a_buffer_that_shows_its_filled_slots_alone_says_its_capacity() -> None:
    generator = torch.Generator().manual_seed(0)
    buffer = ReplayBuffer(BufferConfig(size=10), (2,), 3, generator)
    for _ in range(2):
        buffer.insert(torch.rand(3, 2), torch.tensor([0, 1, 2]), torch.rand(3, 3), torch.ones(3), task=0)

    audit = full_audit(buffer)

    assert audit.findings == ()
    assert (audit.row["capacity"][0], audit.row["filled"][0]) == (10, 6)
    assert audit.row["age"][0] == 0.5


class Stored(NamedTuple):
    """A tuple's length is the number of its fields."""

    examples: Tensor
    labels: Tensor
    logits: Tensor


def test_a_named_tuple_is_a_buffer_whose_slots_are_all_filled() -> None:
    assert full_audit(Stored(**stored(9))).row["filled"][0] == 9


def test_an_audit_moves_nothing() -> None:
    buffer = stored()
    before = {name: tensor.clone() for name, tensor in buffer.items()}
    versions = {name: tensor._version for name, tensor in buffer.items()}
    stream = torch.get_rng_state()

    sk.audit_buffer(buffer, nn.Identity(), preprocess=lambda inputs: inputs[:, 0])

    assert all(torch.equal(buffer[name], before[name]) for name in buffer)
    assert {name: tensor._version for name, tensor in buffer.items()} == versions
    assert torch.equal(torch.get_rng_state(), stream)
