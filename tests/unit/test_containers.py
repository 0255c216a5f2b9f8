"""Tensors are found wherever a batch may hold them, at a bounded cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabilitykit.containers import MOST_ENTRIES, tensors_of


def test_tensors_are_found_in_every_kind_of_container() -> None:
    from collections import namedtuple

    Pair = namedtuple("Pair", "left right")

    @dataclass
    class Batch:
        inputs: Tensor
        note: str

    one = torch.ones(())
    nested = [{"x": (one, None)}, Pair(one, 3), Batch(one, "n"), one]

    assert [path for path, _ in tensors_of(nested)] == ["[0]['x'][0]", "[1].left", "[2].inputs", "[3]"]


class Counted(list[Any]):
    """A list that counts what is taken out."""

    num_taken = 0

    def __iter__(self) -> Iterator[Any]:
        for entry in super().__iter__():
            self.num_taken += 1
            yield entry


def test_a_data_set_within_an_object_is_not_gone_through() -> None:
    @dataclass
    class Loader:
        samples: list[Any]
        batch: dict[str, Tensor]

    samples = Counted([(f"{index}.png", index) for index in range(100_000)])

    found = [path for path, _ in tensors_of(Loader(samples, {"x": torch.ones(())}))]

    assert found == [".batch['x']"]
    assert samples.num_taken <= MOST_ENTRIES


def test_a_long_list_that_is_the_batch_is_gone_through_to_its_end() -> None:
    batch = [0] * (2 * MOST_ENTRIES) + [torch.ones(())]

    assert [path for path, _ in tensors_of(batch)] == [f"[{2 * MOST_ENTRIES}]"]
