"""A random network in a random training loop, one of its operations faulty: the verdict is that operation, or none.

RANDOM_NETWORKS=500 asks for so many faulty networks (and two fifths as many healthy ones).
"""

from __future__ import annotations

import inspect
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from random_faults import FAULTS
from random_networks import LAYERS, LOSSES, OPTIMIZERS, ROWS, WIDTHS, Recipe, Stage, Training
from torch import Tensor

import stabilitykit as sk

pytestmark = pytest.mark.filterwarnings("ignore:var\\(\\). degrees of freedom")
EXAMPLES = int(os.environ.get("RANDOM_NETWORKS", "150"))
CALLS = ("plain", "residual", "twice", "checkpoint", "reentrant")
HABITS = ("markers", "activity", "keep_gradients", "frozen", "teacher", "metric", "closure", "autocast")


@st.composite
def recipes(draw: DrawFn, *, faulty: bool) -> Recipe:
    def one_of(*choices: str) -> str:
        return draw(st.sampled_from(choices))

    stage = st.builds(Stage, st.sampled_from([*LAYERS]), st.sampled_from(WIDTHS), st.sampled_from(CALLS))
    habits = HABITS if faulty else (*HABITS, "scaler")
    recipe = Recipe(
        stages=tuple(draw(st.lists(stage, min_size=2, max_size=6))),
        optimizer=one_of(*OPTIMIZERS),
        loss=one_of(*LOSSES),
        batch=one_of("tuple", "dict", "list", "dataclass"),
        returned=one_of("tensor", "float", "dict", "none"),
        clip=one_of("none", "norm", "value", "by_hand"),
        backwards=one_of("one", "two", "accumulated", "by_hand", "penalty"),
        habits=frozenset(draw(st.sets(st.sampled_from(habits)))),
        seed=draw(st.integers(0, 999)),
    )
    if not faulty:
        return recipe
    fault = {
        "fault": one_of(*FAULTS),
        "place": one_of("block", "inner", "loss"),
        "position": draw(st.integers(0, 5)),
        "through": one_of("whole", "chunk", "slice", "strided"),
        "step": draw(st.integers(0, 3)),
        "row": draw(st.integers(0, ROWS - 1)),
    }
    return Recipe(**{**vars(recipe), **fault})


@dataclass
class Harm:
    """What a run without a monitor shows: the oracle.  A bad value that is masked or saturated away does none."""

    step: int = -1
    loss: bool = False
    gradient: bool = False
    state: bool = False

    @property
    def done(self) -> bool:
        return self.loss or self.gradient or self.state

    def told(self, recipe: Recipe) -> bool:
        """Whether anybody but the step itself can see it: a loss that is not returned and harms no gradient is not."""
        return self.gradient or self.state or recipe.returned != "none"


def harm_of(recipe: Recipe) -> Harm:
    training = Training(recipe)
    harm = Harm()

    def look(loss: Tensor) -> None:
        gradients = [parameter.grad for parameter in training.model.parameters() if parameter.grad is not None]
        harm.loss = not bool(loss.isfinite())
        harm.gradient = not all(bool(gradient.isfinite().all()) for gradient in gradients)

    training.before_update = look
    for step, batch in enumerate(training.given()):
        before = [bool(buffer.isfinite().all()) for buffer in training.model.buffers()]
        try:
            training.train_step(batch)
        except RuntimeError:  # a kernel that refuses what the fault has left behind
            if not harm.done:
                raise
        after = [bool(buffer.isfinite().all()) for buffer in training.model.buffers()]
        harm.step, harm.state = step, any(good and not still for good, still in zip(before, after, strict=True))
        if harm.done:
            break
    return harm


def diagnosed(recipe: Recipe) -> sk.Diagnosis | None:
    training = Training(recipe)
    config = sk.MonitorConfig(report=False, compact=False)
    with tempfile.TemporaryDirectory() as folder:
        monitor = sk.attach(
            training.model, training.optimizer, Path(folder) / "run", config=config, stateful=training.stateful
        )
        with monitor, suppress(sk.NonFiniteError):
            step = monitor.replayable(training.train_step)
            for batch in training.given():
                step(batch)
    return monitor.diagnosis


