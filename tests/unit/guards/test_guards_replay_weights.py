import pytest

from stabilitykit.errors import UsageError
from stabilitykit.guards import AdaptiveReplayWeights, linear_to_half


def test_the_replay_weights_fall_from_all_to_half() -> None:
    weights = [0.3 * linear_to_half(task, 10) for task in range(10)]

    assert weights[0] == 0.3
    assert weights[9] == 0.15
    assert weights[3] - weights[4] == pytest.approx(weights[7] - weights[8])
    assert linear_to_half(0, 1) == 1


def test_s23_it_is_the_exact_line_and_says_so_once_a_task() -> None:
    events = []
    weights = AdaptiveReplayWeights(5, on_event=lambda kind, message, **data: events.append(message))

    seen = [weights(task, 0.3, 0.5) for task in range(5) for _ in range(3)]

    assert seen[0] == (0.3, 0.5)
    assert seen[-1] == (0.15, 0.25)
    assert len(events) == weights.num_acted == 4


def test_the_first_task_is_untouched() -> None:
    weights = AdaptiveReplayWeights(5, on_event=pytest.fail)

    assert weights(0, 0.3, 0.5) == (0.3, 0.5)


def test_no_task_is_refused() -> None:
    with pytest.raises(UsageError, match="got num_tasks=0, expected 1 or more"):
        AdaptiveReplayWeights(0)
