"""A step that empties its list, writes into its dict or uses up its iterator is given the same once more."""

from __future__ import annotations

import io
import itertools
from collections import UserDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from stabilitykit.monitor.batches import Recorded, copied, given_again, given_tensors, held_apart, recorded


@dataclass
class Item:
    x: Tensor


class Trainer:
    """Not a batch: it has a tensor, and a model."""

    def __init__(self) -> None:
        self.best = torch.zeros(())
        self.model = nn.Linear(2, 2)


def draws(count: int) -> Iterator[Tensor]:
    for _ in range(count):
        yield torch.randn(2)


def test_what_the_step_empties_is_given_again_in_full() -> None:
    given = [torch.ones(2), {"x": [torch.zeros(2)]}]
    kept = held_apart(given)

    given[1]["x"].clear()  # type: ignore[index, union-attr]
    given.clear()

    first, second = given_again(kept)
    assert torch.equal(first, torch.ones(2))
    assert torch.equal(second["x"][0], torch.zeros(2))


def test_a_second_replay_is_given_what_the_first_was() -> None:
    kept = held_apart([torch.ones(2)])

    given_again(kept).clear()

    assert len(given_again(kept)) == 1


@pytest.mark.parametrize("make", [Item, lambda x: UserDict(x=x), lambda x: {"x": x}])
def test_an_entry_that_the_step_replaces_is_given_again_as_it_was(make: Any) -> None:
    batch, before = make(torch.ones(2)), torch.ones(2)
    entries = vars(batch) if isinstance(batch, Item) else batch
    kept = held_apart(batch)

    entries["x"] = before * 2

    again = given_again(kept)
    assert torch.equal(again.x if isinstance(again, Item) else again["x"], before)


def test_the_tensors_are_held_by_reference() -> None:
    tensor = torch.ones(2)

    kept = held_apart({"x": (tensor,)})

    assert kept["x"][0] is tensor


def test_an_object_with_a_model_is_no_batch() -> None:
    trainer = Trainer()

    assert held_apart(trainer) is trainer


class Slots:
    """A state object without a dictionary."""

    __slots__ = ("optimizer",)

    def __init__(self) -> None:
        self.optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])


class Run:
    """A state object that leads to a model, and has a tensor beside."""

    def __init__(self) -> None:
        self.trainer, self.best = Trainer(), torch.zeros(())


class Unwilling:
    """A batch that cannot be copied, neither way."""

    def __init__(self) -> None:
        self.x = torch.ones(2)

    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError("holds a file")


@pytest.mark.parametrize(
    "live",
    [
        nn.Linear(1, 1),
        nn.Parameter(torch.ones(1)),
        Trainer(),
        Run(),
        Slots(),
        partial(nn.Linear(1, 1).forward),
        nn.Linear(1, 1).forward,
        {1: Run()}.values(),
    ],
)
def test_what_leads_to_a_model_or_an_optimizer_is_never_copied(live: object) -> None:
    batch = torch.ones(2)

    kept, (beside,) = copied([live, (batch,)])

    assert kept is live
    assert held_apart(live) is live
    assert torch.equal(beside, batch)
    assert beside is not batch


def test_a_batch_that_cannot_be_copied_is_held_itself() -> None:
    batch = Unwilling()

    assert held_apart(batch) is batch
    assert copied(batch) is batch


def test_a_batch_of_a_class_of_its_own_is_copied_with_its_tensors() -> None:
    batch = Item(torch.ones(2))

    kept = copied(batch)
    batch.x.zero_()

    assert torch.equal(kept.x, torch.ones(2))


def test_the_tensors_of_a_trainer_are_not_the_batchs() -> None:
    x, y = torch.ones(1), torch.ones(2)

    found = given_tensors([x, Trainer(), Item(y), {"x": x}])

    assert [id(tensor) for tensor in found] == [id(x), id(y), id(x)]


@pytest.mark.parametrize(
    "source",
    [draws(3), zip([1], [2], strict=True), iter([1]), itertools.chain([1]), iter(DataLoader(torch.ones(2, 2)))],  # type: ignore[arg-type]
)
def test_an_iterator_that_can_do_nothing_else_is_recorded(source: Iterator[Any]) -> None:
    assert isinstance(recorded(source), Recorded)


@pytest.mark.parametrize("value", [[1], torch.ones(2), "text", io.StringIO("a file"), {"x": 1}])
def test_everything_else_is_handed_on_as_it_is(value: object) -> None:
    assert recorded(value) is value


def test_a_recorded_iterator_takes_no_more_than_the_step() -> None:
    source = draws(3)
    passed = recorded(source)

    next(passed)

    assert len(list(source)) == 2
    assert len(list(given_again(passed))) == 1


def test_the_random_streams_follow_as_if_the_items_were_made_again() -> None:
    torch.manual_seed(0)
    passed = recorded(draws(2))
    first = [(item, torch.randn(1)) for item in passed]

    torch.manual_seed(1)
    again = [(item, torch.randn(1)) for item in given_again(passed)]

    assert all(
        torch.equal(a, b) for one, other in zip(first, again, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_a_recorded_loader_still_says_how_many_batches_it_has() -> None:
    loader = iter(DataLoader(torch.ones(6, 2), batch_size=2))  # type: ignore[arg-type]

    passed = recorded(loader)

    assert len(passed) == 3
    assert passed._num_yielded == 0  # what is asked of the loader itself
    next(passed)
    assert len(given_again(passed)) == 1


def test_a_recorded_generator_has_no_length_and_is_true() -> None:
    passed = recorded(draws(0))

    assert passed
    assert given_again(passed)
    with pytest.raises(TypeError):
        len(passed)
