"""Ranges, class balance and ages of what a buffer holds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stabilitykit.watch.contents import Bounds, ages, bounds, class_counts, evenness, root_mean_square

number = st.floats(width=32, min_value=-1e6, max_value=1e6) | st.sampled_from([math.nan, math.inf, -math.inf])
slots_of = st.lists(st.lists(number, min_size=3, max_size=3), min_size=1, max_size=10)


@given(rows=slots_of)
def test_bounds_are_those_of_the_finite_values_and_name_the_slots_with_others(rows: list[list[float]]) -> None:
    measured = bounds(torch.tensor(rows))

    finite = [entry for row in rows for entry in row if math.isfinite(entry)]
    assert measured.low == pytest.approx(min(finite, default=math.nan), nan_ok=True)
    assert measured.high == pytest.approx(max(finite, default=math.nan), nan_ok=True)
    assert measured.bad == tuple(i for i, row in enumerate(rows) if not all(map(math.isfinite, row)))


@given(rows=slots_of)
def test_the_root_mean_square_is_taken_over_the_finite_values(rows: list[list[float]]) -> None:
    finite = [float(entry) for row in torch.tensor(rows).tolist() for entry in row if math.isfinite(entry)]

    naive = math.hypot(*finite) / math.sqrt(len(finite)) if finite else math.nan
    assert root_mean_square(torch.tensor(rows)) == pytest.approx(naive, nan_ok=True, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("tensor", "low", "high"),
    [
        (torch.tensor([[0, 200]], dtype=torch.uint8), 0, 200),
        (torch.tensor([[-5], [7]]), -5, 7),
        (torch.tensor([[60_000.0]], dtype=torch.float16), 60_000, 60_000),
        (torch.tensor([[1 + 3j]]), 1, 3),
        (torch.tensor([[0.0, 5.0]]).to_sparse(), 5, 5),
        (torch.tensor(2.0).expand(3, 4), 2, 2),
    ],
    ids=["uint8", "int64", "half", "complex", "sparse", "expanded"],
)
def test_every_kind_of_tensor_that_can_be_read_has_bounds(tensor: Tensor, low: float, high: float) -> None:
    measured = bounds(tensor)

    assert (measured.low, measured.high, measured.bad) == (low, high, ())


@pytest.mark.parametrize(
    "tensor", [None, torch.ones(2, device="meta"), torch.tensor([True]), torch.empty(0, 3), torch.empty(3, 0)]
)
def test_what_cannot_be_read_has_none(tensor: Tensor | None) -> None:
    measured = bounds(tensor)

    assert math.isnan(measured.absmax)
    assert measured.bad == ()


def test_the_largest_magnitude_may_be_negative() -> None:
    assert Bounds(-9.0, 2.0).absmax == 9.0


@given(labels=st.lists(st.integers(-1, 4), max_size=30))
def test_classes_are_counted_by_slots_and_negative_labels_are_none(labels: list[int]) -> None:
    counts = class_counts(torch.tensor(labels, dtype=torch.int64))

    assert sorted(counts) == sorted(labels.count(label) for label in set(labels) if label >= 0)


def test_labels_of_pixels_are_no_classes_of_slots() -> None:
    assert class_counts(torch.zeros(4, 2, 2, dtype=torch.int64)) == []


@given(counts=st.lists(st.integers(1, 50), max_size=8))
def test_evenness_is_the_entropy_of_the_classes_over_that_of_an_even_share(counts: list[int]) -> None:
    shares = [count / sum(counts) for count in counts]

    naive = -sum(share * math.log(share) for share in shares) / math.log(len(counts)) if len(counts) > 1 else 1.0
    assert evenness(counts) == pytest.approx(naive if counts else math.nan, nan_ok=True)


def test_ages_count_from_the_latest_stamp_that_was_given_out() -> None:
    measured = ages(torch.tensor([0, 10, 20]), offered=41)

    assert (measured.mean, measured.largest, measured.share) == (30.0, 40.0, 0.75)


def test_ages_count_from_the_newest_slot_where_nothing_else_is_known() -> None:
    measured = ages(torch.tensor([0, 10, 20]), offered=0)

    assert (measured.mean, measured.largest, measured.share) == (10.0, 20.0, 0.5)


def test_a_uniform_reservoir_is_half_as_old_as_the_run() -> None:
    held = torch.randperm(100_000)[:2_000]

    assert ages(held, 100_000).share == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("stamps", [torch.empty(0, dtype=torch.int64), torch.tensor([0.5]), torch.tensor([True])])
def test_stamps_that_are_no_integers_tell_no_age(stamps: Tensor) -> None:
    assert math.isnan(ages(stamps, 5).mean)


def test_at_the_first_insertion_no_share_can_be_told() -> None:
    measured = ages(torch.tensor([0, 0]), 1)

    assert measured.mean == 0.0
    assert math.isnan(measured.share)
