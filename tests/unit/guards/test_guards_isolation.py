import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from stabilitykit.guards import Isolation, isolated


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3))


def score_in_train_mode(network: nn.Module) -> None:
    network.train()
    network(torch.randn(4, 1, 8, 8))


def draw_from_every_stream(network: nn.Module) -> None:
    torch.rand(3)
    random.random()
    np.random.rand(3)  # noqa: NPY002 - the global stream is what is guarded


def run_backward(network: nn.Module) -> None:
    with torch.enable_grad():
        network(torch.ones(4, 1, 8, 8)).square().mean().backward()


def poison_statistics(network: nn.Module) -> None:
    network[1].running_mean.fill_(float("nan"))


def replace_a_buffer(network: nn.Module) -> None:
    network[1].running_mean = torch.full((4,), 9.0)


@pytest.mark.parametrize(
    ("leak", "named"),
    [
        (score_in_train_mode, {"module buffers", "module modes", "random streams"}),
        (draw_from_every_stream, {"random streams"}),
        (run_backward, {"gradients"}),
        (poison_statistics, {"module buffers"}),
        (replace_a_buffer, {"module buffers"}),
    ],
)
def test_whatever_the_block_leaves_behind_is_put_back_and_named(
    leak: Callable[[nn.Module], None], named: set[str]
) -> None:
    events = []
    network = make_network()
    network[2].eval()
    network(torch.ones(4, 1, 8, 8)).sum().backward()
    gradients = [entry.grad for entry in network.parameters()]
    values = [entry.grad.clone() for entry in network.parameters()]
    state, modes = copy.deepcopy(network.state_dict()), [module.training for module in network.modules()]
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002
    isolation = Isolation(network, on_event=lambda kind, message, **data: events.append(data))

    with isolation():
        leak(network)

    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    assert all(entry.grad is held for entry, held in zip(network.parameters(), gradients, strict=True))
    assert all(map(torch.equal, gradients, values))
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == streams[1:]  # noqa: NPY002
    assert len(events) == isolation.num_acted == 1
    assert set(events[0]["leaked"]) == named


def test_s15_an_exception_leaves_no_module_in_eval_mode_and_thaws_no_frozen_one() -> None:
    network = make_network()
    network[1].eval()

    def look_and_fail() -> None:
        with isolated(network):
            network.train()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look_and_fail()

    assert network.training
    assert not network[1].training


def test_an_exception_can_be_contained_and_is_then_an_event() -> None:
    events = []
    network = make_network()

    with Isolation(network, contain=True, on_event=lambda kind, message, **data: events.append(message))():
        raise ZeroDivisionError("a broken score")

    assert "a broken score" in events[0]


def test_within_the_block_there_is_no_graph_and_no_dropout() -> None:
    network = make_network()

    with isolated(network):
        first, second = network(torch.ones(4, 1, 8, 8)), network(torch.ones(4, 1, 8, 8))

    assert not first.requires_grad
    assert torch.equal(first, second)


def test_weights_written_in_the_block_come_back_where_that_was_asked_for_and_are_reported_otherwise() -> None:
    events = []
    network = make_network()
    before = network[4].weight.detach().clone()

    with Isolation(network, weights=True)():
        network[4].weight.add_(1)
    restored = network[4].weight.detach().clone()
    with Isolation(network, on_event=lambda kind, message, **data: events.append(data["severity"]))():
        network[4].weight.add_(1)

    assert torch.equal(restored, before)
    assert events == ["error"]


def test_s16_a_run_with_a_computation_whose_result_is_unused_is_bit_identical_to_one_without() -> None:
    def train(look: bool) -> list[torch.Tensor]:
        network = make_network()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        isolation = Isolation(network, on_event=pytest.fail)
        for _ in range(3):
            if look:
                with isolation():
                    network(torch.ones(2, 1, 8, 8))
            optimizer.zero_grad()
            network(torch.randn(4, 1, 8, 8)).square().mean().backward()
            optimizer.step()
        return [*network.state_dict().values()]

    assert all(map(torch.equal, train(look=False), train(look=True)))
