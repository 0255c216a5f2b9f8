"""The replay-buffer auditor: what is stored, before it is drawn."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import stabilitykit as sk
from stabilitykit.watch.buffer import full_audit


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


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_balance_is_the_entropy_of_the_classes_over_that_of_an_even_share(labels: list[int]) -> None:
    buffer = {"labels": torch.tensor(labels)}

    row = full_audit(buffer).row

    shares = [labels.count(label) / len(labels) for label in set(labels)]
    naive = -sum(share * math.log(share) for share in shares) / math.log(len(shares)) if len(shares) > 1 else 1.0
    assert row["num_classes"][0] == len(shares)
    assert row["class_balance"][0] == pytest.approx(naive)


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
