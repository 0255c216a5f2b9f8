"""Walk back from what was noticed, through non-finite values only, to the operation or tensor where they began."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from stabilitykit.diagnose.graph import Edge, Leaf, Operation, Source, Symptom
from stabilitykit.diagnose.site import Site


@dataclass(frozen=True)
class Finding:
    """Where it began, how it was noticed, and the operations between, origin first."""

    origin: Operation | Leaf
    symptom: Symptom
    path: tuple[Operation, ...]
    entry: Edge | None = None  # how a leaf came into the step
    rivals: tuple[Finding, ...] = ()  # where several operations made values that met on the way: all, in order

    @property
    def kind(self) -> str:
        """`nan` or `inf`, as the origin made it."""
        summary = self.origin.output if isinstance(self.origin, Operation) else self.origin.summary
        if self.entry is not None:
            return "nan" if self.entry.nan else "inf"
        return "nan" if summary.nan else "inf"

    def leaves(self) -> Iterator[Leaf]:
        """Every tensor that was bad before the step and that the way from the origin met."""
        if isinstance(self.origin, Leaf):
            yield self.origin
        for operation in self.path:
            yield from (edge.source for edge in operation.edges if isinstance(edge.source, Leaf))

    @property
    def moment(self) -> int:
        """When the value entered the run of the step: leaves at the operation that read them."""
        return self.origin.index if isinstance(self.origin, Operation) else self.path[0].index if self.path else -1


def find_origin(symptoms: Iterable[Symptom], intended: Callable[[Leaf], bool] = lambda _leaf: False) -> Finding | None:
    """The earliest origin over all symptoms; None where every one of them is an intended constant doing no harm.

    Args:
        symptoms: what was noticed, in the order it was noticed.
        intended: whether a non-finite leaf is there on purpose (a mask, a marker for missing data).
    """
    first: dict[tuple[int, bool], Symptom] = {}  # noticed again, after clipping say, a value has come from where it had
    for symptom in symptoms:
        first.setdefault((id(symptom.source), symptom.role == "module_buffer"), symptom)
    findings = [found for symptom in first.values() if (found := trace_back(symptom, intended)) is not None]
    return min(findings, key=lambda found: found.moment, default=None)


def trace_back(symptom: Symptom, intended: Callable[[Leaf], bool]) -> Finding | None:
    """The origin of one symptom."""
    search = _Search(symptom, intended)
    search.run()
    if search.causes:
        origin, entry = min(search.causes, key=lambda cause: search.order(cause[0]))
        path = search.path_from(origin)
        return Finding(origin, symptom, path, entry if isinstance(origin, Leaf) else None, _rivals(search, symptom))
    kept = symptom.role == "module_buffer"
    turned = [turn for constant in search.constants if (turn := _turning_point(search.path_from(constant), kept=kept))]
    if not turned:
        return None
    origin = min(turned, key=lambda operation: operation.index)
    path = next(path for constant in search.constants if origin in (path := search.path_from(constant)))
    return Finding(origin, symptom, path[path.index(origin) :])


def _rivals(search: _Search, symptom: Symptom) -> tuple[Finding, ...]:
    """The operations in which the walk ended, one for each place; none where there is no choice."""
    ends = sorted((end for end, _ in search.causes if isinstance(end, Operation)), key=lambda end: end.index)
    places: dict[tuple[str, Site, str, str], Operation] = {}
    for end in ends:
        places.setdefault((end.op, end.site, end.phase, end.module), end)
    if len(places) < 2 or len(ends) < len(search.causes):
        return ()
    return tuple(Finding(end, symptom, search.path_from(end)) for end in places.values())


class _Search:
    """A depth-first walk from a symptom; `causes` and `constants` are where it ended."""

    def __init__(self, symptom: Symptom, intended: Callable[[Leaf], bool]) -> None:
        self.causes: list[tuple[Source, Edge | None]] = []
        self.constants: list[Source] = []
        self._start = symptom.source
        self._intended = intended
        self._consumer: dict[int, Operation] = {}  # id of a source -> the operation, nearer the symptom, that read it
        self._seen: set[int] = set()

    def run(self) -> None:
        waiting: list[tuple[Source, Edge | None]] = [(self._start, None)]
        while waiting:
            source, entry = waiting.pop()
            if id(source) in self._seen:
                continue
            self._seen.add(id(source))
            if isinstance(source, Leaf):
                self._end(source, entry, constant=self._intended(source) and not self._makes_weight(source))
            elif not (edges := followed(source)):
                self._end(source, entry, constant=source.places_constant)
            else:
                for edge in edges:
                    self._consumer.setdefault(id(edge.source), source)
                    waiting.append((edge.source, edge))

    def _makes_weight(self, leaf: Leaf) -> bool:
        """Whether it is loaded into a parameter: no Inf is meant there."""
        reader = self._consumer.get(id(leaf))
        return reader is not None and reader.loads and reader.writes_kind == "parameter"

    def _end(self, source: Source, entry: Edge | None, *, constant: bool) -> None:
        if constant:
            self.constants.append(source)
        else:
            self.causes.append((source, entry))

    def order(self, source: Source) -> int:
        """When an operation ran; of a leaf, the operation that read it."""
        if isinstance(source, Operation):
            return source.index
        reader = None if source is self._start else self._consumer.get(id(source))
        return -1 if reader is None else reader.index

    def path_from(self, source: Source) -> tuple[Operation, ...]:
        """Operations from `source` to the symptom, in order."""
        path: list[Operation] = []
        current: Source | None = source
        while current is not None:
            if isinstance(current, Operation):
                path.append(current)
            current = None if current is self._start else self._consumer.get(id(current))
        return tuple(path)


def followed(operation: Operation) -> Sequence[Edge]:
    """The inputs that explain the output: the NaN ones where it is NaN and there are any, else all that were bad."""
    if operation.output.nan and any(edge.nan for edge in operation.edges):
        return [edge for edge in operation.edges if edge.nan]
    return operation.edges


def _turning_point(path: Sequence[Operation], *, kept: bool) -> Operation | None:
    """Where an intended Inf did harm: the first NaN, else a change of sign, else the op that left nothing finite.

    None where the symptom is the constant itself, put there on purpose (a running minimum that is reset), or where it
    is only `kept` as it is, in a module's buffer (a mask that is made when it is first needed).
    """
    acted = [operation for operation in path if not operation.places_constant]
    for operation in acted:
        if operation.output.nan:
            return operation
    signs = [(operation.output.posinf > 0, operation.output.neginf > 0) for operation in path]
    for position in range(1, len(path)):
        if (
            signs[position] != signs[position - 1]
            and not path[position].places_constant
            and sum(signs[position - 1]) == 1
        ):
            return path[position]
    if kept:
        return None
    for operation in acted:
        if operation.output.posinf + operation.output.neginf == operation.output.numel:
            return operation
    return acted[-1] if acted else None
