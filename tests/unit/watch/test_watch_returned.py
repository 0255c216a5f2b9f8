"""Where the loss is in what a step returns, and which numbers are looked at beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabilitykit.watch.returned import MOST, returned_numbers


class Outcome(NamedTuple):
    """As a step may return it."""

    accuracy: float
    loss: float


@pytest.mark.parametrize(
    "give",
    [
        lambda loss: loss,
        lambda loss: loss.detach(),
        lambda loss: loss.item(),
        lambda loss: loss.detach().numpy()[()],
        lambda loss: (loss.item(), 0.5),
        lambda loss: (loss.detach(), torch.tensor(0.5)),
        lambda loss: (loss.item(), torch.tensor(0.5)),
        lambda loss: [np.float32(loss.item()), 0.5],
        lambda loss: {"loss": loss.item()},
        lambda loss: {"accuracy": 0.5, "loss": loss.item()},
        lambda loss: {"accuracy": torch.tensor(0.5), "loss": loss.detach()},
        lambda loss: Outcome(0.5, loss.item()),
        lambda loss: (torch.tensor(0.5), loss),
        lambda loss: (0.5, loss),
        lambda loss: (torch.ones(3, 2), 7, loss.detach()),
        lambda loss: ((loss.detach(), torch.ones(3)), 0.5),
    ],
)
def test_the_loss_comes_first_in_whatever_form_it_is_returned(give: Callable[[Tensor], Any]) -> None:
    loss = nn.Parameter(torch.tensor(2.25)) * 1

    first = next(iter(returned_numbers(give(loss)).values()))

    assert first == 2.25


def test_all_that_is_returned_beside_the_loss_keeps_its_path() -> None:
    found = returned_numbers(
        {"accuracy": 0.5, "loss": torch.tensor(1.0), "terms": {"ce": torch.tensor(0.25), "l2": 0.1}}
    )

    assert list(found) == ["['loss']", "['terms']['ce']", "['accuracy']"]


@pytest.mark.parametrize("data", [None, 3, "3.0", True, torch.ones(2), {"rows": [1.0, 2.0]}, ([math.nan],)], ids=str)
def test_what_is_no_number_of_the_steps_is_left_alone(data: Any) -> None:
    assert returned_numbers(data) == {}


def test_a_list_of_many_numbers_is_data() -> None:
    assert len(returned_numbers([1.0] * 10_000)) == MOST


def test_a_metric_that_is_no_number_is_looked_into_once_and_a_loss_a_few_times(watched) -> None:
    watch = watched(nn.Linear(2, 2)).watch
    returned = (math.nan, math.nan)
    suspected = []

    for _ in range(5):
        reading = watch.read(returned, {})
        suspected.append(list(reading.bad_losses))
        watch.acquit(reading, returned)

    assert suspected == [["loss[0]", "loss[1]"], ["loss[0]"], ["loss[0]"], [], []]
