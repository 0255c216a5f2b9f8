"""Whose line an operation is: the user's, in forward, in backward, in code of theirs that autograd calls."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from stabilitykit.diagnose.site import NOWHERE, Caller, Site, find_caller


class Callers(TorchDispatchMode):
    """Asks at every operation of the given name who called it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.found = name, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] == f"aten::{self.name}":
            self.found.append(find_caller(2))
        return func(*args, **(kwargs or {}))


def line_of(function: Any, text: str) -> int:
    """The number of the line of `function` that holds `text`."""
    lines, first = inspect.getsourcelines(function)
    return first + next(index for index, line in enumerate(lines) if text in line)


def test_a_forward_operation_belongs_to_the_users_line() -> None:
    with Callers("exp") as callers:
        torch.exp(torch.ones(1))  # mine

    (caller,) = callers.found
    assert caller == Caller(caller.site, in_backward_code=False, recomputed=False)
    assert caller.site.line == line_of(test_a_forward_operation_belongs_to_the_users_line, "# mine")
    assert caller.site.code == "torch.exp(torch.ones(1))  # mine"
    assert caller.site.function == "test_a_forward_operation_belongs_to_the_users_line"


def test_inside_a_module_of_torchs_the_line_is_the_one_that_called_it() -> None:
    layer = nn.Softmax(-1)

    with Callers("_softmax") as callers:
        layer(torch.ones(2))  # the caller

    assert callers.found[0].site.code.endswith("# the caller")


def test_an_operation_of_autograds_engine_belongs_to_the_line_of_backward() -> None:
    loss = torch.ones(1, requires_grad=True).sqrt().sum()

    with Callers("div") as callers:
        loss.backward()  # the engine starts here

    assert callers.found
    assert all(caller.site.code.endswith("# the engine starts here") for caller in callers.found)
    assert not any(caller.in_backward_code for caller in callers.found)


class Cube(torch.autograd.Function):
    """A function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.log(x) * gradient  # wrong, and the user's own


def test_a_custom_functions_backward_is_the_users_code() -> None:
    loss = Cube.apply(torch.ones(2, requires_grad=True)).sum()

    with Callers("log") as callers:
        loss.backward()

    (caller,) = callers.found
    assert caller.in_backward_code
    assert caller.site.code.endswith("# wrong, and the user's own")


def test_a_tensor_hook_is_the_users_code() -> None:
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda gradient: gradient.log())  # in a hook

    with Callers("log") as callers:
        (x * 2).sum().backward()

    assert callers.found[0].in_backward_code
    assert callers.found[0].site.code.endswith("# in a hook")


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_is_known_from_the_first(reentrant: bool) -> None:
    def segment(x: Tensor) -> Tensor:
        return torch.exp(x)  # twice

    x = torch.ones(2, requires_grad=True)
    with Callers("exp") as callers:
        checkpoint(segment, x, use_reentrant=reentrant).sum().backward()

    assert [caller.recomputed for caller in callers.found] == [False, True]
    assert {caller.site.code for caller in callers.found} == {"return torch.exp(x)  # twice"}


def test_a_file_below_the_working_directory_is_shown_relative_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert Site(str(tmp_path / "train.py"), 3).shown == "train.py"
    assert Site("/elsewhere/train.py", 3).shown == "/elsewhere/train.py"


def test_nowhere_is_false_and_has_no_text() -> None:
    assert not NOWHERE
    assert (NOWHERE.code, NOWHERE.shown) == ("", "")


def test_a_line_that_cannot_be_read_has_no_text() -> None:
    assert Site("<stdin>", 1).code == ""
