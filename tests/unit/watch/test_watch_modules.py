"""Rows of module outputs and their gradients, for every odd thing a module does."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabilitykit.watch import modules


def test_outputs_come_in_the_order_of_execution_innermost_first(watched) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    watch = watched(model)

    model(torch.randn(2, 3))

    rows = watch.rows()
    assert [row["name"] for row in rows] == ["0", "1.0", "1.1", "1", ""]
    assert [row["order"] for row in rows] == [0, 1, 2, 3, 4]
    assert {(row["role"], row["phase"]) for row in rows} == {("output", "forward")}


def test_gradients_of_outputs_come_in_the_order_of_backward(watched) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    watch = watched(model, gradients=False)
    loss = model(torch.randn(2, 3)).sum()
    watch.rows()

    loss.backward()

    rows = watch.rows()
    assert [row["name"] for row in rows if row["name"]] == ["2", "1", "0"]
    assert {(row["role"], row["phase"]) for row in rows} == {("output_gradient", "backward")}


@pytest.mark.parametrize(("switch", "left"), [("outputs", {"output_gradient"}), ("output_gradients", {"output"})])
def test_what_the_configuration_leaves_out_is_not_recorded(watched, switch: str, left: set[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    watch = watched(model, gradients=False, **{switch: False})

    model(torch.randn(2, 3)).sum().backward()

    assert {row["role"] for row in watch.rows()} == left


def test_a_module_called_three_times_has_three_rows_told_apart_by_call(watched) -> None:
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared)
    watch = watched(model)

    outputs = [shared(torch.full((1, 3), float(size))) for size in (1, 10, 100)]
    sum(output.sum() for output in outputs).backward()

    rows = [row for row in watch.rows() if row["role"] in ("output", "output_gradient")]
    forward = [(row["name"], row["call"]) for row in rows if row["role"] == "output"]
    assert forward == [("0", 0), ("0", 1), ("0", 2)]
    assert sorted(row["call"] for row in rows if row["role"] == "output_gradient") == [0, 1, 2]
    assert [row["max"] for row in rows[:3]] == pytest.approx([output.max().item() for output in outputs])


def test_calls_are_counted_anew_in_each_step(watched) -> None:
    model = nn.Linear(3, 3)
    watch = watched(model)
    model(torch.ones(1, 3))
    first = watch.rows()

    watch.watch.begin(recording=True, trailing=False)
    model(torch.ones(1, 3))

    assert [row["call"] for row in first + watch.rows()] == [0, 0]


def test_between_recorded_steps_nothing_is_measured(watched) -> None:
    model = nn.Linear(3, 3)
    watch = watched(model)

    watch.watch.begin(recording=False, trailing=False)
    model(torch.ones(1, 3)).sum().backward()

    assert watch.rows() == []


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None


class Giving(nn.Module):
    """Returns what it is told to make of one tensor."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.make = nn.Linear(3, 2), make

    def forward(self, inputs: Tensor) -> Any:
        return self.make(self.layer(inputs))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda y: {"logits": y * 1, "hidden": y * 2}, ["", "[1]"]),
        (lambda y: (y * 1, [y * 2, None]), ["", "[1]"]),
        (lambda y: Output(y * 1, None), [""]),
        (lambda y: None, []),
        (lambda y: (y > 0, y.argmax(-1), "text", 3), ["", "[1]"]),
        (lambda y: torch.empty(0, 2), [""]),
        (lambda y: y.to(torch.complex64), [""]),
        (lambda y: y.to_sparse(), [""]),
        (lambda y: y.half(), [""]),
        (lambda y: y.to("meta"), [""]),
        (lambda y: y.to(torch.float8_e5m2), [""]),
    ],
    ids=["dict", "nested", "dataclass", "none", "integers", "empty", "complex", "sparse", "half", "meta", "float8"],
)
def test_every_kind_of_output_is_taken(watched, make: Callable[[Tensor], Any], names: list[str]) -> None:
    model = Giving(make)
    watch = watched(model)

    model(torch.randn(2, 3))

    assert [row["name"] for row in watch.rows() if row["name"] != "layer"] == names


def test_the_gradient_of_an_output_in_a_dictionary_is_measured(watched) -> None:
    model = Giving(lambda y: {"logits": y * 1})
    watch = watched(model)

    model(torch.randn(2, 3))["logits"].sum().backward()

    assert watch.of("output_gradient") == ["", "layer"]


