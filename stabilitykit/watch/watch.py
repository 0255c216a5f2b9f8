"""All watchers of a run behind one face: hooks on modules, parameters and optimizers, the sentinel, the rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack, _set_grad_enabled
from torch.optim import Optimizer
from torch.utils._python_dispatch import _disable_current_modes

from stabilitykit.config import MonitorConfig
from stabilitykit.errors import NonFiniteError
from stabilitykit.measure.values import is_finite
from stabilitykit.watch.modules import ModuleWatch
from stabilitykit.watch.parameters import ParameterWatch
from stabilitykit.watch.reading import Reading
from stabilitykit.watch.returned import returned_numbers
from stabilitykit.watch.rows import Names, RowCollector
from stabilitykit.watch.sentinel import Sentinel

PATIENCE = 3  # unfounded suspicions of a number that the step returns, before it is taken for a metric


class Watch:
    """Hooks go on when it is made and come off at `close`; in between it answers for one step at a time.

    Args:
        model, optimizers, parameters: what is watched.
        names: hands out tensor ids.
        config: what is recorded.
        on_error: told of an exception in a measurement; training never sees it.
        on_update: told that an optimizer is about to step.
        after_update: told that it has.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        parameters: Mapping[str, Tensor],
        names: Names,
        config: MonitorConfig,
        *,
        on_error: Callable[[Exception], None],
        on_update: Callable[[Optimizer], None],
        after_update: Callable[[Optimizer], None],
    ) -> None:
        self._on_error, self._on_update = on_error, on_update
        self._rows = RowCollector(names)
        self._tensors = ParameterWatch(model, optimizers, parameters, self._rows, config)
        self._modules = ModuleWatch(model, self._rows, self.unseen, config)
        try:
            self._sentinel = Sentinel(
                model,
                optimizers,
                parameters,
                unseen=self.unseen,
                on_backward=self._backward_ended,
                on_optimizer=self._update_begins,
                after_optimizer=after_update,
            )
        except BaseException:
            self._modules.close()
            raise
        self._acquitted: set[str] = set()  # metrics among what the step returns, by path
        self._suspected: Counter[str] = Counter()  # how often without ground, where it has a gradient
        self._closed = False

    @property
    def bad_before(self) -> Sequence[str]:
        """Parameters that were not finite when the watch was made."""
        return self._sentinel.bad_before

    @property
    def updating(self) -> Sequence[Optimizer]:
        """See `Sentinel`."""
        return self._sentinel.updating

    def follow(self, optimizer: Optimizer) -> None:
        """See `Sentinel.follow`."""
        self._sentinel.follow(optimizer)

    def leave(self, optimizer: Optimizer) -> None:
        """See `Sentinel.leave`."""
        self._sentinel.leave(optimizer)

    def begin(self, *, recording: bool, trailing: bool) -> None:
        """A step starts; see `ModuleWatch.begin`. What was measured since the last one ended belongs to neither."""
        self._rows.clear()
        self._sentinel.begin(trailing=trailing)
        if recording:
            self._sentinel.refresh()
        self._modules.begin(recording=recording, trailing=trailing)
        self._tensors.begin(recording=recording)

    def rest(self) -> None:
        """Between steps, where they are known to begin and end: an evaluation is no part of either."""
        if not self._closed:
            self._rows.clear()
            self._modules.begin(recording=False)

    def begin_again(self, before: Mapping[str, Tensor] | None = None) -> None:
        """A step is run again: judged as the first time, and recorded in full; see `ParameterWatch.begin`."""
        self._sentinel.forget()
        self.begin(recording=True, trailing=False)
        self._tensors.begin(recording=True, before=before)

    def read(self, returned: Any, terms: Mapping[str, Tensor | float]) -> Reading:
        """Judge the step: what it returned, the loss terms that were logged, gradients, parameters, module buffers."""
        losses = {
            f"loss{path}": entry.detach().reshape(()) if isinstance(entry, Tensor) else entry
            for path, entry in returned_numbers(returned).items()
            if path not in self._acquitted
        }
        excused = [f"loss{path}" for path, times in self._suspected.items() if times >= PATIENCE]
        return self._sentinel.read(losses | dict(terms), excused)

    def touched(self) -> bool:
        """Whether parameters were written to since the last step."""
        return self._sentinel.touched()

    def late_writes(self) -> Mapping[str, Tensor]:
        """See `Sentinel.late_writes`."""
        return self._sentinel.late_writes()

    def forget(self) -> None:
        """See `Sentinel.forget`."""
        self._sentinel.forget()

    def acquit(self, reading: Reading, returned: Any) -> None:
        """What looked bad does no harm (a metric of 0 / 0): do not look into it again.

        What has a gradient may be a loss that was left out this once, and so may a Python number that stands where the
        loss does: they are looked into a few times.
        """
        self._sentinel.accept(reading)
        for place, (path, entry) in enumerate(returned_numbers(returned).items()):
            if is_finite(entry) if isinstance(entry, Tensor) else math.isfinite(entry):
                continue
            if entry.requires_grad if isinstance(entry, Tensor) else place == 0:
                self._suspected[path] += 1
            else:
                self._acquitted.add(path)

    def update_norm(self, micro: int) -> float:
        """Measure parameters and updates on a recorded step; the L2 norm of the update, nan on any other."""
        if not self._modules.recording:
            return math.nan
        self._modules.recording = False
        with torch.no_grad():
            return self._tensors.step_ended(micro)

    def take_rows(self) -> np.ndarray[Any, np.dtype[np.void]] | None:
        """The rows measured since the last call; the step's own are complete with it."""
        if not self._closed:
            self._tensors.ended()  # it lets go of what the update was measured against
        try:
            return self._rows.take()
        except Exception as error:  # noqa: BLE001 - a measurement of ours: neither the step's row nor an inquiry waits
            self._on_error(error)
            return None

    @property
    def largest(self) -> tuple[str, float]:
        """Name and magnitude of the largest module output among the rows last taken."""
        return self._rows.largest

    def trail(self) -> tuple[list[tuple[str, float]], ...]:
        """See `ModuleWatch.trail`."""
        return self._modules.trail()

    def close(self) -> None:
        """Take every hook off and let go of what was watched; only a further `close` may follow."""
        if self._closed:
            return
        self._closed = True
        self._sentinel.close()
        self._modules.close()
        # They call this object back: a cycle would keep the closed run's tensors until the collector comes by.
        del self._sentinel, self._modules, self._tensors
        self._on_error = self._on_update = _ignore

    def unseen(self, measure: Callable[[], None]) -> None:
        """Run a measurement: not traced, never raising into training, but for a verdict."""
        recording = torch.is_grad_enabled()
        _set_grad_enabled(False)  # torch.no_grad makes ten calls of it
        try:
            if not _len_torch_dispatch_stack():
                return measure()
            with _disable_current_modes():  # a tracer does not see what the observers do
                measure()
        except NonFiniteError:
            raise
        except Exception as error:  # noqa: BLE001 - counted, said once, shown in the report
            self._on_error(error)
        finally:
            _set_grad_enabled(recording)

    def _backward_ended(self) -> None:
        if self._modules.recording:
            self._tensors.backward_ended(self._sentinel.gradients.num_backwards - 1)

    def _update_begins(self, optimizer: Optimizer) -> None:
        if self._modules.recording:
            self._tensors.optimizer_starts(self._sentinel.gradients.num_backwards - 1)
        self._on_update(optimizer)


def _ignore(_: object) -> None:
    """Nobody is told of what happens after `close`."""
