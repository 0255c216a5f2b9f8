"""The last steps that a diagnosis shows."""

from __future__ import annotations

import pytest

from stabilitykit.monitor.run_up import RunUp
from stabilitykit.watch.reading import Reading


@pytest.mark.parametrize(("length", "kept"), [(0, []), (1, [4]), (3, [2, 3, 4]), (9, [0, 1, 2, 3, 4])])
def test_as_many_are_kept_as_asked_for(length: int, kept: list[int]) -> None:
    run_up = RunUp(length)

    for step in range(5):
        run_up.add(step, Reading(losses={"loss": 1.0}), ("", 0.0))

    assert [line.step for line in run_up.steps()] == kept


def test_a_step_run_again_is_described_anew_in_its_place() -> None:
    run_up = RunUp(3)
    for step in range(3):
        run_up.add(step, Reading(losses={"loss": 1.0}), ("", 0.0))

    run_up.describe_again(1, Reading(losses={"loss": 1.0}), ("layer", 7.0))

    assert [line.absmax_tensor for line in run_up.steps()] == ["", "layer", ""]
