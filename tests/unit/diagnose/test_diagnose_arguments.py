"""A dispatched call through its schema: what it reads, writes and returns as a view; one group an element of a list."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stabilitykit.diagnose.arguments import Call, Group, base_name


class Calls(TorchDispatchMode):
    """Keeps every call and its result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Call, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        self.seen.append((call, result))
        return result


def dispatched(function: Callable[[], Any], name: str) -> tuple[Call, Any]:
    """The one call of `name` that `function` makes."""
    with torch.no_grad(), Calls() as calls:
        function()
    found = [(call, result) for call, result in calls.seen if call.name == name]
    assert len(found) == 1, [call.name for call, _ in calls.seen]
    return found[0]


def groups(function: Callable[[], Any], name: str) -> list[Group]:
    call, result = dispatched(function, name)
    return list(call.groups(result))


@pytest.mark.parametrize(
    ("full", "base"),
    [
        ("aten::_foreach_addcdiv_.ScalarList", "addcdiv"),
        ("aten::_softmax", "softmax"),
        ("aten::div_.Tensor", "div"),
        ("aten::_fused_adam_", "fused_adam"),
        ("mylib::scaled_dot", "scaled_dot"),
        ("aten::__and__.Tensor", "and"),
    ],
)
def test_the_base_name_is_what_a_user_calls_the_operation(full: str, base: str) -> None:
    assert base_name(full) == base


def test_a_view_writes_nothing() -> None:
    x = torch.ones(4, 3)

    for name, view in {"t": x.t, "view": lambda: x.view(-1), "select": lambda: x[0], "slice": lambda: x[1:]}.items():
        assert groups(view, name) == []


def test_a_plain_operation_writes_its_result_from_all_its_inputs() -> None:
    x, y = torch.ones(3), torch.ones(3)

    (group,) = groups(lambda: x / y, "div")

    assert list(group.inputs) == [0, 1]
    assert len(group.written) == 1


def test_an_in_place_operation_writes_the_tensor_it_is_called_on_and_still_reads_it() -> None:
    x, y = torch.ones(3), torch.ones(3)

    call, result = dispatched(lambda: x.mul_(y), "mul")

    (group,) = call.groups(result)
    assert call.declared_writes == {"self"}
    assert [tensor is x for tensor in group.written] == [True]
    assert call.reads("self")
    assert call.reads("other")


@pytest.mark.parametrize(("name", "change"), [("copy", "copy_"), ("fill", "fill_"), ("zero", "zero_")])
def test_an_operation_that_overwrites_does_not_read_what_was_there(name: str, change: str) -> None:
    x = torch.ones(3)
    given = {"copy": (torch.zeros(3),), "fill": (0.0,), "zero": ()}[name]

    call, _ = dispatched(lambda: getattr(x, change)(*given), name)

    assert not call.reads("self")
    assert call.keep_overwritten([]) == {}


def test_what_is_about_to_be_written_over_is_kept_as_evidence() -> None:
    x = torch.full((3,), 2.0)
    func = torch.ops.aten.mul_.Tensor
    call = Call(func, (x, torch.zeros(3)), {})

    kept = call.keep_overwritten([])
    func(x, torch.zeros(3))

    assert kept[0].tolist() == [2.0] * 3
    assert call.evidence([0, 1], kept)[0].max == 2.0


def test_an_operation_that_takes_the_shape_alone_reads_no_values() -> None:
    x = torch.full((3,), math.nan)

    for name, function in {
        "zeros_like": lambda: torch.zeros_like(x),
        "ones_like": lambda: torch.ones_like(x),
        "new_zeros": lambda: x.new_zeros(2),
    }.items():
        call, _ = dispatched(function, name)
        assert not call.reads("self"), name


def test_memory_that_is_not_filled_yet_belongs_to_the_call_that_gave_it_out() -> None:
    (group,) = groups(lambda: torch.empty(3), "empty")

    assert [tuple(tensor.shape) for tensor in group.written] == [(3,)]


