"""An exception is about what the condition around its raise had looked at."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from stabilitykit.diagnose.graph import Leaf
from stabilitykit.diagnose.raised import Look, looked_at
from stabilitykit.diagnose.site import user_lines
from stabilitykit.schema import TensorSummary

LOSS, METRIC = (
    Leaf("unknown", name, TensorSummary(name=name, dtype="float32", shape=(), numel=1)) for name in ("loss", "metric")
)


class Script:
    """Stands for a training loop; `look` is where the tracer would have seen Python read a bad value."""

    def __init__(self) -> None:
        self.looks: list[Look] = []

    def look(self, leaf: Leaf) -> bool:
        self.looks.append(Look(leaf, user_lines(2)))
        return True

    def raises_at_once(self) -> None:
        if self.look(LOSS):
            raise KeyError("loss")

    def looks_elsewhere_first(self) -> None:
        if self.look(LOSS):
            for _ in range(3):
                self.look(METRIC)
            raise KeyError("loss")

    def raises_otherwise(self) -> None:
        if not self.look(LOSS):
            self.looks.clear()
        else:
            raise KeyError("loss")

    def asserts(self) -> None:
        assert not self.look(LOSS)

    def asks_a_function(self) -> None:
        def is_bad() -> bool:
            return self.look(LOSS)

        if is_bad():
            raise KeyError("loss")

    def raises_for_another_reason(self) -> None:
        if self.look(METRIC):
            pass
        raise KeyError("shape")

    def raises_within_a_loop_over_other_things(self) -> None:
        self.look(METRIC)
        for _ in range(3):
            if len(self.looks) == 1:
                raise KeyError("shape")


def raised_by(function: Callable[[], None]) -> Exception:
    with pytest.raises((KeyError, AssertionError)) as caught:
        function()
    return caught.value


@pytest.mark.parametrize(
    "name", ["raises_at_once", "looks_elsewhere_first", "raises_otherwise", "asserts", "asks_a_function"]
)
def test_the_value_in_the_condition_is_the_one(name: str) -> None:
    script = Script()

    error = raised_by(getattr(script, name))

    assert looked_at(error, script.looks) is LOSS


@pytest.mark.parametrize("name", ["raises_for_another_reason", "raises_within_a_loop_over_other_things"])
def test_a_value_that_no_condition_around_the_raise_looked_at_is_not(name: str) -> None:
    script = Script()

    error = raised_by(getattr(script, name))

    assert looked_at(error, script.looks) is None


def test_code_without_a_source_has_no_conditions() -> None:
    names: dict[str, object] = {}
    exec(compile("def fail():\n    if True:\n        raise KeyError", "<no file>", "exec"), names)

    error = raised_by(names["fail"])  # type: ignore[arg-type]

    assert looked_at(error, [Look(LOSS, [("<no file>", 2)])]) is None


def test_the_lines_that_led_here_are_the_users_innermost_first() -> None:
    here = sys._getframe().f_lineno

    lines = user_lines()

    assert lines[0] == (__file__, here + 2)
    assert not any("torch" + "/" in file for file, _ in lines)
