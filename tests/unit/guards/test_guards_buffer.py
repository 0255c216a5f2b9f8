import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stabilitykit.guards import BufferSanitiser, all_finite, finite_rows, label_problem


def test_s19_rows_that_are_not_finite_are_refused_not_repaired_and_the_others_kept() -> None:
    events = []
    sanitiser = BufferSanitiser(num_classes=3, on_event=lambda kind, message, **data: events.append(data))
    examples, logits = torch.randn(5, 2, 2), torch.randn(5, 3) * 1000
    examples[1, 0, 0] = math.nan
    logits[3, 2] = -math.inf

    kept = sanitiser.admit(examples=examples, logits=logits, labels=torch.tensor([0, 1, 2, 0, 1]))

    assert kept.tolist() == [0, 2, 4]
    assert events[0]["rows"] == [1, 3]
    assert sanitiser.num_rejected == 2
    assert logits[0].abs().max() > 10  # a teacher is stored as it is


def test_s6_a_label_that_is_no_class_is_refused() -> None:
    sanitiser = BufferSanitiser(num_classes=3)

    kept = sanitiser.admit(examples=torch.ones(4, 2), labels=torch.tensor([0, 3, 2, -1]))

    assert kept.tolist() == [0, 2]


def test_s22_an_audit_names_the_bad_slots_by_uid_and_leaves_the_rest_alone() -> None:
    events = []
    sanitiser = BufferSanitiser(on_event=lambda kind, message, **data: events.append(data))
    logits = torch.randn(4, 3)
    logits[2, 0] = math.nan

    bad = sanitiser.audit(logits=logits, uids=torch.tensor([10, 11, 12, 13]))

    assert bad.tolist() == [2]
    assert events[0]["uids"] == [12]
    assert events[0]["phase"] == "buffer"
    assert sanitiser.num_quarantined == 1


@pytest.mark.parametrize(
    "weights", [[0.5, math.nan], [0.5, math.inf], [0.0, 0.0], [0.5, -0.1]], ids=["nan", "inf", "zero", "negative"]
)
def test_o28_weights_that_multinomial_would_refuse_become_an_even_draw_and_an_event(weights: list[float]) -> None:
    events = []
    sanitiser = BufferSanitiser(on_event=lambda kind, message, **data: events.append(message))

    assert sanitiser.weights(torch.tensor(weights)) is None
    assert "no probabilities" in events[0]


def test_a_healthy_buffer_in_a_loop_of_ones_own_is_untouched_and_nothing_is_said() -> None:
    sanitiser = BufferSanitiser(num_classes=3, on_event=pytest.fail)
    store: list[torch.Tensor] = []

    for _ in range(3):
        logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
        store.extend(logits[sanitiser.admit(logits=logits, labels=labels)])
    weights = torch.full((12,), 1 / 12)

    assert len(store) == 12
    assert sanitiser.audit(logits=torch.stack(store)).tolist() == []
    assert sanitiser.is_sound(logits=torch.stack(store))
    assert sanitiser.weights(weights) is weights
    assert sanitiser.num_acted == 0


def test_finite_rows_names_the_rows() -> None:
    values = torch.ones(3, 2, 2)
    values[1, 0, 1] = math.nan

    assert finite_rows(values).tolist() == [True, False, True]


@given(
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from([0.0, 1.0, 9.9e5, 1e6, 1.0001e6, -2e6, 6e4, 1e30, math.nan, math.inf, -math.inf]),
    st.sampled_from([0.0, 1.0, 300.0]),
    st.integers(0, 2999),
)
def test_rows_are_judged_by_their_largest_value_whatever_lies_around_it(
    dtype: torch.dtype, value: float, around: float, where: int
) -> None:
    rows = torch.full((3, 1000), around, dtype=dtype)
    rows.view(-1)[where] = torch.tensor(value, dtype=torch.float64).to(dtype)
    naive = [index for index, row in enumerate(rows.tolist()) if all(abs(entry) <= 1e6 for entry in row)]

    kept = BufferSanitiser().admit(rows=rows)

    assert kept.tolist() == naive


@pytest.mark.parametrize("count", [1, 256, 257])
@pytest.mark.parametrize(("value", "sound"), [(0, True), (2, True), (3, False), (-1, False), (2**62, False)])
def test_s6_one_label_that_is_no_class_is_found_among_few_and_among_many(count: int, value: int, sound: bool) -> None:
    labels = torch.ones(count, dtype=torch.int64)
    labels[-1] = value

    assert BufferSanitiser(num_classes=3).is_sound(labels=labels) is sound
    assert (label_problem(labels, 3) is None) is sound
    assert label_problem(labels.view(-1, 1)[:0], 3) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_s20_all_finite_finds_one_bad_value_and_is_not_fooled_by_large_ones(bad: float) -> None:
    large = torch.full((100,), 3e38)
    spoilt = torch.ones(100)
    spoilt[57] = bad

    assert all_finite([large, None, torch.ones(3, dtype=torch.int64), torch.empty(0)])
    assert not all_finite([large, spoilt])


def test_o11_finite_garbage_is_set_aside_as_well() -> None:
    sanitiser = BufferSanitiser()
    logits = torch.randn(5, 3)
    logits[1, 1] = 1e30
    logits[4, 0] = -1e30

    assert sanitiser.audit(logits=logits).tolist() == [1, 4]
    assert BufferSanitiser(max_magnitude=math.inf).is_sound(logits=logits)