def test_the_elements_of_a_foreach_are_told_apart() -> None:
    parameters, gradients = [torch.ones(2), torch.ones(3)], [torch.ones(2), torch.ones(3)]

    first, second = groups(lambda: torch._foreach_add_(parameters, gradients, alpha=-0.1), "add")

    assert [tensor is parameters[0] for tensor in first.written] == [True]
    assert [tensor is parameters[1] for tensor in second.written] == [True]
    assert not set(first.inputs) & set(second.inputs)


def test_a_foreach_that_returns_gives_one_result_an_element() -> None:
    tensors = [torch.ones(2), torch.ones(3)]

    found = groups(lambda: torch._foreach_sqrt(tensors), "sqrt")

    assert [tuple(group.written[0].shape) for group in found] == [(2,), (3,)]


def test_a_scalar_tensor_is_read_by_every_element_of_a_foreach() -> None:
    tensors, norm = [torch.ones(2), torch.ones(3)], torch.tensor(2.0)

    found = groups(lambda: torch._foreach_mul_(tensors, norm), "mul")

    shared = set(found[0].inputs) & set(found[1].inputs)
    assert len(shared) == 1


def test_a_fused_optimizer_writes_parameter_and_state_of_each_element() -> None:
    parameters = [torch.ones(2), torch.ones(3)]
    moments = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]

    def update() -> None:
        torch._fused_adam_(
            parameters,
            [torch.ones_like(p) for p in parameters],
            *moments,
            [],
            [torch.tensor(1.0), torch.tensor(1.0)],
            lr=0.1,
            beta1=0.9,
            beta2=0.99,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    found = groups(update, "fused_adam")

    assert len(found) == 2
    for group, parameter, first, second in zip(found, parameters, *moments, strict=True):
        written = {id(tensor) for tensor in group.written}
        assert {id(parameter), id(first), id(second)} <= written


def test_a_cat_is_one_group_of_all_its_tensors() -> None:
    (group,) = groups(lambda: torch.cat([torch.ones(2), torch.ones(3)]), "cat")

    assert list(group.inputs) == [0, 1]


@pytest.mark.parametrize(
    ("function", "name", "placed"),
    [
        (lambda x: x.masked_fill(x > 0, -math.inf), "masked_fill", True),
        (lambda x: torch.full((2,), math.inf), "full", True),
        (lambda x: x.masked_fill(x > 0, 0.0), "masked_fill", False),
        (lambda x: x * math.inf, "mul", False),
        (lambda x: torch.tensor([math.inf]), "lift_fresh", True),
    ],
    ids=["mask", "full", "finite fill", "product", "literal"],
)
def test_a_constant_that_is_put_in_place_is_told_from_one_that_is_computed_with(
    function: Callable[[Tensor], Tensor], name: str, placed: bool
) -> None:
    x = torch.ones(2)

    call, _ = dispatched(lambda: function(x), name)

    assert call.places_constant is placed


def test_a_number_that_is_not_finite_is_named() -> None:
    x = torch.ones(2)

    call, _ = dispatched(lambda: torch.add(x, x, alpha=math.nan), "add")

    assert call.nonfinite_scalar == "alpha=nan"
    assert [entry.describe() for entry in call.evidence([0], {})][-1] == "alpha = nan"


def test_the_rows_an_index_takes_are_known() -> None:
    buffer = torch.arange(12.0).reshape(6, 2)
    index = torch.tensor([4, -1, 4])
    mask = torch.tensor([False, True, False, False, False, True])

    assert dispatched(lambda: buffer[index], "index")[0].rows_taken(buffer) == (4, 5, 4)
    assert dispatched(lambda: buffer.index_select(0, index.abs()), "index_select")[0].rows_taken(buffer) == (4, 1, 4)
    assert dispatched(lambda: buffer[-2], "select")[0].rows_taken(buffer) == (4,)
    assert Call(torch.ops.aten.index.Tensor, (buffer, [mask]), {}).rows_taken(buffer) == (1, 5)


def test_the_number_a_narrow_dtype_could_not_hold_is_computed_in_float64() -> None:
    x = torch.full((2,), 300.0, dtype=torch.float16)

    call, result = dispatched(lambda: x * x, "mul")

    assert result.isinf().all()
    assert call.absmax_in_float64({}) == 90_000.0
