"""Guards that hold what is there: nothing in a healthy run, the last sound state in one that was spoilt."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stabilitykit.errors import UsageError
from stabilitykit.guards import (
    AdaptiveReplayWeights,
    BatchNormFreeze,
    GradientClip,
    LearningRateSchedule,
    unchanged,
)


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def train(network: nn.Sequential, check: Callable[[], object], steps: int = 6) -> None:
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for seed in range(steps):
        check()
        optimizer.zero_grad()
        network(torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
        optimizer.step()


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_batch_norm_kept_sound_trains_the_same_bits_and_says_nothing() -> None:
    bare, guarded = normed(), normed()
    freeze = BatchNormFreeze(guarded, after_task=None, on_event=pytest.fail)

    train(bare, lambda: None)
    train(guarded, freeze.check)
    freeze.end_task(0)

    assert same(bare, guarded)
    assert guarded[1].training
    assert freeze.num_frozen == 0


def poison(norm: nn.BatchNorm1d) -> None:
    norm.running_var[2] = math.nan


def blow_up(norm: nn.BatchNorm1d) -> None:
    norm.running_mean.mul_(1e9)


def reset(norm: nn.BatchNorm1d) -> None:
    norm.reset_running_stats()


@pytest.mark.parametrize(
    ("spoil", "tensor"), [(poison, "1.running_var"), (blow_up, "1.running_mean"), (reset, "1.running_mean")]
)
def test_s8_statistics_that_go_bad_between_steps_are_put_back_and_named(
    spoil: Callable[[nn.BatchNorm1d], None], tensor: str
) -> None:
    events = []
    network = normed()
    freeze = BatchNormFreeze(network, after_task=None, on_event=lambda kind, message, **data: events.append(data))
    train(network, freeze.check)
    freeze.check()
    before = copy.deepcopy(network)

    spoil(network[1])
    put_back = freeze.check()

    assert put_back == ["1"]
    assert torch.equal(network[1].running_mean, before[1].running_mean)
    assert torch.equal(network[1].running_var, before[1].running_var)
    assert (events[0]["tensor"], events[0]["phase"]) == (tensor, "state")
    assert freeze.check() == []


def test_statistics_that_were_never_sound_are_left_for_the_checks_to_find() -> None:
    network = normed()
    network[1].running_var.fill_(math.inf)
    freeze = BatchNormFreeze(network, after_task=None, on_event=pytest.fail)

    assert freeze.check() == freeze.check() == []


def test_a_resumed_guard_goes_back_to_the_statistics_it_knew() -> None:
    network = normed()
    freeze = BatchNormFreeze(network, after_task=None)
    train(network, freeze.check)
    freeze.check()
    state, sound = copy.deepcopy(freeze.state_dict()), network[1].running_var.clone()

    poison(network[1])
    resumed = BatchNormFreeze(network, after_task=None)
    resumed.load_state_dict(state)

    assert resumed.check() == ["1"]
    assert torch.equal(network[1].running_var, sound)


@pytest.mark.parametrize("width", [6, 8])
def test_a_layer_that_takes_anothers_place_is_no_reset(width: int) -> None:
    network = normed()
    freeze = BatchNormFreeze(network, after_task=None, on_event=pytest.fail)
    train(network, freeze.check)

    network[0], network[1], network[3] = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 3)

    assert freeze.check() == []


def gradients(*values: float) -> list[Tensor]:
    parameter = nn.Parameter(torch.zeros(len(values)))
    parameter.grad = torch.tensor(values)
    return [parameter]


def test_a_limit_that_follows_the_run_leaves_large_norms_and_cuts_leaps() -> None:
    clip = GradientClip()
    usual = [clip(gradients(30.0 + step % 5, 40.0)) for step in range(20)]

    leap = gradients(3e6, 4e6)
    norm = clip(leap)

    assert min(usual) >= 50
    assert norm == pytest.approx(5e6)
    assert torch.linalg.vector_norm(leap[0].grad).item() == pytest.approx(4 * max(usual))
    assert clip.num_acted == 1


def test_a_limit_that_follows_the_run_moves_with_a_new_task() -> None:
    clip = GradientClip()
    for _ in range(20):
        clip(gradients(1.0))

    passed = []
    for _ in range(4):
        step = gradients(100.0)
        clip(step)
        passed.append(step[0].grad.item())

    assert passed == pytest.approx([4, 16, 64, 100])


def test_it_knows_no_limit_before_it_has_seen_a_few_norms_nor_where_all_are_zero() -> None:
    clip, still = GradientClip(), GradientClip()
    for _ in range(20):
        still(gradients(0.0))

    assert clip.limit == still.limit == math.inf


def test_a_resumed_clip_has_the_same_limit() -> None:
    clip, resumed = GradientClip(), GradientClip()
    for step in range(30):
        clip(gradients(float(step)))

    resumed.load_state_dict(clip.state_dict())

    assert resumed.limit == clip.limit == 116


@pytest.mark.parametrize("slack", [1.0, 0.0, math.inf, math.nan])
def test_a_slack_that_would_clip_every_step_or_none_is_refused(slack: float) -> None:
    with pytest.raises(UsageError, match=r"GradientClip: got slack=.*, expected a finite number above 1"):
        GradientClip(slack=slack)


def test_a_rate_that_is_only_held_stays_and_is_put_back() -> None:
    events = []
    optimizer = torch.optim.SGD(normed().parameters(), lr=0.03)
    schedule = LearningRateSchedule(
        0.03, 5, share=unchanged, on_event=lambda kind, message, **data: events.append(data)
    )
    for task in range(5):
        schedule.apply(optimizer, task)
    quiet = list(events)

    optimizer.param_groups[0]["lr"] = 30.0
    schedule.apply(optimizer, 4)

    assert quiet == []
    assert optimizer.param_groups[0]["lr"] == 0.03
    assert events[0]["found"] == 30.0


def test_replay_weights_that_are_only_held_stay_and_are_put_back() -> None:
    events = []
    weights = AdaptiveReplayWeights(5, share=unchanged, on_event=lambda kind, message, **data: events.append(data))
    seen = {weights(task, 0.3, 0.5) for task in range(5)}
    quiet = list(events)

    exploded = weights(4, 3e6, 0.5)

    assert seen == {(0.3, 0.5)}
    assert quiet == []
    assert exploded == (0.3, 0.5)
    assert events[0]["found"] == [3e6, 0.5]
