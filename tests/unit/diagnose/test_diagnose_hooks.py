"""What can be said without a replay: the first bad module in order of execution, and nothing more."""

from __future__ import annotations

import math

import pytest

from stabilitykit.diagnose.conclude import Context
from stabilitykit.diagnose.hooks import Passed, Symptoms, by_hooks

FINE, NAN, INF = 1.0, math.nan, math.inf


def place(symptoms: Symptoms) -> tuple[str, str, str, str]:
    origin = by_hooks(symptoms, Context(step=3, proof="hooks")).origin
    return origin.phase, origin.module, origin.tensor, origin.kind


@pytest.mark.parametrize(
    ("symptoms", "expected"),
    [
        (
            Symptoms(outputs=[Passed("a", FINE), Passed("b", INF), Passed("c", NAN)], losses=["loss"]),
            ("forward", "b", "", "inf"),
        ),
        (Symptoms(outputs=[Passed("a", FINE)], losses=["loss"]), ("forward", "", "", "nan")),
        (
            Symptoms(inputs=[Passed("input[0]", NAN)], outputs=[Passed("a", NAN)], losses=["loss"]),
            ("data", "", "input[0]", "nan"),
        ),
        (
            Symptoms(outputs=[Passed("a", NAN)], losses=["loss"], before=["a.weight"]),
            ("weights", "a", "a.weight", "nan"),
        ),
        (
            Symptoms(
                outputs=[Passed("a", FINE), Passed("b", FINE)],
                output_gradients=[Passed("b", FINE), Passed("a", INF)],
                gradients=["a.weight"],
            ),
            ("backward", "b", "a.weight", "inf"),
        ),
        (
            Symptoms(outputs=[Passed("a", FINE)], output_gradients=[Passed("a", FINE)], gradients=["a.weight"]),
            ("backward", "a", "a.weight", "nan"),
        ),
        (Symptoms(clipped=["a.weight"], parameters=["a.weight"]), ("clip", "a", "a.weight", "nan")),
        (Symptoms(parameters=["a.weight"]), ("optimizer", "a", "a.weight", "nan")),
        (Symptoms(buffers=["n.running_var"]), ("state", "n", "n.running_var", "inf")),
    ],
    ids=["output", "loss", "input", "weights", "backward", "own gradient", "clip", "optimizer", "state"],
)
def test_the_place_is_the_first_that_was_bad(symptoms: Symptoms, expected: tuple[str, str, str, str]) -> None:
    assert place(symptoms) == expected


def test_the_answer_is_honest_about_what_it_is_and_says_how_to_get_a_better_one() -> None:
    diagnosis = by_hooks(Symptoms(losses=["loss"]), Context(step=3, proof="hooks", task=1))

    assert (diagnosis.origin.proof, diagnosis.origin.op, diagnosis.origin.line) == ("hooks", "", None)
    assert (diagnosis.origin.step, diagnosis.task, diagnosis.noticed) == (3, 1, "loss")
    assert "monitor.replayable(train_step)" in diagnosis.remedies[0]
