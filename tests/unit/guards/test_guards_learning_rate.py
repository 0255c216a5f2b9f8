import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stabilitykit.errors import UsageError
from stabilitykit.guards import LearningRateSchedule, cosine_over_tasks


def optimizer(lr: float = 0.03) -> torch.optim.SGD:
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=lr)


def test_the_learning_rate_over_ten_tasks_is_the_guides() -> None:
    shares = [round(100 * cosine_over_tasks(task, 10), 1) for task in (0, 2, 5, 9)]

    assert shares == [100.0, 90.5, 50.0, 10.0]


@given(task=st.integers(0, 99), num_tasks=st.integers(1, 100))
def test_the_learning_rate_never_leaves_its_bounds(task: int, num_tasks: int) -> None:
    assert 0.1 <= cosine_over_tasks(min(task, num_tasks - 1), num_tasks) <= 1


def test_s14_an_optimizer_rebuilt_for_the_next_task_does_not_lose_the_schedule() -> None:
    schedule = LearningRateSchedule(0.03, 10)
    first = optimizer()
    schedule.apply(first, task=4)

    rebuilt = optimizer()
    schedule.apply(rebuilt, task=5)

    assert rebuilt.param_groups[0]["lr"] == pytest.approx(0.015)


def test_s14_a_rate_written_by_someone_else_is_put_back_and_announced() -> None:
    events = []
    schedule = LearningRateSchedule(0.03, 10, on_event=lambda kind, message, **data: events.append((message, data)))
    target = optimizer()
    schedule.apply(target, task=0)

    target.param_groups[0]["lr"] = 3.0
    schedule.apply(target, task=0)

    assert target.param_groups[0]["lr"] == 0.03
    assert schedule.num_acted == 1
    assert events[0][1]["severity"] == "warning"
    assert "was 3, expected 0.03" in events[0][0]


def test_a_new_task_is_no_alarm_and_a_wrong_rate_at_its_first_step_is_one() -> None:
    severities = []
    schedule = LearningRateSchedule(1.0, 2, on_event=lambda kind, message, **data: severities.append(data["severity"]))
    target = optimizer(1.0)

    for task, found in ((0, 1.0), (1, 1.0), (1, schedule.lr(1)), (0, 77.0)):
        target.param_groups[0]["lr"] = found
        schedule.apply(target, task)

    assert severities == ["info", "warning"]


def test_it_does_nothing_to_a_run_that_has_the_right_rate() -> None:
    schedule = LearningRateSchedule(0.03, 10, on_event=pytest.fail)
    target = optimizer()

    for _ in range(3):
        schedule.apply(target, task=0)

    assert schedule.num_acted == 0


@pytest.mark.parametrize("arguments", [(0.0, 3), (float("inf"), 3), (0.1, 0)])
def test_an_impossible_schedule_is_refused(arguments: tuple[float, int]) -> None:
    with pytest.raises(UsageError, match=r"LearningRateSchedule: got .* expected"):
        LearningRateSchedule(*arguments)
