"""Examples stored more than once: found by a hash, proved by comparison."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stabilitykit.watch.duplicates import repeated_slots

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool]


def naive(tensor: Tensor) -> tuple[int, ...]:
    """Every slot against every earlier one."""
    content = [row.clone().reshape(-1).view(torch.uint8).numpy().tobytes() for row in tensor]
    return tuple(slot for slot, held in enumerate(content) if held in content[:slot])


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=3), min_size=1, max_size=20))
def test_every_later_copy_is_found_and_nothing_else(dtype: torch.dtype, rows: list[list[int]]) -> None:
    tensor = torch.tensor(rows).to(dtype)

    assert repeated_slots(tensor) == naive(tensor)


def test_examples_that_differ_in_one_bit_are_different() -> None:
    tensor = torch.rand(1, 3, 8, 8).repeat(2, 1, 1, 1)
    tensor[1, 2, 7, 7] = torch.nextafter(tensor[0, 2, 7, 7], torch.tensor(2.0))

    assert repeated_slots(tensor) == ()


def test_a_slot_full_of_nan_equals_its_copy() -> None:
    assert repeated_slots(torch.full((3, 2), math.nan)) == (1, 2)


def test_examples_whose_hash_agrees_by_chance_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every hash is the same; slots 0 and 2 and slots 1 and 3 hold the same."""
    tensor = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    monkeypatch.setattr("stabilitykit.watch.duplicates._hashes", lambda words: torch.zeros(len(words)).numpy())

    assert repeated_slots(tensor) == (2, 3)


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0,)])
def test_nothing_stored_repeats_nothing(shape: tuple[int, ...]) -> None:
    assert repeated_slots(torch.empty(shape)) == ()


def test_views_of_any_stride_are_read_as_they_look() -> None:
    whole = torch.arange(24.0).reshape(4, 6)

    assert repeated_slots(whole[:, ::2]) == ()
    assert repeated_slots(whole[:1].expand(3, 6)) == (1, 2)
    assert repeated_slots(torch._neg_view(torch.ones(2, 3))) == (1,)


def test_what_has_no_plain_memory_is_not_counted() -> None:
    assert repeated_slots(torch.ones(2, 2).to_sparse()) is None
    assert repeated_slots(torch.ones(2, 2, device="meta")) is None


def test_no_random_stream_is_advanced() -> None:
    before = torch.get_rng_state()

    repeated_slots(torch.ones(4, 4))

    assert torch.equal(torch.get_rng_state(), before)
