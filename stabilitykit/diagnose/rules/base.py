"""What a rule is: it recognises one family of numerical faults and says what to do about it."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from stabilitykit.diagnose.graph import Leaf, Operation
from stabilitykit.diagnose.walk import Finding
from stabilitykit.schema import Phase, RunUpStep, TensorSummary


@dataclass(frozen=True)
class Evidence:
    """All a rule may look at.

    Attributes:
        finding: the origin, its symptom and the path between.
        phase: where in the step it began.
        kind: `nan` or `inf`.
        tensor: name of the parameter, buffer or batch entry concerned, empty where there is none.
        run_up: the steps before, oldest first.
        hyperparameters: of the optimizer's group concerned: lr, eps, weight_decay, ...
        optimizer: class name of the optimizer.
        loss_was_finite: only gradients gave the fault away.
    """

    finding: Finding
    phase: Phase
    kind: str
    tensor: str = ""
    run_up: Sequence[RunUpStep] = ()
    hyperparameters: Mapping[str, object] = field(default_factory=dict)
    optimizer: str = ""
    loss_was_finite: bool = False

    @property
    def operation(self) -> Operation | None:
        """The origin, where it is an operation."""
        origin = self.finding.origin
        return origin if isinstance(origin, Operation) else None

    @property
    def leaf(self) -> Leaf | None:
        """The origin, where it is a tensor that was bad before the step."""
        origin = self.finding.origin
        return origin if isinstance(origin, Leaf) else None

    @property
    def computed(self) -> bool:
        """Whether the operation itself made the value, and not its derivative: also in a backward hook's own code."""
        return self.operation is not None and (self.phase != "backward" or self.operation.own_backward)

    @property
    def op(self) -> str:
        """Name of the origin's operation, empty for a leaf."""
        return self.operation.op if self.operation else ""

    @cached_property
    def inputs(self) -> Mapping[str, TensorSummary]:
        """The origin's tensor arguments by name."""
        return {entry.name: entry for entry in (self.operation.inputs if self.operation else ()) if not entry.value}

    @cached_property
    def numbers(self) -> Mapping[str, float]:
        """The origin's Python numbers by name."""
        return {
            entry.name: float(entry.value) for entry in (self.operation.inputs if self.operation else ()) if entry.value
        }

    @cached_property
    def largest(self) -> float:
        """The largest finite magnitude among the origin's inputs."""
        bounds = (abs(bound) for entry in self.inputs.values() for bound in (entry.min, entry.max))
        return max((bound for bound in bounds if bound == bound), default=0.0)

    @property
    def narrow(self) -> bool:
        """Whether the origin's output lives in float16, bfloat16 or a float8."""
        narrow = ("float16", "bfloat16", "float8")
        return self.operation is not None and self.operation.output.dtype.startswith(narrow)


class Rule(ABC):
    """A family of faults.  The docstring of a rule is what the report prints as the cause."""

    name: ClassVar[str]
    remedies: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def applies(self, evidence: Evidence) -> bool:
        """Whether the evidence is of this family."""

    def facts(self, evidence: Evidence) -> str:
        """The numbers of this very case, a sentence; empty where the statistics say it all."""
        return ""

    def advise(self, evidence: Evidence) -> tuple[str, ...]:
        """What to change, best first."""
        return self.remedies

    def cause(self, evidence: Evidence) -> str:
        """The docstring, then the facts."""
        text = " ".join((inspect.getdoc(self) or "").split())
        return f"{text} {self.facts(evidence)}".strip()
