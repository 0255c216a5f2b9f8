import math

import pytest
import torch

from trainers.evaluation import backward_transfer, forgetting, forward_transfer, percent_correct


def test_class_il_asks_among_all_classes_and_task_il_among_the_tasks_own() -> None:
    logits = torch.tensor([[5.0, 0.0, 2.0, 1.0]])
    labels = torch.tensor([2])

    assert percent_correct(logits, labels, range(4)) == 0
    assert percent_correct(logits, labels, range(2, 4)) == 100


def test_logits_that_are_not_finite_are_never_right() -> None:
    logits = torch.tensor([[math.nan, 0.0], [1.0, 0.0]])

    assert percent_correct(logits, torch.tensor([0, 0]), range(2)) == 50


def test_forgetting_and_backward_transfer_are_the_definitions() -> None:
    matrix = [[90.0], [95.0, 80.0], [60.0, 70.0, 85.0]]

    assert forgetting(matrix) == pytest.approx(((95 - 60) + (80 - 70)) / 2)
    assert backward_transfer(matrix) == pytest.approx(((60 - 90) + (70 - 80)) / 2)
    assert forgetting([[90.0]]) == backward_transfer([[90.0]]) == 0


def test_forward_transfer_is_what_a_task_gained_before_it_was_learnt() -> None:
    assert forward_transfer([60.0, 50.0], [50.0, 52.0]) == pytest.approx((10 - 2) / 2)
    assert forward_transfer([], []) == 0
