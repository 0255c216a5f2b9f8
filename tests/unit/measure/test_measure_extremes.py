"""Statistics at the ends of each dtype's range, against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stabilitykit.measure.statistics import BLOCK, FIELDS, measure_each, statistics

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
NONFINITE = [math.nan, math.inf, -math.inf]


def measured(tensor: Tensor) -> dict[str, float]:
    packed = statistics(tensor)
    assert packed is not None
    return dict(zip(FIELDS, packed.tolist(), strict=True))


def all_of(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Any finite value of the dtype, its ends and its subnormals often."""
    info = torch.finfo(dtype)
    ends = [0.0, -0.0, info.max, -info.max, info.tiny, -info.tiny, info.tiny / 2, -info.tiny / 4, info.smallest_normal]
    return st.sampled_from(ends) | st.floats(-info.max, info.max)


def assert_exact(found: dict[str, float], tensor: Tensor, dtype: torch.dtype) -> None:
    numbers = tensor.double().tolist()
    finite = [Fraction(number) for number in numbers if math.isfinite(number)]
    tiny = torch.finfo(dtype).tiny
    assert found["nan"] == sum(map(math.isnan, numbers))
    assert (found["posinf"], found["neginf"]) == (numbers.count(math.inf), numbers.count(-math.inf))
    assert found["zeros"] == numbers.count(0.0)
    assert found["subnormal"] == pytest.approx(sum(0 < abs(n) < tiny for n in numbers) / len(numbers))
    if finite:
        assert (found["min"], found["max"]) == (min(finite), max(finite))
        scale = float(max(map(abs, finite)))
        assert found["mean"] == pytest.approx(float(sum(finite) / len(finite)), rel=1e-6, abs=1e-6 * scale)
        assert found["l2"] == pytest.approx(math.hypot(*map(float, finite)), rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_no_value_of_the_dtype_overflows_or_vanishes_in_them(dtype: torch.dtype, data: st.DataObject) -> None:
    tensor = torch.tensor(data.draw(st.lists(all_of(dtype), min_size=1, max_size=30)), dtype=dtype)

    assert_exact(measured(tensor), tensor, dtype)


@given(drawn=st.lists(st.lists(all_of(torch.float32), min_size=1, max_size=20), min_size=1, max_size=5))
def test_nor_in_small_tensors_measured_together(drawn: list[list[float]]) -> None:
    tensors = [torch.tensor(numbers, dtype=torch.float32) for numbers in drawn]

    together = measure_each(tensors)

    for packed, tensor in zip(together.tolist(), tensors, strict=True):
        assert_exact(dict(zip(FIELDS, packed, strict=True)), tensor, torch.float32)


@pytest.mark.parametrize("size", [100, BLOCK + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smallest", [0.0, -0.0, 0.5, -0.5])
def test_one_value_among_thousands_that_is_zero_or_subnormal_is_counted(
    smallest: float, dtype: torch.dtype, size: int
) -> None:
    info = torch.finfo(dtype)
    tensor = torch.full((size,), info.tiny, dtype=dtype)
    tensor[::2] *= -1
    tensor[-1] = smallest * info.tiny

    found = measured(tensor)

    assert (found["zeros"], found["subnormal"] * size) == ((1, 0) if smallest == 0 else (0, pytest.approx(1)))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_nor_among_values_that_are_not_finite(dtype: torch.dtype, data: st.DataObject) -> None:
    finite = data.draw(st.lists(all_of(dtype), max_size=20))
    odd = data.draw(st.lists(st.sampled_from(NONFINITE), min_size=1, max_size=5))
    tensor = torch.tensor(data.draw(st.permutations([*finite, *odd])), dtype=dtype)

    assert_exact(measured(tensor), tensor, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_nor_in_tensors_that_are_read_in_blocks(dtype: torch.dtype, size: int) -> None:
    info = torch.finfo(dtype)
    tensor = torch.full((size,), info.max, dtype=dtype)
    tensor[::2] = info.tiny / 2
    tensor[-1] = 0

    found = measured(tensor)

    wide = tensor.double()
    assert found["zeros"] == 1
    assert found["subnormal"] == pytest.approx(int(((wide > 0) & (wide < info.tiny)).sum()) / size)
    assert found["mean"] == pytest.approx(float(wide.mean()), rel=1e-6)
    assert found["l2"] == pytest.approx(float(wide.norm()), rel=1e-6)


@pytest.mark.parametrize("nonfinite", [[], [math.nan]], ids=["finite", "with a NaN"])
@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_the_mean_of_float64_values_whose_square_leaves_the_range_is_exact(size: float, nonfinite: list[float]) -> None:
    found = measured(torch.tensor([3 * size, 4 * size, *nonfinite], dtype=torch.float64))

    assert found["mean"] == pytest.approx(3.5 * size, rel=1e-12, abs=0)


@pytest.mark.parametrize("nonfinite", [[], [math.nan]], ids=["finite", "with a NaN"])
@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_so_is_their_norm(size: float, nonfinite: list[float]) -> None:
    found = measured(torch.tensor([3 * size, 4 * size, *nonfinite], dtype=torch.float64))

    assert found["l2"] == pytest.approx(5 * size, rel=1e-12, abs=0)
