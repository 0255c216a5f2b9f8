"""One dispatched call seen through its schema: what it reads, what it writes, which constants it carries."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from stabilitykit.measure.summary import summarise
from stabilitykit.measure.values import values
from stabilitykit.schema import TensorSummary

# They only place a value: an Inf they are given is meant, until something makes it a NaN.
_PLACING = {
    "full", "full_like", "new_full", "fill", "masked_fill", "scalar_tensor", "index_fill", "constant_pad_nd", "pad",
    "lift_fresh", "where", "clamp", "clamp_min", "clamp_max",
}  # fmt: skip
_OVERWRITING = {"copy", "fill", "zero", "uniform", "normal", "random", "bernoulli", "exponential", "set", "resize"}
_READING = {"local_scalar_dense", "is_nonzero", "equal"}
_CHECKING = {"isnan", "isinf", "isfinite", "ne", "eq", "lt", "le", "gt", "ge", *_READING}
_SHAPE_ONLY = ("_like",)


@dataclass(frozen=True, slots=True)
class Group:
    """Inputs (positions into `Call.inputs`) and what is computed from them: one a call, or one a foreach's element."""

    inputs: Sequence[int]
    written: Sequence[Tensor]


class Call:
    """A call of an aten overload: `func(*args, **kwargs)`."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name = base_name(func.name())
        self.schema = _schema(func)
        self._named = [*zip(self.schema.names, args, strict=False), *kwargs.items()]
        self.inputs: list[tuple[str, Tensor]] = []
        self._elements: list[int | None] = []  # position in a tensor list, None for a plain argument
        for argument, value in self._named:
            for element, tensor in _tensors(value):
                self.inputs.append((argument, tensor))
                self._elements.append(element)

    @property
    def declared_writes(self) -> frozenset[str]:
        """Names of the arguments the schema says are written."""
        return self.schema.written

    @property
    def overwritten(self) -> list[Tensor]:
        """The tensors of the written arguments."""
        return [tensor for argument, tensor in self.inputs if argument in self.schema.written]

    @property
    def differentiable(self) -> bool:
        """Whether autograd made a node for this call."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for _, tensor in self.inputs)

    @property
    def is_read(self) -> bool:
        """Whether the call hands a value to Python."""
        return self.name in _READING

    @property
    def gives_number(self) -> bool:
        """Whether Python gets an element as it is: `item`, `float`."""
        return self.name == "local_scalar_dense"

    @property
    def is_check(self) -> bool:
        """Whether the result says if values are finite."""
        return self.name in _CHECKING

    @property
    def nonfinite_scalar(self) -> str:
        """The first Python number among the arguments that is NaN or Inf: `alpha=nan`; empty if there is none."""
        for argument, value in self._named:
            for number in value if isinstance(value, list | tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    return f"{argument}={number}"
        return ""

    @property
    def places_constant(self) -> bool:
        """Whether a non-finite output is nothing but a given constant put in place."""
        if self.name not in _PLACING:
            return False
        return self.name == "lift_fresh" or bool(self.nonfinite_scalar)

    def reads(self, argument: str) -> bool:
        """Whether the value of a tensor argument can reach the output."""
        if argument == "out" or self.name.endswith(_SHAPE_ONLY) or self.name.startswith(("new_", "empty")):
            return False
        return not (self.name in _OVERWRITING and argument in self.schema.written)

    def keep_overwritten(self, watched: Sequence[Tensor]) -> dict[int, Tensor]:
        """Copies of what is, or may be, written over, by position in `inputs`: evidence of what the op was given."""
        unsaid = {id(tensor) for tensor in watched}
        return {
            position: tensor.detach().clone()
            for position, (argument, tensor) in enumerate(self.inputs)
            if id(tensor) in unsaid or (argument in self.schema.written and self.reads(argument))
        }

    def groups(self, result: Any) -> Iterator[Group]:
        """Which outputs come from which inputs.  Views write nothing and are left out."""
        written = [tensor for tensor in self.overwritten if _is_float(tensor)]
        if not self.schema.returns_view:
            seen = {id(tensor) for tensor in written}
            written += [tensor for _, tensor in _tensors(result) if _is_float(tensor) and id(tensor) not in seen]
        lists = {element for element in self._elements if element is not None}
        if not self.schema.elementwise_lists or not lists:
            if written:
                yield Group(range(len(self.inputs)), written)
            return
        yield from self._element_groups(result, len(lists))

    def _element_groups(self, result: Any, count: int) -> Iterator[Group]:
        returned = dict(_tensors(result))
        for element in range(count):
            positions = [index for index, of in enumerate(self._elements) if of in (None, element)]
            written = [
                self.inputs[index][1]
                for index in positions
                if self._elements[index] == element and self.inputs[index][0] in self.schema.written
            ]
            if element in returned and not written:
                written = [returned[element]]
            floats = [tensor for tensor in written if _is_float(tensor)]
            if floats:
                yield Group(positions, floats)

    def integers(self, result: Any) -> list[Tensor]:
        """Integer tensors that the call has written or returned."""
        written = (*self.overwritten, *(tensor for _, tensor in _tensors(result)))
        return [tensor for tensor in written if is_integer(tensor)]

    def evidence(self, positions: Sequence[int], kept: Mapping[int, Tensor]) -> tuple[TensorSummary, ...]:
        """What the call was given: tensors summarised, numbers as they are."""
        tensors = [
            summarise(kept.get(position, self.inputs[position][1]), self.inputs[position][0])
            for position in list(positions)[:6]
        ]
        numbers = [
            TensorSummary(name=argument, dtype="", shape=(), numel=0, value=f"{value:.6g}")
            for argument, value in self._named
            if isinstance(value, float)
        ]
        return (*tensors, *numbers)

    def rows_taken(self, tensor: Tensor) -> tuple[int, ...]:
        """For an indexing call: the rows of `tensor` that were taken, in order."""
        if self.name == "index" and len(self.args) > 1 and self.args[1] and isinstance(self.args[1][0], Tensor):
            index = self.args[1][0]
        elif self.name == "index_select" and len(self.args) > 2 and self.args[1] == 0:
            index = self.args[2]
        elif self.name == "select" and len(self.args) > 2 and self.args[1] == 0:
            return (int(self.args[2]) % max(len(tensor), 1),)
        else:
            return ()
        if index.dtype == torch.bool:
            index = index.nonzero()[:, 0]
        return tuple(int(entry) % max(len(tensor), 1) for entry in index.flatten().tolist())

    def absmax_in_float64(self, kept: Mapping[int, Tensor]) -> float | None:
        """The largest magnitude this call would have given in float64; None where it does not run in float64."""

        def widen(value: Any) -> Any:
            if isinstance(value, Tensor):
                found = next(
                    (kept[i] for i, (_, tensor) in enumerate(self.inputs) if tensor is value and i in kept), value
                )
                return found.double() if found.is_floating_point() else found
            return [widen(entry) for entry in value] if isinstance(value, list) else value

        try:
            kwargs = {key: widen(value) for key, value in self.kwargs.items() if key != "out"}
            if "dtype" in kwargs:
                kwargs["dtype"] = torch.float64
            outputs = [
                plain
                for _, entry in _tensors(self.func(*map(widen, self.args), **kwargs))
                if (plain := values(entry)) is not None
            ]
        except Exception:  # noqa: BLE001 - a kernel without float64; the number is a courtesy
            return None
        return max((float(plain.abs().max()) for plain in outputs if plain.numel()), default=None)


@dataclass(frozen=True, slots=True)
class _Schema:
    names: tuple[str, ...]
    written: frozenset[str]
    returns_view: bool
    elementwise_lists: bool


@lru_cache(maxsize=4096)
def _schema(func: Any) -> _Schema:
    schema = func._schema
    written = frozenset(
        entry.name for entry in schema.arguments if entry.alias_info is not None and entry.alias_info.is_write
    )
    returns_view = not written and any(entry.alias_info is not None for entry in schema.returns)
    name = schema.name.split("::")[-1]
    return _Schema(
        names=tuple(entry.name for entry in schema.arguments),
        written=written,
        returns_view=returns_view,
        elementwise_lists=name.startswith(("_foreach_", "_fused_", "_amp_foreach")),
    )


def _tensors(value: Any) -> Iterator[tuple[int | None, Tensor]]:
    if isinstance(value, Tensor):
        yield None, value
    elif isinstance(value, list | tuple):
        for position, entry in enumerate(value):
            if isinstance(entry, Tensor):
                yield position, entry


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def is_integer(tensor: Tensor) -> bool:
    """Whether a tensor holds integers, which booleans are not."""
    return not (_is_float(tensor) or tensor.dtype == torch.bool)


@lru_cache(maxsize=4096)
def base_name(name: str) -> str:
    """`aten::_foreach_addcdiv_.ScalarList` is `addcdiv`, `aten::_softmax` is `softmax`, `aten::div_.Tensor` `div`."""
    base = name.split("::")[-1].split(".")[0].strip("_")
    return base.removeprefix("foreach_")
