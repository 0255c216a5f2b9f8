"""L2 norms of many tensors: one kernel, one transfer, nothing left out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stabilitykit.measure.norms import Norms, combine, tensor_norms, transfer

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

TRANSFERS: list[str] = []


class Placed(Tensor):
    """A scalar that says it is on a device, and tells when it, or a stack of such, is brought over."""

    place: str

    @property
    def device(self) -> torch.device:
        return torch.device(self.place)

    def tolist(self) -> list[float]:
        TRANSFERS.append(self.place)
        return self.as_subclass(Tensor).tolist()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.stack:
            return super().__torch_function__(func, types, args, kwargs)
        if len({entry.place for entry in args[0]}) > 1:
            raise RuntimeError("Expected all tensors to be on the same device")
        return placed(torch.stack([entry.as_subclass(Tensor) for entry in args[0]]), args[0][0].place)


def placed(values: Tensor, place: str) -> Placed:
    made = values.as_subclass(Placed)
    made.place = place
    return made


pytestmark = pytest.mark.filterwarnings("ignore:.*(nested tensors|ComplexHalf|Sparse|quantize)")


@pytest.mark.parametrize("dtype", FLOATS)
@given(parts=st.lists(st.lists(st.floats(min_value=-100, max_value=100), max_size=8), max_size=5))
def test_each_norm_agrees_with_the_root_of_the_squares(dtype: torch.dtype, parts: list[list[float]]) -> None:
    tensors = [torch.tensor(part, dtype=dtype) for part in parts]

    norms = transfer(tensor_norms(tensors))

    naive = [math.hypot(*tensor.double().tolist()) for tensor in tensors]
    assert norms == pytest.approx(naive, rel=4 * torch.finfo(dtype).eps, abs=1e-2 if dtype in FLOATS[:2] else 1e-15)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_number_carries_through(dtype: torch.dtype, bad: float) -> None:
    tensors = [torch.ones(3, dtype=dtype), torch.tensor([1.0, bad], dtype=dtype)]

    good, spoilt = transfer(tensor_norms(tensors))

    assert math.isfinite(good)
    assert not math.isfinite(spoilt)


def test_tensors_of_several_dtypes_and_layouts_keep_their_places() -> None:
    tensors = [
        torch.tensor([3.0, 4.0]),
        torch.tensor([3.0, 4.0], dtype=torch.float16),
        torch.tensor([3 + 4j]),
        torch.tensor([0.0, 5.0]).to_sparse(),
        torch.ones(4, dtype=torch.int64),
        nn.Parameter(torch.tensor([-5.0])),
        torch.empty(0),
    ]

    assert transfer(tensor_norms(tensors)) == [5.0, 5.0, 5.0, 5.0, 0.0, 5.0, 0.0]


@pytest.mark.parametrize("others", [[], [torch.ones(2)], [torch.ones(2, dtype=torch.float64)]], ids=len)
def test_finite_float16_values_have_a_finite_norm(others: list[Tensor]) -> None:
    tensor = torch.full((100, 100), 2000.0, dtype=torch.float16)

    (norm, *_) = transfer(tensor_norms([tensor, *others]))

    assert norm == pytest.approx(200_000.0, rel=1e-4)


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_a_norm_that_overflowed_is_measured_anew_and_one_of_a_bad_value_stays_bad(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max / 4
    tensors = {
        "large": torch.full((4,), largest, dtype=dtype),
        "infinite": torch.tensor([1.0, math.inf], dtype=dtype),
        "nan": torch.tensor([largest, math.nan], dtype=dtype),
        "gone": torch.full((4,), largest, dtype=dtype),
        "small": torch.ones(4, dtype=dtype),
    }
    norms = Norms(list(tensors), tensor_norms(tensors.values()))
    assert set(norms.read()) - set(norms.bad()) == {"small"}

    norms.widen({name: tensor for name, tensor in tensors.items() if name != "gone"})

    assert norms.values[0] == pytest.approx(2 * largest, rel=1e-2)
    assert set(norms.bad()) == {"infinite", "nan", "gone"}


def test_no_tensors_have_no_norms() -> None:
    assert transfer(tensor_norms([])) == []


def test_the_norm_of_an_embeddings_gradient_is_that_of_what_it_adds_up_to() -> None:
    embedding = nn.Embedding(50, 4, sparse=True)

    (embedding(torch.tensor([1, 1, 1, 1, 2, 3])) * torch.arange(4.0)).sum().backward()
    gradient = embedding.weight.grad
    (norm,) = transfer(tensor_norms([gradient]))

    assert not gradient.is_coalesced()
    assert norm == pytest.approx(gradient.to_dense().norm().item())


def test_every_readable_kind_has_a_norm(readable: Tensor) -> None:
    (norm,) = transfer(tensor_norms([readable]))

    assert math.isfinite(norm)


def test_what_cannot_be_read_has_the_norm_of_nothing(nothing_to_read: Tensor) -> None:
    assert transfer(tensor_norms([nothing_to_read])) == [0.0]


def test_a_strided_nested_tensor_has_a_norm() -> None:
    nested = torch.nested.nested_tensor([torch.tensor([3.0]), torch.tensor([0.0, 4.0])])

    assert transfer(tensor_norms([nested])) == [5.0]


@given(norms=st.lists(st.floats(min_value=0, max_value=1e300), max_size=10))
def test_the_whole_is_combined_from_its_parts_without_overflow(norms: list[float]) -> None:
    whole = combine(norms)

    scale = max(norms, default=0.0)
    naive = scale * math.sqrt(math.fsum((norm / scale) ** 2 for norm in norms)) if scale else 0.0
    assert whole == pytest.approx(naive, rel=1e-9)


def test_a_nan_part_makes_the_whole_nan_and_an_infinite_one_infinite() -> None:
    assert math.isnan(combine([1.0, math.nan]))
    assert combine([1.0, math.inf]) == math.inf


def test_scalars_of_several_devices_take_one_transfer_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.TRANSFERS", [])
    places = ["cpu", "xla:0", "xla:1", "xla:0", "cpu"]

    values = transfer([placed(torch.tensor(float(entry)), place) for entry, place in enumerate(places)])

    assert values == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert TRANSFERS == ["cpu", "xla:0", "xla:1"]
