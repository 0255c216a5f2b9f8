"""One tensor in words and numbers, and which of its rows are bad."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stabilitykit.measure import summary as module
from stabilitykit.measure.summary import bad_rows, summarise

pytestmark = pytest.mark.filterwarnings("ignore:.*(nested tensors|ComplexHalf|Sparse|quantize)")

numbers_of = st.lists(st.floats(min_value=-1e6, max_value=1e6) | st.sampled_from([math.nan, math.inf, -math.inf, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(numbers=numbers_of)
def test_a_summary_agrees_with_counting_one_by_one(dtype: torch.dtype, numbers: list[float]) -> None:
    tensor = torch.tensor(numbers, dtype=dtype)
    stored = tensor.double().tolist()
    finite = [number for number in stored if math.isfinite(number)]

    summary = summarise(tensor, "x")

    assert (summary.nan, summary.posinf) == (sum(map(math.isnan, stored)), stored.count(math.inf))
    assert (summary.neginf, summary.zeros) == (stored.count(-math.inf), stored.count(0.0))
    assert summary.min == pytest.approx(min(finite, default=math.nan), nan_ok=True)
    assert summary.max == pytest.approx(max(finite, default=math.nan), nan_ok=True)
    mean = math.fsum(finite) / len(finite) if finite else math.nan
    assert summary.mean == pytest.approx(mean, abs=1e-9, rel=1e-9, nan_ok=True)


class Largest(TorchDispatchMode):
    """Notes the size in bytes of the largest tensor that is made beside this one and its views."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._memory = tensor.untyped_storage().data_ptr()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() != self._memory:
            self.num_bytes = max(self.num_bytes, out.nbytes)
        return out


def test_a_large_tensor_is_summed_up_in_blocks_as_it_would_be_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(100, 101)
    tensor[3, 5], tensor[7:80], tensor[90] = math.inf, math.nan, 0.0
    whole = summarise(tensor, "x")
    monkeypatch.setattr(module, "BLOCK", 64)

    with Largest(tensor) as largest:
        in_blocks = summarise(tensor, "x")

    assert (
        (in_blocks.nan, in_blocks.posinf, in_blocks.zeros) == (whole.nan, whole.posinf, whole.zeros) == (7373, 1, 101)
    )
    assert (in_blocks.min, in_blocks.max) == (whole.min, whole.max)
    assert in_blocks.mean == pytest.approx(whole.mean)
    assert 0 < largest.num_bytes <= 64 * 8


def test_the_largest_half_precision_values_have_a_finite_mean() -> None:
    summary = summarise(torch.full((100,), 65_504.0, dtype=torch.float16), "x")

    assert summary.mean == 65_504.0


def test_every_readable_kind_can_be_described(readable: Tensor) -> None:
    text = summarise(readable, "x").describe()

    assert text.startswith("x: ")
    assert "range" in text


def test_what_cannot_be_read_is_described_by_dtype_and_shape(nothing_to_read: Tensor) -> None:
    summary = summarise(nothing_to_read, "x")

    assert summary.numel == nothing_to_read.numel()
    assert str(summary.dtype) in str(nothing_to_read.dtype)
    assert (summary.nan, summary.posinf, summary.neginf) == (0, 0, 0)


def test_integers_are_counted_for_one_may_be_a_divisor_of_0() -> None:
    summary = summarise(torch.tensor([3, 0, 5]), "x")

    assert (summary.zeros, summary.min, summary.max) == (1, 0, 5)
    assert math.isnan(summarise(torch.ones(3, device="meta", dtype=torch.int64), "x").min)


def test_an_empty_tensor_is_described_by_its_shape(empty: Tensor) -> None:
    assert str(list(empty.shape)) in summarise(empty, "x").describe()


def test_a_strided_nested_tensor_is_described() -> None:
    nested = torch.nested.nested_tensor([torch.ones(2), torch.tensor([math.nan])])

    assert summarise(nested, "x").nan == 1


@given(
    rows=st.lists(st.lists(st.sampled_from([0.0, 1.0, math.nan, math.inf]), min_size=2, max_size=2), max_size=8),
)
def test_bad_rows_are_those_with_a_bad_number(rows: list[list[float]]) -> None:
    tensor = torch.tensor(rows).reshape(-1, 2)

    naive = tuple(index for index, row in enumerate(rows) if not all(map(math.isfinite, row)))
    assert bad_rows(tensor) == naive


def test_a_scalar_has_no_rows() -> None:
    assert bad_rows(torch.tensor(math.nan)) == ()


def test_a_vector_of_losses_has_one_row_a_sample() -> None:
    assert bad_rows(torch.tensor([1.0, math.nan, 2.0, -math.inf])) == (1, 3)


def test_the_rows_of_complex_examples_are_found() -> None:
    examples = torch.ones(3, 2, dtype=torch.complex64)
    examples[1, 0] = complex(0.0, math.inf)

    assert bad_rows(examples) == (1,)


def test_integers_have_no_bad_rows() -> None:
    assert bad_rows(torch.ones(3, 2, dtype=torch.int64)) == ()


def test_rows_of_a_sparse_tensor_are_rows_of_the_tensor_not_positions_of_its_values() -> None:
    second_value_lies_in_row_zero = torch.sparse_coo_tensor([[0, 0], [0, 1]], [1.0, math.inf], (2, 2))

    assert bad_rows(second_value_lies_in_row_zero) in ((0,), ())