def test_an_in_place_activation_does_not_disturb_what_was_measured_before_it(watched) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    watch = watched(model)

    model(torch.randn(8, 3)).sum().backward()

    rows = {(row["role"], row["name"]): row for row in watch.rows()}
    assert rows["output", "0"]["min"] < 0
    assert rows["output", "1"]["min"] == 0
    assert ("output_gradient", "0") in rows


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_watched_model_is_not_watched_and_gives_the_same(watched, copied) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    watch = watched(model)

    twin = copied(model)
    inputs = torch.randn(2, 3)
    outputs = twin(inputs)

    assert watch.rows() == []
    assert torch.equal(outputs, model(inputs))


def test_a_watched_model_can_be_saved_and_loaded_whole(watched) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    watched(model)
    file = io.BytesIO()

    torch.save(model, file)
    file.seek(0)

    assert torch.equal(torch.load(file, weights_only=False)[0].weight, model[0].weight)


def test_a_scripted_part_is_left_alone(watched) -> None:
    with pytest.warns(match="deprecated"):
        scripted = torch.jit.script(nn.Linear(3, 3))
    model = nn.Sequential(nn.Linear(3, 3), scripted)
    watch = watched(model)

    model(torch.ones(1, 3))

    assert watch.of("output") == ["0", ""]


def test_hooks_are_gone_after_close(watched) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    optimizer = torch.optim.SGD(model.parameters())
    watch = watched(model, optimizer)

    watch.watch.close()
    model(torch.ones(1, 3)).sum().backward()

    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert watch.rows() == []


def test_attaching_again_and_again_leaves_no_hook_behind(watched) -> None:
    model = nn.Linear(3, 3)

    for _ in range(5):
        watched(model).watch.close()

    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 0


def test_the_trail_holds_a_norm_of_all_that_passed_for_want_of_a_replay(watched) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    watch = watched(model)
    watch.watch.begin(recording=False, trailing=True)

    model(torch.ones(1, 3)).sum().backward()

    inputs, outputs, gradients = watch.watch.trail()
    assert inputs == [("input[0]", pytest.approx(3**0.5))]
    assert [name for name, _ in outputs] == ["0", "1", ""]
    assert {name for name, _ in gradients} == {"", "1", "0"}
    assert watch.rows() == []


def test_where_steps_are_not_told_an_evaluation_is_no_part_of_one(watched) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    watch = watched(model)
    watch.watch.begin(recording=True, trailing=True)

    model.eval()
    with torch.no_grad():
        model(torch.full((2, 3), 100.0))
        model[0](torch.ones(2, 3))  # as a step calls a teacher beside the model
    model.train()
    model(torch.ones(2, 3))

    inputs, outputs, _ = watch.watch.trail()
    assert inputs == [("input[0]", pytest.approx(6**0.5))]
    assert [name for name, _ in outputs] == ["0", "0", "1", ""]
    assert watch.of("output") == ["0", "0", "1", ""]


def test_the_trail_of_endless_calls_has_an_end(watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "TRAIL", 5)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    watch = watched(model)
    watch.watch.begin(recording=False, trailing=True)

    for _ in range(10):
        model[0](torch.ones(2, 3))
    model(torch.ones(2, 3))

    assert [name for name, _ in watch.watch.trail()[1]] == ["0", "0", "0", "1", ""]


def test_what_another_thread_has_the_model_do_is_no_part_of_the_step(watched) -> None:
    model = nn.Linear(3, 4)
    watch = watched(model)

    model(torch.ones(2, 3))
    thread = threading.Thread(target=lambda: model(torch.ones(2, 3)))
    thread.start()
    thread.join()

    assert [row["call"] for row in watch.rows()] == [0]


def test_what_was_measured_before_a_step_begins_is_no_part_of_it(watched) -> None:
    model = nn.Linear(3, 4)
    watch = watched(model)

    model(torch.ones(2, 3))
    watch.watch.begin(recording=True, trailing=False)

    assert watch.rows() == []


def test_outputs_beneath_a_transform_are_measured_with_all_their_samples(watched) -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    watch = watched(model)
    weights = {name: entry.detach() for name, entry in model.named_parameters()}
    inputs = torch.randn(5, 3)

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (row,)).square().sum()

    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, inputs)

    rows = {row["name"]: row for row in watch.rows()}
    assert set(rows) == {"0", ""}
    assert rows["0"]["numel"] == 10
    assert rows["0"]["l2"] == pytest.approx(model(inputs).norm().item(), rel=1e-6)
