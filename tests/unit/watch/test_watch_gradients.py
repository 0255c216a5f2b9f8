"""Gradient norms as backward leaves them, and as the optimizer finds them."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stabilitykit.watch.gradients import GradientTracker, versions_of


def tracked(parameters: dict[str, nn.Parameter]) -> GradientTracker:
    def unseen(measure):
        with torch.no_grad():
            measure()

    return GradientTracker(parameters, unseen, lambda: None)


def halve(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


@pytest.fixture
def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {"large": nn.Parameter(torch.randn(1000)), "small": nn.Parameter(torch.randn(3))}


def norm_of(tensor: Tensor | None) -> float:
    assert tensor is not None
    return torch.linalg.vector_norm(tensor).item()


def expected(parameters: dict[str, nn.Parameter]) -> dict[str, float]:
    return {name: norm_of(entry.grad) for name, entry in parameters.items()}


def test_large_and_small_gradients_keep_their_names(parameters) -> None:
    tracker = tracked(parameters)

    sum((entry.square().sum() for entry in parameters.values()), torch.zeros(())).backward()

    assert tracker.before.read() == expected(parameters)


def test_gradients_that_accumulate_over_two_backwards_are_measured_whole(parameters) -> None:
    tracker = tracked(parameters)

    for _ in range(2):
        sum((entry.square().sum() for entry in parameters.values()), torch.zeros(())).backward()

    assert tracker.num_backwards == 2
    assert tracker.before.read() == expected(parameters)


def test_a_gradient_that_another_hook_changes_is_measured_as_backward_leaves_it(parameters) -> None:
    tracker = tracked(parameters)
    parameters["large"].register_post_accumulate_grad_hook(halve)

    parameters["large"].square().sum().backward()

    assert tracker.before.read() == {"large": norm_of(parameters["large"].grad)}


def test_a_gradient_that_a_hook_takes_away_is_left_out(parameters) -> None:
    tracker = tracked(parameters)
    parameters["large"].register_post_accumulate_grad_hook(lambda entry: setattr(entry, "grad", None))

    (parameters["large"].sum() + parameters["small"].sum()).backward()

    assert list(tracker.before.read()) == ["small"]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_gradients_with_a_graph_of_their_own_leave_no_graph_behind(parameters) -> None:
    tracker = tracked(parameters)

    parameters["large"].square().sum().backward(create_graph=True)

    assert tracker.before.read() == {"large": norm_of(parameters["large"].grad)}
    parameters["large"].grad = None


def test_clipping_is_seen_when_the_optimizer_starts(parameters) -> None:
    tracker = tracked(parameters)
    sum((entry.square().sum() for entry in parameters.values()), torch.zeros(())).backward()
    before = tracker.before.read()

    nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    tracker.update_begins()

    assert tracker.changed
    assert tracker.before.read() == before
    assert tracker.clipped.read() == expected(parameters)


def test_untouched_gradients_are_not_measured_twice(parameters) -> None:
    tracker = tracked(parameters)
    parameters["large"].square().sum().backward()

    tracker.update_begins()

    assert not tracker.changed
    assert not tracker.clipped.read()


def test_closing_takes_the_hooks_off(parameters) -> None:
    tracker = tracked(parameters)

    tracker.close()
    parameters["large"].sum().backward()

    assert tracker.num_backwards == 0


def test_a_parameter_that_is_frozen_when_the_watch_begins_is_measured_once_it_is_thawed(parameters) -> None:
    parameters["large"].requires_grad_(False)
    tracker = tracked(parameters)

    for frozen, thawed in (("large", "small"), ("small", "large")):  # as the two networks of a GAN, turn and turn about
        tracker.begin()
        parameters[frozen].requires_grad_(False)
        parameters[thawed].requires_grad_(True).grad = None
        parameters[thawed].square().sum().backward()

        assert tracker.num_backwards == 1
        assert tracker.before.read()[thawed] == norm_of(parameters[thawed].grad)


def test_a_frozen_parameter_stays_frozen() -> None:
    with torch.inference_mode():
        never = torch.ones(2)
    parameters = {
        "frozen": nn.Parameter(torch.ones(2), requires_grad=False),
        "integers": nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False),
        "inference": never,
    }

    tracked(parameters)

    assert not any(entry.requires_grad for entry in parameters.values())


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float16, 3000.0), (torch.bfloat16, 1e30), (torch.float32, 1e30)], ids=str
)
def test_a_gradient_that_only_overflowed_its_norm_is_told_before_clipping_changes_it(
    dtype: torch.dtype, factor: float
) -> None:
    parameters = {"weight": nn.Parameter(torch.ones(1000, dtype=dtype))}
    tracker = tracked(parameters)

    (parameters["weight"] * factor).sum().backward()
    with torch.no_grad():
        parameters["weight"].grad.mul_(1e-3)
    tracker.update_begins()

    assert tracker.before.read()["weight"] == pytest.approx(factor * 1000**0.5, rel=1e-2)


def test_an_infinite_gradient_is_told_although_it_is_mended_afterwards(parameters) -> None:
    tracker = tracked(parameters)

    (parameters["small"] * torch.tensor([1.0, float("inf"), 1.0])).sum().backward()
    parameters["small"].grad.nan_to_num_(posinf=0.0)
    tracker.update_begins()

    assert tracker.before.read() == {"small": float("inf")}
    assert tracker.clipped.read() == {"small": pytest.approx(2**0.5)}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the inner one's, in the first forward
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_checkpointed_backward_is_one_backward(reentrant: bool, nested: bool) -> None:
    """A reentrant checkpoint runs a backward of its own for each part, within the step's."""
    parts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    tracker = tracked(dict(parts.named_parameters()))
    inputs = torch.randn(2, 4, requires_grad=True)

    def two_parts(hidden: Tensor) -> Tensor:
        hidden = checkpoint(parts[1], parts[0](hidden), use_reentrant=reentrant) if nested else parts[0](hidden)
        return hidden.tanh()

    for _ in range(2):
        hidden = checkpoint(two_parts, inputs, use_reentrant=reentrant)
        checkpoint(parts[2], hidden, use_reentrant=reentrant).sum().backward()

    assert tracker.num_backwards == 2
    assert tracker.before.read() == {
        name: norm_of(entry.grad) for name, entry in parts.named_parameters() if entry.grad is not None
    }


def test_a_checkpointed_backward_that_fails_is_not_waited_for_in_the_next_step() -> None:
    part = nn.Linear(4, 4)
    tracker = tracked(dict(part.named_parameters()))
    inputs = torch.randn(2, 4, requires_grad=True)

    def interrupt(_gradient: Tensor) -> None:
        raise KeyboardInterrupt

    handle = part.weight.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint(part, inputs, use_reentrant=True).sum().backward()
    handle.remove()
    tracker.begin()
    checkpoint(part, inputs, use_reentrant=True).sum().backward()

    assert tracker.num_backwards == 1


def test_gradients_of_many_parameters_leave_the_garbage_collector_little_to_walk_through() -> None:
    tracker = tracked({str(index): nn.Parameter(torch.ones(1)) for index in range(2000)})
    for parameter in tracker._parameters:
        parameter.grad = torch.ones(1)
    held = [parameter.grad for parameter in tracker._parameters]  # they are objects themselves

    gc.collect()
    gc.disable()
    try:
        before = gc.get_count()[0]
        names, gradients = tracker._held()
        versions = versions_of(gradients)
        made = gc.get_count()[0] - before
    finally:
        gc.enable()

    assert len(names) == len(gradients) == len(held) == len(versions[0])
    assert made < 20
