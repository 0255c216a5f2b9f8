"""Writes to parameters between two steps, which no version counter shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stabilitykit.watch.writes import CALL, PORTIONS, SMALL, ParameterNorms

Write = Callable[[nn.Parameter], None]


def _through_data(parameter: nn.Parameter) -> None:
    parameter.data[0] = 7.0


def _through_numpy(parameter: nn.Parameter) -> None:
    parameter.detach().numpy()[0] = 7.0


def _anew(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data + 1.0


def followed(*sizes: int) -> tuple[dict[str, Tensor], ParameterNorms]:
    torch.manual_seed(0)
    parameters: dict[str, Tensor] = {str(index): nn.Parameter(torch.randn(size)) for index, size in enumerate(sizes)}
    norms = ParameterNorms(parameters)
    norms.step_ended(norms.measure().read().values())
    return parameters, norms


@pytest.mark.parametrize("write", [_through_data, _through_numpy, _anew])
def test_a_write_to_a_small_model_is_seen_before_the_next_step(write: Write) -> None:
    parameters, norms = followed(10, 20)
    assert not norms.touched()

    write(parameters["1"])

    assert norms.touched()
    assert not norms.written()  # nothing was missed


def test_before_the_first_step_nothing_is_known() -> None:
    norms = ParameterNorms({"weight": nn.Parameter(torch.ones(3))})

    assert not norms.touched()
    assert not norms.written()


def test_a_large_model_is_looked_at_in_portions_and_every_part_has_its_turn() -> None:
    parameters, norms = followed(*[SMALL // 8] * 32)
    parameters["31"].data[0] = 7.0

    looks = [norms.touched() for _ in range(PORTIONS)]

    assert looks.count(True) == 1 or looks[-1]
    assert norms.touched()  # wary from then on: all of it, each time


def test_a_model_of_many_small_tensors_is_a_large_one() -> None:
    few, many = (followed(*[1] * number)[1] for number in (SMALL // CALL - 1, SMALL // CALL + 1))

    assert (few.in_portions, many.in_portions) == (False, True)


def test_what_the_portions_missed_is_told_with_its_content() -> None:
    parameters, norms = followed(*[SMALL // 8] * 32)
    parameters["31"].data[5] = float("nan")
    assert not norms.touched()  # it was the turn of others

    written = norms.written()

    assert list(written) == ["31"]
    assert written["31"].isnan().sum() == 1
    assert written["31"].data_ptr() != parameters["31"].data_ptr()


def test_a_parameter_moved_to_another_dtype_is_still_measured() -> None:
    parameters, norms = followed(10, 20)

    parameters["0"].data = parameters["0"].data.half()

    assert norms.touched()
    assert set(norms.measure().read()) == {"0", "1"}
