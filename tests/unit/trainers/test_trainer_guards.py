import copy
import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trainers.guards import (
    GradientClip,
    all_finite,
    cosine_over_tasks,
    finite_rows,
    freeze_batch_norm,
    gradient_norm,
    isolated,
    linear_to_half,
    train_eval_gap,
)
from trainers.optimisation import OptimizerConfig, Schedule, ScheduleConfig


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3))


def test_the_learning_rate_over_ten_tasks_is_the_guides() -> None:
    shares = [round(100 * cosine_over_tasks(task, 10), 1) for task in (0, 2, 5, 9)]

    assert shares == [100.0, 90.5, 50.0, 10.0]


@given(task=st.integers(0, 99), num_tasks=st.integers(1, 100))
def test_the_learning_rate_never_leaves_its_bounds(task: int, num_tasks: int) -> None:
    assert 0.1 <= cosine_over_tasks(min(task, num_tasks - 1), num_tasks) <= 1


def test_the_replay_weights_fall_from_all_to_half() -> None:
    weights = [0.3 * linear_to_half(task, 10) for task in range(10)]

    assert weights[0] == 0.3
    assert weights[9] == 0.15
    assert weights[3] - weights[4] == pytest.approx(weights[7] - weights[8])
    assert linear_to_half(0, 1) == 1


def test_a_rebuilt_optimizer_does_not_lose_the_schedule() -> None:
    network = make_network()
    schedule = Schedule(config=ScheduleConfig(over_tasks=True), base_lr=0.03, num_tasks=10)
    optimizer = OptimizerConfig(lr=0.03).build(network)

    schedule.apply(optimizer, task=5)
    rebuilt = OptimizerConfig(lr=0.03).build(network)
    schedule.apply(rebuilt, task=5)

    assert optimizer.param_groups[0]["lr"] == rebuilt.param_groups[0]["lr"] == pytest.approx(0.015)


def test_milestones_act_within_a_task_on_top_of_the_task() -> None:
    config = ScheduleConfig(over_tasks=True, milestones=(35, 45), gamma=0.2)
    schedule = Schedule(config=config, base_lr=1.0, num_tasks=10)

    rates = [schedule.lr(5, epoch) for epoch in (34, 35, 45)]

    assert rates == pytest.approx([0.5, 0.1, 0.02])


def test_a_frozen_batch_norm_stays_frozen_through_every_later_train() -> None:
    network = make_network()
    keys = list(network.state_dict())

    frozen = freeze_batch_norm(network)
    network.eval()
    network.train()
    before = copy.deepcopy(network[1].state_dict())
    network(torch.randn(8, 1, 8, 8) * 50)

    assert frozen == 1
    assert not network[1].training
    assert network[2].training
    assert all(torch.equal(before[name], value) for name, value in network[1].state_dict().items())
    assert list(network.state_dict()) == keys


def test_a_frozen_batch_norm_refuses_a_forward_in_training_mode() -> None:
    network = make_network()
    freeze_batch_norm(network)
    network[1].training = True

    with pytest.raises(RuntimeError, match="frozen BatchNorm"):
        network(torch.randn(2, 1, 8, 8))


def test_a_frozen_network_can_be_copied_and_saved() -> None:
    network = make_network()
    freeze_batch_norm(network)

    file = io.BytesIO()
    torch.save(copy.deepcopy(network), file)
    file.seek(0)
    restored = torch.load(file, weights_only=False).train()

    assert not restored[1].training


def test_the_train_eval_gap_sees_stale_statistics_and_closes_when_frozen() -> None:
    network = make_network()
    network[2] = nn.Identity()
    inputs = torch.randn(16, 1, 8, 8) * 5 + 3
    state = copy.deepcopy(network.state_dict())

    stale = train_eval_gap(network, inputs)
    freeze_batch_norm(network)

    assert stale > 0.5
    assert train_eval_gap(network, inputs) == 0
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())


def test_isolation_puts_back_modes_random_stream_and_statistics_even_after_an_error() -> None:
    network = make_network()
    network[2].eval()
    state, random_state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    modes = [module.training for module in network.modules()]
    outputs: list[torch.Tensor] = []

    def look_and_fail() -> None:
        with isolated(network):
            outputs.append(network(torch.randn(4, 1, 8, 8)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look_and_fail()

    assert not outputs[0].requires_grad
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())


def test_finite_rows_names_the_rows() -> None:
    values = torch.ones(3, 2, 2)
    values[1, 0, 1] = math.nan

    assert finite_rows(values).tolist() == [True, False, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_all_finite_finds_one_bad_value_and_is_not_fooled_by_large_ones(bad: float) -> None:
    large = torch.full((100,), 3e38)
    spoilt = torch.ones(100)
    spoilt[57] = bad

    assert all_finite([large, None, torch.ones(3, dtype=torch.int64), torch.empty(0)])
    assert not all_finite([large, spoilt])


def test_the_norm_of_huge_finite_gradients_is_finite_and_clipping_keeps_their_direction() -> None:
    gradients = [torch.full((4,), 1e25), torch.full((5,), -1e25)]

    norm = gradient_norm(gradients)
    clip = GradientClip(1.0)
    clip(gradients, norm)

    assert norm == pytest.approx(3e25)
    assert gradients[0].tolist() == pytest.approx([1 / 3] * 4)
    assert gradients[1].tolist() == pytest.approx([-1 / 3] * 5)
    assert clip.num_clipped == 1


def test_clipping_leaves_gradients_that_are_not_finite_as_they_are() -> None:
    gradients = [torch.tensor([1.0, math.inf]), torch.tensor([2.0])]

    GradientClip(1.0)(gradients, gradient_norm(gradients))

    assert gradients[0].tolist() == [1.0, math.inf]
    assert gradients[1].tolist() == [2.0]


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), st.floats(0.1, 10))
def test_clipping_is_the_definition(values: list[float], max_norm: float) -> None:
    norm = math.sqrt(sum(value * value for value in values))
    gradients = [torch.tensor(values)]

    GradientClip(max_norm)(gradients, gradient_norm(gradients))

    scale = min(1.0, max_norm / norm) if norm else 1.0
    assert gradients[0].tolist() == pytest.approx([value * scale for value in values], rel=1e-5, abs=1e-30)
