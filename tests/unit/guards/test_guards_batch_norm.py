import copy
import io

import pytest
import torch
from torch import nn

from stabilitykit.guards import BatchNormFreeze, freeze_batch_norm, train_eval_gap


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3))


def statistics(network: nn.Module) -> list[torch.Tensor]:
    return [entry.clone() for entry in network.buffers()]


def test_s1_frozen_batch_norm_survives_train() -> None:
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


def test_s1_a_mode_set_past_train_still_moves_no_statistics() -> None:
    network = make_network()
    freeze_batch_norm(network)
    before = statistics(network)

    network[1].training = True
    network(torch.randn(8, 1, 8, 8) * 50)

    assert all(map(torch.equal, before, statistics(network)))


def test_s2_training_and_evaluation_normalise_alike_once_frozen() -> None:
    network = make_network()
    network[2] = nn.Identity()
    inputs = torch.randn(16, 1, 8, 8) * 5 + 3
    state = copy.deepcopy(network.state_dict())

    stale = train_eval_gap(network, inputs)
    freeze_batch_norm(network)

    assert stale > 0.5
    assert train_eval_gap(network, inputs) == 0
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())


def test_s3_only_the_task_named_freezes_and_layers_of_every_dimension_are_covered() -> None:
    network = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(3), nn.BatchNorm3d(3), nn.BatchNorm1d(3).eval())
    network[3].track_running_stats = False  # a user's own choice is none of the guard's business
    freeze = BatchNormFreeze(network, after_task=1)

    freeze.end_task(0)
    after_first = freeze.num_frozen
    freeze.end_task(1)

    assert after_first == 0
    assert freeze.num_frozen == 4
    assert not network[3].track_running_stats


def test_s15_what_thaws_a_layer_by_other_ways_is_put_back_and_named() -> None:
    events = []
    network = make_network()
    freeze = BatchNormFreeze(network, on_event=lambda kind, message, **data: events.append(data))
    freeze.freeze()
    frozen = statistics(network)

    network[1].__class__ = nn.BatchNorm2d
    network.train()
    network(torch.randn(8, 1, 8, 8) * 50)
    thawed = freeze.check()

    assert thawed == ["1"]
    assert events[-1]["modules"] == ["1"]
    assert all(map(torch.equal, frozen[:2], statistics(network)[:2]))
    assert not network[1].training
    assert freeze.check() == []


def test_in_a_loop_of_ones_own_it_acts_once_and_never_again() -> None:
    network = make_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    freeze = BatchNormFreeze(network)

    for task in range(3):
        network.train()
        for _ in range(2):
            optimizer.zero_grad()
            network(torch.randn(4, 1, 8, 8)).square().mean().backward()
            optimizer.step()
            freeze.check()
        freeze.end_task(task)

    assert freeze.num_acted == 1
    assert network[1].weight.grad is not None


def test_before_its_task_it_changes_no_bit() -> None:
    bare, guarded = make_network(), make_network()
    freeze = BatchNormFreeze(guarded, on_event=pytest.fail)

    for network in (bare, guarded):
        torch.manual_seed(1)
        network(torch.randn(8, 1, 8, 8))
        freeze.check()

    assert all(map(torch.equal, statistics(bare), statistics(guarded)))


def test_a_frozen_network_can_be_copied_and_saved() -> None:
    network = make_network()
    freeze_batch_norm(network)

    file = io.BytesIO()
    torch.save(copy.deepcopy(network), file)
    file.seek(0)
    restored = torch.load(file, weights_only=False).train()

    assert not restored[1].training
