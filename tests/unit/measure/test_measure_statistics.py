"""The nine numbers of a recorded tensor, against their definition one value at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stabilitykit.measure.statistics import FIELDS, headroom, measure_each, statistics

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NARROW = [torch.float8_e4m3fn, torch.float8_e5m2]

pytestmark = pytest.mark.filterwarnings("ignore:.*(nested tensors|ComplexHalf|Sparse|quantize)")


def naive_statistics(numbers: list[float], smallest_normal: float) -> dict[str, float]:
    """The definition, one value at a time, in Python floats."""
    finite = [number for number in numbers if math.isfinite(number)]
    return {
        "nan": sum(math.isnan(number) for number in numbers),
        "posinf": numbers.count(math.inf),
        "neginf": numbers.count(-math.inf),
        "zeros": numbers.count(0.0),
        "min": min(finite, default=math.nan),
        "max": max(finite, default=math.nan),
        "mean": math.fsum(finite) / len(finite) if finite else math.nan,
        "l2": math.hypot(*finite),
        "subnormal": sum(0 < abs(number) < smallest_normal for number in numbers) / len(numbers),
    }


def assert_agrees(tensor: Tensor, numbers: list[float], smallest_normal: float) -> None:
    packed = statistics(tensor)
    assert packed is not None
    assert packed.dtype == torch.float64
    assert_described(packed.tolist(), numbers, smallest_normal)


def assert_described(packed: list[float], numbers: list[float], smallest_normal: float) -> None:
    measured = dict(zip(FIELDS, packed, strict=True))
    expected = naive_statistics(numbers, smallest_normal)
    largest = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0)
    for name in FIELDS:
        close = {"mean": 1e-5 * largest, "l2": 1e-5 * expected["l2"]}.get(name, 0.0)
        assert measured[name] == pytest.approx(expected[name], rel=1e-6, abs=close, nan_ok=True), name


# Within the range where float64 squares neither overflow nor vanish; the ends have tests of their own.
ordinary = st.floats(min_value=2**-50, max_value=2**100, width=32) | st.floats(
    min_value=-(2**100), max_value=-(2**-50), width=32
)
tiny = st.floats(min_value=-(2**-124), max_value=2**-124, width=32)
odd = st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf])


@pytest.mark.parametrize("dtype", [*FLOATS, *NARROW])
@given(numbers=st.lists(ordinary | odd, min_size=1, max_size=30))
def test_they_agree_with_the_definition(dtype: torch.dtype, numbers: list[float]) -> None:
    tensor = torch.tensor(numbers, dtype=torch.float32).to(dtype)

    read_as = dtype if dtype in FLOATS else torch.float32  # float8 is widened before it is measured
    assert_agrees(tensor, tensor.double().tolist(), torch.finfo(read_as).tiny)


@given(drawn=st.lists(st.lists(ordinary | odd | tiny, min_size=1, max_size=20), min_size=1, max_size=8))
def test_small_tensors_measured_together_agree_with_the_definition_each(drawn: list[list[float]]) -> None:
    tensors = [torch.tensor(numbers, dtype=torch.float32) for numbers in drawn]

    together = measure_each(tensors)

    assert together.dtype == np.float64
    for packed, tensor in zip(together.tolist(), tensors, strict=True):
        assert_described(packed, tensor.tolist(), torch.finfo(torch.float32).tiny)


@given(numbers=st.lists(st.complex_numbers(max_magnitude=1e15, width=64), min_size=1, max_size=15))
def test_a_complex_tensor_is_measured_by_both_parts(numbers: list[complex]) -> None:
    tensor = torch.tensor(numbers, dtype=torch.complex128)

    assert_agrees(tensor, torch.view_as_real(tensor).flatten().tolist(), torch.finfo(torch.float64).tiny)


@given(numbers=st.lists(tiny, min_size=1, max_size=20))
def test_values_under_the_smallest_normal_are_told_from_zeros(numbers: list[float]) -> None:
    tensor = torch.tensor(numbers, dtype=torch.float32)

    packed = dict(zip(FIELDS, statistics(tensor).tolist(), strict=True))

    expected = naive_statistics(tensor.tolist(), torch.finfo(torch.float32).tiny)
    assert packed["zeros"] == expected["zeros"]
    assert packed["subnormal"] == pytest.approx(expected["subnormal"])


def test_a_view_of_any_stride_gives_what_its_copy_gives() -> None:
    whole = torch.randn(6, 8)

    for view in (whole.t(), whole[::2, 1::3], whole[0].expand(4, 8), torch._neg_view(whole)):
        assert statistics(view).tolist() == pytest.approx(statistics(view.clone().contiguous()).tolist())


def test_every_readable_kind_has_nine_numbers(readable: Tensor) -> None:
    packed = statistics(readable)

    assert packed is not None
    assert packed.shape == (9,)
    assert packed[:3].tolist() == [0, 0, 0]


def test_what_cannot_be_read_has_none(nothing_to_read: Tensor) -> None:
    assert statistics(nothing_to_read) is None


def test_an_empty_tensor_has_none(empty: Tensor) -> None:
    assert statistics(empty) is None


def test_half_precision_cannot_overflow_the_sum_or_the_norm() -> None:
    tensor = torch.full((1000,), 60_000.0, dtype=torch.float16)

    packed = dict(zip(FIELDS, statistics(tensor).tolist(), strict=True))

    assert packed["mean"] == pytest.approx(60_000, rel=1e-3)
    assert packed["l2"] == pytest.approx(60_000 * math.sqrt(1000), rel=1e-3)


def test_the_norm_of_the_largest_float32_is_measured_not_overflowed() -> None:
    tensor = torch.full((4,), torch.finfo(torch.float32).max)

    packed = dict(zip(FIELDS, statistics(tensor).tolist(), strict=True))

    assert packed["l2"] == pytest.approx(2 * torch.finfo(torch.float32).max)


def test_a_float64_whose_square_overflows_is_measured() -> None:
    packed = statistics(torch.tensor([1e200, -1e200], dtype=torch.float64))

    assert packed is not None
    assert packed[FIELDS.index("max")] == 1e200


def test_the_norm_of_a_vanishing_gradient_is_small_not_zero() -> None:
    packed = statistics(torch.full((4,), 1e-25))

    assert packed is not None
    assert packed[FIELDS.index("l2")].item() == pytest.approx(2e-25, rel=1e-5)


def test_the_mean_of_a_million_float32_values_is_not_lost_in_the_sum() -> None:
    tensor = torch.full((1_000_001,), 0.1)
    tensor[0] = math.nan

    packed = dict(zip(FIELDS, statistics(tensor).tolist(), strict=True))

    assert packed["mean"] == pytest.approx(tensor[1].item(), rel=1e-9)


@pytest.mark.parametrize("dtype", FLOATS)
@given(absmax=st.floats(min_value=0, max_value=6e4))
def test_headroom_is_the_number_of_doublings_left(dtype: torch.dtype, absmax: float) -> None:
    bits = headroom(absmax, dtype)

    naive = math.inf if absmax == 0 else math.log2(torch.finfo(dtype).max) - math.log2(absmax)
    assert bits == naive


def test_headroom_of_a_complex_tensor_is_that_of_its_parts() -> None:
    assert headroom(2.0, torch.complex64) == headroom(2.0, torch.float32)


def test_headroom_is_unknown_where_nothing_can_overflow_to_inf() -> None:
    assert math.isnan(headroom(1.0, torch.int64))
    assert math.isnan(headroom(math.nan, torch.float32))
