"""Which write made the non-finite values of a view, where several went to one piece of memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stabilitykit.diagnose.graph import Leaf, Operation
from stabilitykit.diagnose.labels import Labels
from stabilitykit.diagnose.storages import Storages
from stabilitykit.measure.summary import summarise


def operation(tensor: Tensor, index: int = 0) -> Operation:
    return Operation(index, "div", "div", "forward", "", summarise(tensor, "output"))


def noted(storages: Storages, tensor: Tensor, value: float) -> Operation | None:
    """Fill a view and note it, as the tracer does."""
    tensor.fill_(value)
    made = operation(tensor) if not math.isfinite(value) else None
    storages.wrote(tensor, made, gradient=False)
    return made


def test_each_view_knows_the_write_that_made_its_own_values() -> None:
    storages, memory = Storages(Labels()), torch.zeros(4, 3)

    row, column = noted(storages, memory[1], math.nan), noted(storages, memory[:, 0], -math.inf)

    assert storages.sources(memory) == [(row, True), (column, False)]
    assert storages.sources(memory[1, 1:]) == [(row, True)]
    assert storages.sources(memory[:, 0]) == [(column, False)]
    assert storages.sources(memory[2:, 1:]) == ()


def test_the_newest_write_to_an_element_counts() -> None:
    storages, memory = Storages(Labels()), torch.zeros(4, 3)

    noted(storages, memory[:, 0], math.nan)
    everything = noted(storages, memory.view(12), math.inf)

    assert storages.sources(memory) == [(everything, False)]


def test_a_value_that_was_mended_has_no_source() -> None:
    storages, memory = Storages(Labels()), torch.zeros(4, 3)
    noted(storages, memory[1], math.nan)

    noted(storages, memory[1], 0.0)

    assert storages.sources(memory) == ()


def test_memory_that_was_bad_when_it_was_met_is_its_labels() -> None:
    labels, batch = Labels(), torch.tensor([[1.0, math.nan], [2.0, 3.0]])
    labels.add("batch", "inputs", batch)
    storages = Storages(labels)

    [(leaf, nan)] = storages.sources(batch)

    assert isinstance(leaf, Leaf)
    assert (leaf.name, leaf.rows, nan) == ("inputs", (0,), True)
    assert storages.sources(batch[1]) == ()


def test_views_of_other_dtypes_count_every_write_that_they_can_hold() -> None:
    storages, memory = Storages(Labels()), torch.zeros(4, dtype=torch.complex64)
    parts = torch.view_as_real(memory)

    real, imaginary = noted(storages, parts[:, 0], math.nan), noted(storages, parts[:, 1], math.inf)

    assert [source for source, _ in storages.sources(memory)] == [real, imaginary]


def test_more_writes_than_are_told_apart_still_have_a_source() -> None:
    storages, memory = Storages(Labels()), torch.zeros(300, 2)

    made = [noted(storages, row, math.nan) for row in memory]

    assert storages.sources(memory[299]) == [(made[0], True)]
    assert len(storages.sources(memory)) == 256
