"""The plain numbers behind a tensor, and whether they are finite."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stabilitykit.measure.values import is_finite, make_finite, values

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
PAIRS = [torch.complex64, torch.complex128]
NARROW = [torch.float8_e5m2, torch.float8_e4m3fn]

pytestmark = pytest.mark.filterwarnings("ignore:.*(nested tensors|ComplexHalf|Sparse|quantize)")


@pytest.mark.parametrize("dtype", [*FLOATS, *NARROW])
@given(numbers=st.lists(st.floats(width=32), max_size=20))
def test_a_tensor_is_finite_when_every_number_in_it_is(dtype: torch.dtype, numbers: list[float]) -> None:
    tensor = torch.tensor(numbers, dtype=torch.float32).to(dtype)

    naive = all(math.isfinite(number) for number in tensor.float().tolist())
    assert is_finite(tensor) == naive


@pytest.mark.parametrize("dtype", PAIRS)
@given(numbers=st.lists(st.complex_numbers(width=64), max_size=20))
def test_a_complex_tensor_is_finite_when_both_parts_are(dtype: torch.dtype, numbers: list[complex]) -> None:
    tensor = torch.tensor(numbers, dtype=dtype)

    naive = all(math.isfinite(n.real) and math.isfinite(n.imag) for n in tensor.tolist())
    assert is_finite(tensor) == naive


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_two_ends_of_a_dtype_together_are_finite_though_their_difference_is_not(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)

    assert is_finite(torch.tensor([limits.min, limits.max], dtype=dtype))


def test_values_of_any_readable_kind_are_real_dense_and_detached(readable: Tensor) -> None:
    plain = values(readable)

    assert plain is not None
    assert plain.layout == torch.strided
    assert plain.dtype in FLOATS
    assert not plain.requires_grad
    assert not plain.is_neg()
    assert is_finite(readable)


def test_what_cannot_be_non_finite_has_no_values_and_counts_as_finite(nothing_to_read: Tensor) -> None:
    assert values(nothing_to_read) is None
    assert is_finite(nothing_to_read)


def test_an_empty_tensor_is_finite(empty: Tensor) -> None:
    assert is_finite(empty)


def test_values_are_a_view_where_the_memory_can_be_read_as_it_is() -> None:
    tensor = torch.ones(3)

    plain = values(tensor)

    assert plain is not None
    assert plain.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda dense: dense,
        lambda dense: dense.t(),
        lambda dense: dense.to_sparse(),
        lambda dense: dense.to_sparse_csr(),
        lambda dense: torch.nested.nested_tensor([dense[0], dense[1]]),
        lambda dense: dense.to(torch.complex64).conj(),
        lambda dense: torch.complex(torch.zeros_like(dense), dense),
        lambda dense: torch._neg_view(dense),
        lambda dense: dense.to(torch.float8_e5m2),
    ],
    ids=["dense", "transposed", "coo", "csr", "nested", "conj", "imaginary", "neg", "float8_e5m2"],
)
def test_one_bad_number_is_found_in_every_layout(spoil, bad: float) -> None:
    dense = torch.ones(2, 3)
    dense[1, 2] = bad

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = spoil(dense)

    assert not is_finite(tensor)


def test_a_conjugated_imaginary_part_keeps_its_sign() -> None:
    imaginary = torch.tensor([1 + 2j, 3 - 4j]).conj().imag

    plain = values(imaginary)

    assert plain is not None
    assert plain.tolist() == [-2.0, 4.0]


def test_forward_modes_zeros_have_no_memory_to_read() -> None:
    zeros = torch._efficientzerotensor(3)

    assert values(zeros) is None
    assert is_finite(zeros)


def test_a_fake_tensor_holds_nothing_to_read() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(3)

    assert is_finite(fake)


def test_a_dtype_without_kernels_counts_as_finite() -> None:
    assert is_finite(torch.empty(4, dtype=torch.float4_e2m1fn_x2))


def test_a_parameter_that_is_not_there_yet_counts_as_finite() -> None:
    assert is_finite(nn.LazyLinear(2).weight)


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_is_made_finite_keeps_its_other_numbers_and_the_sense_of_a_mask(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0.5, math.nan, math.inf, -math.inf], dtype=dtype)

    left = make_finite([tensor])

    assert left == []
    assert is_finite(tensor)
    assert tensor[0] == 0.5
    assert tensor.softmax(0)[3] == 0


def test_what_has_no_kernel_to_mend_it_is_handed_back() -> None:
    tensor = torch.tensor([math.inf]).to(torch.float8_e5m2)

    assert make_finite([tensor]) == [tensor]
