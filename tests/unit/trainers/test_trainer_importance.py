import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainers.importance import blended_probabilities, effective_classes, heuristic_importance, warmed_up


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


def test_every_class_gets_the_same_share_and_importance_decides_within_it() -> None:
    importance = torch.tensor([0.9, 0.1, 0.4, 0.4, 0.4, 0.4])
    labels = torch.tensor([3, 3, 7, 7, 7, 7])

    shares = blended_probabilities(importance, 1.0, labels)

    assert shares.tolist() == pytest.approx([0.45, 0.05, 0.125, 0.125, 0.125, 0.125])


def test_what_belongs_to_no_group_is_drawn_only_when_nothing_else_is_left() -> None:
    shares = blended_probabilities(torch.ones(4), 1.0, torch.tensor([-1, 0, 0, 1]))

    drawn = torch.multinomial(shares, 4, generator=torch.Generator().manual_seed(0))

    assert drawn[-1] == 0
    assert shares.tolist() == pytest.approx([0, 0.25, 0.25, 0.5], abs=1e-8)


def test_where_no_sample_belongs_to_a_group_importance_alone_decides() -> None:
    importance = torch.tensor([0.2, 0.6])

    assert torch.equal(
        blended_probabilities(importance, 0.5, torch.tensor([-1, -1])), blended_probabilities(importance, 0.5)
    )


def test_classes_count_in_full_only_where_they_are_drawn_as_often_as_others() -> None:
    labels = torch.tensor([2, 2, 5, 5])

    assert effective_classes(torch.ones(4), labels) == pytest.approx(2)
    assert effective_classes(torch.tensor([0.5, 0.5, 0.0, 0.0]), labels) == pytest.approx(1)
    assert effective_classes(torch.tensor([0.3, 0.3, 0.2, 0.2]), labels) == pytest.approx(1 / (0.36 + 0.16))


def test_labels_that_are_no_classes_end_no_run_here() -> None:
    labels = torch.tensor([-3, 10**12, 1, 1])

    assert effective_classes(torch.ones(4), labels) == pytest.approx(1 / (0.25**2 + 0.25**2 + 0.5**2))
    assert float(blended_probabilities(torch.ones(4), 1.0, labels).sum()) == pytest.approx(1)
