"""Every kind of tensor gives a row, if only one that says it has no such statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stabilitykit.watch.rows import FEW, TOGETHER, RowCollector

pytestmark = pytest.mark.filterwarnings("ignore:.*(nested tensors|ComplexHalf|Sparse|quantize|prototype)")


class Ids:
    """Hands out one id."""

    def tensor_id(self, name: str, **facts: Any) -> int:
        return 7


def row_of(tensor: Tensor) -> dict[str, Any]:
    collector = RowCollector(Ids())
    collector.add("layer", "output", "forward", tensor, kind="module")
    taken = collector.take()
    assert taken is not None
    (row,) = taken
    return {name: row[name].item() for name in row.dtype.names}


def test_a_tensor_that_can_be_read_has_its_statistics(readable: Tensor) -> None:
    row = row_of(readable)

    assert (row["unsupported"], row["tensor"], row["numel"]) == (0, 7, readable.numel())
    assert row["nan"] == row["posinf"] == row["neginf"] == 0
    assert row["min"] <= row["mean"] <= row["max"]
    assert math.isfinite(row["l2"])


def test_a_tensor_that_cannot_be_read_says_so(nothing_to_read: Tensor) -> None:
    row = row_of(nothing_to_read)

    assert (row["unsupported"], row["numel"]) == (1, nothing_to_read.numel())
    assert all(math.isnan(row[name]) for name in ("min", "max", "mean", "l2", "headroom", "subnormal"))


def test_a_tensor_of_nothing_has_a_row_without_numbers(empty: Tensor) -> None:
    row = row_of(empty)

    assert row["numel"] == empty.numel()
    assert math.isnan(row["max"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_not_finite_is_counted_in_the_row(dtype: torch.dtype) -> None:
    row = row_of(torch.tensor([math.nan, math.inf, math.inf, -math.inf, 0.0, 2.0], dtype=dtype))

    assert (row["nan"], row["posinf"], row["neginf"], row["zeros"], row["max"]) == (1, 2, 1, 1, 2.0)


def test_rows_come_in_the_order_of_the_measurements_whatever_the_sizes() -> None:
    sizes = [3, FEW + 1, 1, 0, *[FEW] * (TOGETHER // FEW + 2), 2, FEW + 2]
    collector = RowCollector(Ids())

    for number, size in enumerate(sizes):
        collector.add("layer", "output", "forward", torch.full((size,), float(number)), kind="module", call=number)
    taken = collector.take()

    assert taken is not None
    assert taken["order"].tolist() == taken["call"].tolist() == list(range(len(sizes)))
    assert taken["numel"].tolist() == sizes
    assert [row["max"] for row in taken if row["numel"]] == [number for number, size in enumerate(sizes) if size]


def test_a_small_tensor_may_be_overwritten_once_it_was_measured() -> None:
    collector = RowCollector(Ids())
    tensor = torch.ones(4)

    collector.add("layer", "gradient", "backward", tensor, kind="parameter")
    tensor.zero_()
    taken = collector.take()

    assert taken is not None
    assert taken["max"].item() == 1.0


def test_rows_of_the_same_tensors_hold_the_values_of_their_own_step() -> None:
    collector = RowCollector(Ids())
    taken = []

    for value in (1.0, math.inf, 3.0):
        collector.add("layer", "output", "forward", torch.tensor([value, 0.5]), kind="module")
        taken.append(collector.take())

    assert [rows["max"].item() for rows in taken] == [1.0, 0.5, 3.0]
    assert [rows["posinf"].item() for rows in taken] == [0, 1, 0]


def test_the_largest_output_is_named_and_nothing_else_is_taken_for_it() -> None:
    collector = RowCollector(Ids())
    collector.add("small", "output", "forward", torch.tensor([1.0, -2.0]), kind="module")
    collector.add("broken", "output", "forward", torch.tensor([math.nan]), kind="module")
    collector.add("large", "output", "forward", torch.tensor([3.0, -7.0]), kind="module")
    collector.add("weight", "parameter", "optimizer", torch.tensor([100.0]), kind="parameter")

    collector.take()

    assert collector.largest == ("large", 7.0)
