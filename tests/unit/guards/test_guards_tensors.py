from collections.abc import Callable

import pytest
import torch
from torch import nn

from stabilitykit.guards.tensors import ModelTensors


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), nn.Linear(3, 2))


def add_child(model: nn.Sequential) -> None:
    model[1].append(nn.Linear(3, 3))


def replace_child(model: nn.Sequential) -> None:
    model[1][0] = nn.BatchNorm1d(3)


def rename_child(model: nn.Sequential) -> None:
    model._modules["head"] = model._modules.pop("2")


def add_below_what_was_added(model: nn.Sequential) -> None:
    add_child(model)
    model[1][2].inner = nn.Linear(1, 1)


def register_parameter(model: nn.Sequential) -> None:
    model[0].scale = nn.Parameter(torch.ones(3))


def assign_buffer(model: nn.Sequential) -> None:
    model[1][0].running_mean = torch.ones(3)


CHANGES: list[Callable[[nn.Sequential], object]] = [
    add_child,
    replace_child,
    rename_child,
    add_below_what_was_added,
    register_parameter,
    assign_buffer,
    lambda model: setattr(model[2], "weight", nn.Parameter(torch.zeros(2, 3))),
    lambda model: setattr(model[2], "weight", model[0].weight),
    lambda model: model[2].register_parameter("bias", None),
    lambda model: model[1][0].register_buffer("seen", torch.zeros(1), persistent=False),
    lambda model: model.pop(2),
    lambda model: model.insert(0, nn.Linear(2, 2)),
    lambda model: nn.utils.parametrizations.weight_norm(model[0]),
]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_joins_or_leaves_a_model_is_noticed(change: Callable[[nn.Sequential], object]) -> None:
    model = make_model()
    tensors = ModelTensors(model)
    before = [*tensors.parameters.items(), *tensors.buffers.items()]

    change(model)
    found = [*tensors.parameters.items(), *tensors.buffers.items()]

    expected = [*model.named_parameters(), *model.named_buffers()]
    assert [(name, id(entry)) for name, entry in found] == [(name, id(entry)) for name, entry in expected]
    assert [(name, id(entry)) for name, entry in found] != [(name, id(entry)) for name, entry in before]


def test_a_model_that_stays_as_it_is_is_walked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    tensors = ModelTensors(model)
    first = tensors.parameters
    monkeypatch.setattr(nn.Module, "named_modules", lambda *_: pytest.fail("walked again"))

    with torch.no_grad():
        model[0].weight.mul_(2)
    model[1].eval()

    assert tensors.parameters is first
    assert list(tensors.buffers) == ["1.0.running_mean", "1.0.running_var", "1.0.num_batches_tracked"]
