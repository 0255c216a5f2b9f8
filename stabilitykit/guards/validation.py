"""Guard 6: a training step is checked where it can still be kept from doing harm, and undone where it did some."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from stabilitykit.containers import tensors_of
from stabilitykit.errors import NonFiniteError, UsageError
from stabilitykit.guards.checks import (
    Problem,
    first_bad,
    first_bad_of,
    gradient_norm,
    input_problem,
    label_problem,
    measured,
)
from stabilitykit.guards.guard import Guard
from stabilitykit.guards.learning_rate import COOLED, FACTOR
from stabilitykit.guards.quarantine import set_aside
from stabilitykit.guards.snapshots import GoodStates
from stabilitykit.guards.tensors import ModelTensors

Policy = Literal["raise", "skip", "rollback", "record"]
DONE = {"raise": "raised", "skip": "step undone", "record": "left as it is"}
P = ParamSpec("P")
R = TypeVar("R")
COUNTS = ("step_index", "in_a_row", "cooling")
RECENT, PATIENCE = 50, 5  # sound steps a jump is measured against, and how many it takes


class _Gradients(NamedTuple):
    """The gradients that an update goes by, in short."""

    norm: float
    bad: str = ""  # the first that holds a NaN or Inf
    missing: bool = False


class StepValidation(Guard):
    """Looks at inputs and labels before a step, at loss and gradients before the update, at weights and buffers after.

    A step that is not sound is raised, skipped (undone), rolled back to the last good state (parameters, module
    buffers, optimizer, random streams, and what `stateful` names), or only recorded. Its batch is set aside:

        validation = StepValidation(model, optimizer, policy="rollback")
        train_step = validation.protect(train_step)
        for x, y in loader:
            if (loss := train_step(x, y)) is not None:  # None: the step does not count
                mean_loss.update(loss)

    What makes a step unsound: NaN or Inf in its inputs, loss, gradients, weights or module buffers; labels out of
    range (with `labels` and `num_classes`); a finite loss or gradient norm more than `max_jump` times the largest of
    the last 50 sound steps, or weights that jumped so far in one; gradients that are all zero or missing although the
    loss is not zero, since such a step trains nothing and says so nowhere.

    Under `rollback` a step whose update was refused (see `allows_update`) has harmed nothing and its batch may be to
    blame: it is left out, and the state goes back only when its weights are bad, or the 2nd, 4th, 8th ... step in a
    row fails.

    Args:
        model: the network.
        optimizer: its optimizer.
        policy: `raise` an error, `skip`, `rollback` or `record`.
        stateful: what else a step changes and must be put back: scaler, replay buffer, generators.
        num_classes: width of the head, for label checks.
        max_in_a_row: so many unsound steps in a row end the run: it has stopped training.
        snapshot_every: steps between snapshots under `rollback`; `skip` takes one every step.
        max_jump: see above; `inf` leaves jumps alone.
        lr_factor: after a rollback the learning rate is this share of what it was,
        cool_steps: for so many steps.
        inspect_inputs: look at the batch before the step; False leaves that to a monitor that can say more of it.
        run_dir: offending batches go to `run_dir/quarantine` as safetensors.

    Attributes:
        step_index: 0-based number of the step.
        in_a_row: unsound steps since the last sound one.
        cooling: steps for which the learning rate stays lowered.
        problem: what was wrong with the last step, None when it was sound.

    Raises:
        UsageError: an argument that cannot be right.
    """

    name: ClassVar[str] = "checks"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        policy: Policy = "raise",
        stateful: Sequence[object] = (),
        num_classes: int | None = None,
        max_in_a_row: int = 20,
        snapshot_every: int = 10,
        max_jump: float = 1e3,
        lr_factor: float = 1.0,
        cool_steps: int = 20,
        inspect_inputs: bool = True,
        run_dir: Path | None = None,
        on_event: object | None = None,
    ) -> None:
        super().__init__(on_event)
        if policy not in get_args(Policy):
            raise UsageError(f"StepValidation: got policy={policy!r}, expected one of {', '.join(get_args(Policy))}")
        if min(max_in_a_row, snapshot_every, cool_steps) < 1 or not max_jump > 1 or not 0 < lr_factor <= 1:
            raise UsageError(
                f"StepValidation: got max_in_a_row={max_in_a_row}, snapshot_every={snapshot_every}, "
                f"cool_steps={cool_steps}, max_jump={max_jump}, lr_factor={lr_factor}, expected counts of 1 or more, a "
                "jump above 1 and a factor above 0 and up to 1"
            )
        self.model, self.optimizer, self.policy = model, optimizer, policy
        self.num_classes, self.max_in_a_row, self.max_jump = num_classes, max_in_a_row, max_jump
        self.lr_factor, self.cool_steps, self.run_dir = lr_factor, cool_steps, run_dir
        self.inspect_inputs = inspect_inputs
        self.scaled = any(isinstance(entry, GradScaler) and entry.is_enabled() for entry in stateful)
        self.step_index, self.in_a_row = -1, 0
        self.problem: Problem | None = None
        self._tensors = ModelTensors(model)
        self._states = GoodStates(
            self._tensors,
            model,
            optimizer,
            stateful,
            **({"every": snapshot_every} if policy == "rollback" else {"every": 1, "depth": 1}),
        )
        self._recent: dict[str, deque[float]] = {"loss": deque(maxlen=RECENT), "gradient norm": deque(maxlen=RECENT)}
        self._now: dict[str, float] = {}
        self._refused: Problem | None = None
        self._norms: dict[str, float] = {}  # of the weights, when they were last sound
        self._judged = False
        self._used: _Gradients | None = None  # by the optimizer, in this step
        self.cooling = 0

    def protect(
        self,
        step: Callable[P, R],
        *,
        labels: Callable[P, Tensor] | None = None,
        sample_ids: Callable[P, Tensor | Sequence[int]] | None = None,
    ) -> Callable[P, R | None]:
        """The step with its checks; None comes back where it did not count.

        Args:
            step: zero_grad, forward, backward and update of one batch; returns the loss.
            labels: the labels among the step's arguments.
            sample_ids: rows of the data set the batch was made of, for the record.
        """

        @functools.wraps(step)
        def protected(*args: P.args, **kwargs: P.kwargs) -> R | None:
            self._begin()
            problem = self._inspect(args, kwargs, labels(*args, **kwargs) if labels else None)
            returned: R | None = None
            if problem is None or self.policy == "record":
                if self.policy in ("skip", "rollback"):
                    self._states.before_step(self.step_index)
                returned = self._run(lambda: step(*args, **kwargs))
                problem = problem or self._refused or self.judge(returned)
            self.problem = problem
            if problem is None:
                self._sound()
                return returned
            ids = [] if sample_ids is None else [int(index) for index in sample_ids(*args, **kwargs)]
            self._react(problem, (args, kwargs), ids)
            return returned if self.policy == "record" else None

        return protected

    def allows_update(self, loss: Tensor | float, norm: float | None = None) -> bool:
        """Between backward and update: whether loss and gradients are sound. An update refused does no harm.

        Args:
            loss: of the step.
            norm: L2 norm over all gradients, where it is known; measured otherwise.
        """
        self._refused = self._before_update(_number(loss), self._seen(norm))
        self._judged = True
        return self._refused is None

    def judge(self, loss: object) -> Problem | None:
        """After the update: the first thing that is wrong, None when the step was sound."""
        if not self._judged and isinstance(loss, Tensor | float):
            gradients = self._used or self._seen()  # a loop may have put them back to zero by now
            left_out = self.scaled and self._used is None and gradients.missing
            if not left_out and (problem := self._before_update(_number(loss), gradients)):
                return problem
        weights, buffers = self._tensors.parameters, self._tensors.buffers
        found = measured([*weights.items(), *buffers.items()])
        if problem := self._weight_problem([entry for entry in found if entry[0] in weights]):
            return problem
        if name := first_bad_of(found):
            return Problem(f"module buffers: NaN or Inf in {name}", "state", name)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Counts and recent sound values, for a checkpoint; the snapshots are not part of it."""
        recent = {name: list(values) for name, values in self._recent.items()}
        return super().state_dict() | {name: getattr(self, name) for name in COUNTS} | {"recent": recent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put them back."""
        super().load_state_dict(state)
        for name in COUNTS:
            setattr(self, name, state[name])
        for name, values in state["recent"].items():
            self._recent[name] = deque(values, maxlen=RECENT)

    # The course of a step.

    def _begin(self) -> None:
        self.step_index += 1
        self._refused, self._judged, self._used = None, False, None
        self._now = {}
        if self.cooling:
            self.cooling -= 1
            if not self.cooling:
                self._warm_up()

    def _inspect(self, args: tuple[Any, ...], kwargs: dict[str, Any], labels: Tensor | None) -> Problem | None:
        if not self.inspect_inputs:
            return None
        if labels is not None and self.num_classes is not None and (wrong := label_problem(labels, self.num_classes)):
            return wrong
        return input_problem(list(tensors_of((*args, kwargs) if kwargs else args)))

    def _run(self, step: Callable[[], R]) -> R:
        handle = self.optimizer.register_step_pre_hook(self._about_to_update)
        try:
            return step()
        finally:
            handle.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _about_to_update(self, _optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # makes its gradients itself
        if self._judged or closure is not None:
            return
        gradients, earlier = self._seen(), self._used
        if earlier is None or (math.isfinite(earlier.norm) and not gradients.norm <= earlier.norm):
            self._used = gradients

    def _seen(self, norm: float | None = None) -> _Gradients:
        """The gradients as they are now; `norm` where it is known."""
        if norm and math.isfinite(norm):
            return _Gradients(norm)
        held = {name: entry.grad for name, entry in self._tensors.parameters.items() if entry.grad is not None}
        norm = gradient_norm(held.values()) if norm is None else norm
        return _Gradients(norm, "" if math.isfinite(norm) else first_bad(held.items()), not held)

    def _before_update(self, loss: float, gradients: _Gradients) -> Problem | None:
        if not math.isfinite(loss):
            return Problem(f"loss is {loss}", "forward")
        norm, name, missing = gradients
        if not math.isfinite(norm):
            if self.scaled:
                return None
            return Problem(f"gradients: norm is {norm}" + (f", NaN or Inf in {name}" if name else ""), "backward", name)
        if not norm and loss:
            what = "are missing" if missing else "are all zero"
            text = f"gradients {what} although the loss is {loss:.4g}: nothing is trained"
            return Problem(text, "backward", stateless=missing)
        self._now = {"loss": abs(loss), "gradient norm": norm}
        return self._jump()

    def _jump(self) -> Problem | None:
        for name, value in self._now.items():
            recent = self._recent[name]
            largest = max(recent, default=0.0)
            # Below 1 a jump means little: a loss of 0.001 and a norm of 0.0001 come back to 1 with every new task.
            if len(recent) >= PATIENCE and value > self.max_jump * max(largest, 1.0):
                text = f"{name} jumped to {value:.4g}, at most {largest:.4g} in the last {len(recent)} steps"
                return Problem(text, "forward" if name == "loss" else "backward")
        return None

    def _sound(self) -> None:
        self.in_a_row = 0
        self._states.step_was_sound()
        for name, value in self._now.items():
            self._recent[name].append(value)

    def _react(self, problem: Problem, batch: object, ids: list[int]) -> None:
        facts: dict[str, Any] = {"step": self.step_index, "phase": problem.phase, "tensor": problem.tensor}
        facts["rows"] = list(problem.rows[:100])
        facts["sample_ids"] = ids
        if self.run_dir is not None:
            facts["batch"] = set_aside(self.run_dir, self.step_index, batch, ids)
        self.in_a_row += 1
        # A batch that was refused has touched nothing.
        done = self._undo(problem, facts) if problem.phase != "data" else DONE.get(self.policy, "batch refused")
        fatal = self.policy == "raise" or (self.policy != "record" and self.in_a_row >= self.max_in_a_row)
        self.acted(
            f"step {self.step_index:,}: {problem.what}; {done}", severity="error" if fatal else "warning", **facts
        )
        if self.policy == "raise":
            raise problem.error(f"step {self.step_index:,}: {problem.what}")
        if fatal:
            raise NonFiniteError(
                f"step {self.step_index:,}: {self.in_a_row} steps in a row were not sound, the last: {problem.what}; "
                "lower the learning rate, or raise max_in_a_row"
            )

    def _undo(self, problem: Problem, facts: dict[str, Any]) -> str:
        if self.policy == "skip" and self._states.undo():
            return DONE["skip"]
        if self.policy not in ("skip", "rollback"):
            return DONE[self.policy]
        # Going back costs what was learnt since. A refused update has harmed nothing, and the batch may be to blame:
        # only when the 2nd, 4th, 8th ... step in a row fails as well is it the state, and then an older one each time.
        again = self.in_a_row > 1 and self.in_a_row.bit_count() == 1
        if self._refused is not None and (problem.stateless or not (again or self._weights_are_bad())):
            self._states.undo_forward()
            return "update refused"
        return self._roll_back(facts, further=again)

    def _weights_are_bad(self) -> bool:
        return self._weight_problem(measured(self._tensors.parameters.items())) is not None

    def _weight_problem(self, weights: Sequence[tuple[str, Tensor, float]]) -> Problem | None:
        """A weight that is not finite, or a tensor of them that jumped: a flipped bit, a rate that is far too high."""
        if name := first_bad_of(weights):
            return Problem(f"weights: NaN or Inf in {name}", "optimizer", name)
        for name, _, norm in weights:
            before = self._norms.get(name, math.inf)
            if norm > self.max_jump * max(before, 1.0):
                return Problem(f"weights: norm of {name} jumped from {before:.4g} to {norm:.4g}", "weights", name)
        self._norms = {name: norm for name, _, norm in weights}
        return None

    def _roll_back(self, facts: dict[str, Any], *, further: bool) -> str:
        self._warm_up()
        back_to = self._states.roll_back(further=further)
        self._warm_up()  # the state may be one of an earlier cooling
        facts["to_step"] = back_to
        if back_to is None:
            return "no good state to go back to yet"
        if self.lr_factor < 1:
            for group in self.optimizer.param_groups:
                group[FACTOR] = self.lr_factor
                group["lr"] = group[COOLED] = group["lr"] * self.lr_factor
            self.cooling = self.cool_steps
        return f"rolled back to the start of step {back_to:,}"

    def _warm_up(self) -> None:
        """The learning rate is what it was before the rollback."""
        for group in self.optimizer.param_groups:
            factor, cooled = group.pop(FACTOR, 1.0), group.pop(COOLED, None)
            if group["lr"] == cooled:  # else a scheduler has set another one since
                group["lr"] = cooled / factor
        self.cooling = 0


def _number(loss: Tensor | float) -> float:
    return float(loss.detach() if isinstance(loss, Tensor) else loss)
