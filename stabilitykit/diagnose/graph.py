"""The provenance graph of one traced step: operations and leaves that non-finite values passed through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from stabilitykit.diagnose.site import NOWHERE, Site
from stabilitykit.schema import Phase, TensorSummary

LeafKind = Literal[
    "parameter",
    "module_buffer",
    "batch",
    "replay",
    "gradient",
    "optimizer_state",
    "hyperparameter",
    "unknown",
]


@dataclass(eq=False)
class Leaf:
    """A tensor that was non-finite before the step touched it."""

    kind: LeafKind
    name: str
    summary: TensorSummary
    rows: tuple[int, ...] = ()

    index: int = -1  # before any operation


@dataclass(eq=False)
class Edge:
    """A non-finite input: the argument it came in by, and what made it.  `slots` are the rows an indexing op took."""

    argument: str
    source: Operation | Leaf
    nan: bool
    slots: tuple[int, ...] = ()


@dataclass(eq=False)
class Operation:
    """One aten operation whose output was not finite.

    Attributes:
        index: execution order within the step.
        op: what the user called: in backward the forward operation that is being differentiated.
        kernel: the aten operation that ran.
        node: name of the autograd node in backward, else empty.
        output: the written or returned tensor, the worst where there are several.
        inputs: evidence, filled where the operation may be the origin.
        edges: non-finite inputs, empty where the operation made the value out of finite ones.
        places_constant: it only puts a given Inf somewhere (a mask's fill): intended until it does harm.
        scalar: a non-finite Python number among its arguments, as text.
        rows: bad rows of the output along its first dimension.
        writes: name of the parameter, module buffer or gradient it wrote into, if any; `writes_kind` says which.
        exact_absmax: largest magnitude of the same operation in float64, where a narrow dtype overflowed.
        aside: it ran after backward and outside autograd: part of clipping or of an update by hand.
        own_backward: it is the user's own code within backward: a hook, a custom Function.
    """

    index: int
    op: str
    kernel: str
    phase: Phase
    module: str
    output: TensorSummary
    site: Site = NOWHERE
    node: str = ""
    edges: list[Edge] = field(default_factory=list)
    inputs: tuple[TensorSummary, ...] = ()
    places_constant: bool = False
    scalar: str = ""
    rows: tuple[int, ...] = ()
    writes: str = ""
    writes_kind: str = ""
    exact_absmax: float | None = None
    aside: bool = False
    own_backward: bool = False

    @property
    def loads(self) -> bool:
        """Whether it puts a tensor into a parameter or a module's buffer as it is: a checkpoint is loaded."""
        return self.kernel == "copy" and self.writes_kind in ("parameter", "module_buffer")


Source = Operation | Leaf


@dataclass(eq=False)
class Symptom:
    """Where a non-finite value was noticed: the loss, a gradient, a parameter, a module buffer."""

    role: Literal["loss", "probed", "gradient", "gradient_clipped", "parameter", "module_buffer", "returned", "error"]
    name: str
    source: Source

    @property
    def text(self) -> str:
        """As the report names it."""
        words = {"gradient": "gradient of ", "gradient_clipped": "clipped gradient of ", "parameter": "parameter "}
        return f"{words.get(self.role, '')}{self.name or self.role}"


@dataclass(frozen=True)
class Trace:
    """All that one traced step gave: symptoms in the order they were noticed, and how many operations ran."""

    symptoms: Sequence[Symptom]
    num_operations: int
    batch_size: int | None = None