def expected(recipe: Recipe, harm: Harm) -> dict[str, set[object]]:
    """What may be said of each field of the origin."""
    fault = recipe.faulty
    assert fault is not None
    phases = {fault.phase}
    if fault.phase == "forward" and (not harm.loss or recipe.backwards == "penalty"):
        # The loss recovered: harm was done by the Inf itself, or by the derivative of the operation that made it.
        phases |= {"backward"} if harm.gradient or harm.loss else {"state"}
    again = fault.phase == "forward" and "teacher" in recipe.habits  # the teacher, no part of the model, runs it too
    may_be: dict[str, set[object]] = {
        "step": {recipe.step},
        "phase": phases,
        "kind": set(fault.kinds.split()) if phases == {fault.phase} else {"nan", "inf"},
        "module": {recipe.module, ""} if again else {recipe.module},
        "op": {fault.op},
        "file": {str(Path(inspect.getfile(fault.apply)).relative_to(Path.cwd()))},
        "line": {fault.line},
        "code": {fault.code},
        "proof": {"replayed"},
    }
    if recipe.loss == "binary" and "autocast" in recipe.habits:
        may_be["proof"].add("replayed-differs")  # torch rounds this loss' bfloat16 gradient otherwise under a mode
    if fault.rowwise and recipe.backwards != "accumulated":
        may_be["samples"] = {(recipe.row,)} | ({()} if "state" in phases else set())
    return may_be


thorough = settings(
    max_examples=EXAMPLES,
    derandomize="RANDOM_NETWORKS" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
LINEAR, REENTRANT = Stage("linear", 8, "plain"), Stage("linear", 8, "reentrant")


@thorough
@given(recipes(faulty=True))
@example(Recipe((LINEAR, LINEAR), clip="value", fault="in_a_tensor_hook", place="loss", step=2))
@example(Recipe((LINEAR, REENTRANT), habits=frozenset({"closure"}), returned="none", fault="log_of_zero", position=1))
@example(Recipe((LINEAR, REENTRANT), fault="in_an_own_backward", position=1))
@example(Recipe((LINEAR, LINEAR), backwards="by_hand", returned="float", fault="negative_power_of_zero", place="loss"))
def test_the_one_faulty_operation_is_named_exactly(recipe: Recipe) -> None:
    harm = harm_of(recipe)

    diagnosis = diagnosed(recipe)

    if not harm.done:
        assert diagnosis is None, f"no harm was done, and the verdict is: {diagnosis.verdict}"
        return
    assume(harm.step == recipe.step and harm.told(recipe))  # not one that diverges by itself
    assert diagnosis is not None, f"missed: {harm}"
    wrong = {
        name: (getattr(diagnosis.origin, name), may_be)
        for name, may_be in expected(recipe, harm).items()
        if getattr(diagnosis.origin, name) not in may_be
    }
    assert not wrong, f"said, expected: {wrong}; {harm}; {diagnosis.verdict}"


@settings(thorough, max_examples=max(EXAMPLES * 2 // 5, 1))
@given(recipes(faulty=False))
def test_a_healthy_network_gives_no_diagnosis(recipe: Recipe) -> None:
    assume("scaler" in recipe.habits or not harm_of(recipe).done)

    diagnosis = diagnosed(recipe)

    assert diagnosis is None, diagnosis.verdict


def test_a_scaler_that_skips_inside_a_fused_kernel_raises_no_alarm() -> None:
    stages = (Stage("linear", 4, "plain"), Stage("layer_norm", 8, "plain"))

    diagnosis = diagnosed(Recipe(stages, optimizer="adamw_fused", habits=frozenset({"scaler"})))

    assert diagnosis is None


@pytest.mark.parametrize("name", FAULTS)
def test_every_faulty_operation_is_harmless_until_its_row_is_marked(name: str) -> None:
    stages = (Stage("linear", 8, "plain"), Stage("linear", 4, "plain"))
    recipe = Recipe(stages, fault=name, step=2, habits=frozenset({"activity"}))

    harm = harm_of(recipe)

    assert harm.step == 2
    assert harm.done
    assert harm.loss == (recipe.faulty.phase == "forward" and not name.startswith("masked"))
