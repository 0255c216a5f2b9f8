import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainers.importance import blended_probabilities, heuristic_importance, warmed_up


def test_a_sample_it_gets_wrong_without_being_sure_matters_most() -> None:
    logits = torch.tensor([[9.0, 0.0, 0.0], [0.4, 0.0, 0.0], [9.0, 0.0, 0.0]])
    labels = torch.tensor([0, 1, 1])  # sure and right; unsure and wrong; sure and wrong

    scores = heuristic_importance(logits, labels)

    assert scores.argmax() == 1
    assert scores[0] == 0
    assert scores[2] < 1e-3


def test_scores_of_huge_logits_are_finite() -> None:
    logits = torch.tensor([[300.0, 0.0], [0.0, 300.0]])

    assert heuristic_importance(logits, torch.tensor([0, 0])).isfinite().all()


@given(
    importance=st.lists(st.floats(0, 5) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=30),
    weight=st.floats(0, 1),
)
def test_the_blend_is_a_distribution_whatever_the_scores(importance: list[float], weight: float) -> None:
    probabilities = blended_probabilities(torch.tensor(importance), weight)

    assert float(probabilities.sum()) == pytest.approx(1)
    assert (probabilities >= (1 - weight) / len(importance)).all()


def test_the_blend_grows_over_the_first_tasks() -> None:
    assert [warmed_up(0.3, task, 2) for task in range(4)] == pytest.approx([0, 0.15, 0.3, 0.3])
    assert warmed_up(0.3, 0, 0) == 0.3
