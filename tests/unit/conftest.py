"""Every kind of tensor a model can hold, for the tests of what is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def _square() -> Tensor:
    return torch.arange(16, dtype=torch.float32).reshape(4, 4)


def _fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(3)


READABLE: Mapping[str, Callable[[], Tensor]] = {
    **{str(dtype): partial(torch.ones, 3, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64)},
    "0-d": lambda: torch.tensor(3.0),
    "expanded": lambda: torch.full((1,), 2.0).expand(5),
    "transposed": lambda: _square().t(),
    "strided": lambda: _square()[::2, 1::2],
    "negative view": lambda: torch._neg_view(torch.ones(3)),
    "parameter": lambda: nn.Parameter(torch.ones(3)),
    "requires grad": lambda: torch.ones(3, requires_grad=True) * 2,
    "complex32": lambda: torch.ones(3, dtype=torch.complex32),
    "complex128": lambda: torch.ones(3, dtype=torch.complex128),
    "complex64": lambda: torch.tensor([1 + 2j, 3 - 4j]),
    "conjugate": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "imaginary part of a conjugate": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
    "sparse_coo": lambda: _square().to_sparse(),
    "uncoalesced": lambda: torch.sparse_coo_tensor([[0, 0]], [1.0, 2.0], (3,)),
    "sparse_csr": lambda: _square().to_sparse_csr(),
    "sparse_csc": lambda: _square().to_sparse_csc(),
    "sparse_bsr": lambda: _square().to_sparse_bsr((2, 2)),
    "sparse_bsc": lambda: _square().to_sparse_bsc((2, 2)),
    "nested strided": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "nested jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "float8_e4m3fn": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "float8_e4m3fnuz": lambda: torch.ones(3).to(torch.float8_e4m3fnuz),
    "float8_e5m2": lambda: torch.ones(3).to(torch.float8_e5m2),
    "float8_e5m2fnuz": lambda: torch.ones(3).to(torch.float8_e5m2fnuz),
    "float8_e8m0fnu": lambda: torch.ones(3).to(torch.float8_e8m0fnu),
}
NOTHING_TO_READ: Mapping[str, Callable[[], Tensor]] = {
    "bool": lambda: torch.tensor([True, False]),
    "uint8": lambda: torch.ones(3, dtype=torch.uint8),
    "uint16": lambda: torch.ones(3, dtype=torch.uint16),
    "uint32": lambda: torch.ones(3, dtype=torch.uint32),
    "uint64": lambda: torch.ones(3, dtype=torch.uint64),
    "int8": lambda: torch.ones(3, dtype=torch.int8),
    "int16": lambda: torch.ones(3, dtype=torch.int16),
    "int32": lambda: torch.ones(3, dtype=torch.int32),
    "int64": lambda: torch.ones(3, dtype=torch.int64),
    "float4": lambda: torch.empty(4, dtype=torch.float4_e2m1fn_x2),
    "sparse of integers": lambda: torch.ones(2, 2, dtype=torch.int64).to_sparse(),
    "fake": _fake,
    "meta": lambda: torch.empty(3, device="meta"),
    "meta of 2^31": lambda: torch.empty(2**31, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(_square(), 0.1, 0, torch.qint8),
    "mkldnn": lambda: _square().to_mkldnn(),
}
EMPTY: Mapping[str, Callable[[], Tensor]] = {
    "empty": lambda: torch.empty(0, 3),
    "empty sparse": lambda: torch.sparse_coo_tensor(size=(3, 3)),
    "empty half": lambda: torch.empty(0, dtype=torch.float16),
}


@pytest.fixture(params=READABLE)
def readable(request: pytest.FixtureRequest) -> Tensor:
    return READABLE[request.param]()


@pytest.fixture(params=NOTHING_TO_READ)
def nothing_to_read(request: pytest.FixtureRequest) -> Tensor:
    return NOTHING_TO_READ[request.param]()


@pytest.fixture(params=EMPTY)
def empty(request: pytest.FixtureRequest) -> Tensor:
    return EMPTY[request.param]()
