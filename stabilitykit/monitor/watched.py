"""What a monitor watches, as it is now: when the model has changed, new hooks take the place of the old."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from stabilitykit.config import MonitorConfig
from stabilitykit.diagnose.retrace import Subject
from stabilitykit.monitor.ledger import Ledger
from stabilitykit.watch.parameters import named_parameters, outline
from stabilitykit.watch.reading import Reading
from stabilitykit.watch.watch import Watch


class Watched:
    """A model, the optimizers that update it, a replay buffer, and the hooks on them.

    Args:
        optimizers: a list that others may add to and take from.
        on_update: told that an optimizer is about to step.
        after_update: told that it has.

    Attributes:
        parameters: by name, those that only an optimizer holds as well.
        subject: all of it, as a replay wants it.
        watch: the hooks.
        losses: terms of the loss that the step has named.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        replay_buffer: object | None,
        ledger: Ledger,
        config: MonitorConfig,
        *,
        on_update: Callable[[Optimizer], None],
        after_update: Callable[[Optimizer], None],
    ) -> None:
        self.model, self._optimizers, self._replay_buffer = model, optimizers, replay_buffer
        self._ledger, self._config = ledger, config
        self._on_update, self._after_update = on_update, after_update
        self.losses: dict[str, Tensor | float] = {}
        self._look()

    def _look(self) -> None:
        self.parameters = named_parameters(self.model, self._optimizers)
        self._outline = outline(self.parameters, self._optimizers)
        self.subject = Subject(self.model, self._optimizers, self.parameters, self._replay_buffer)
        self.watch = Watch(
            self.model,
            self._optimizers,
            self.parameters,
            self._ledger.recorder,
            self._config,
            on_error=self._ledger.own_error,
            on_update=self._on_update,
            after_update=self._after_update,
        )

    def look_again(self) -> bool:
        """Whether something had changed: a head was added or replaced; it is watched from now on."""
        if outline(self.parameters, self._optimizers) == self._outline:
            return False
        self.watch.close()
        self._look()
        return True

    def read(self, returned: Any) -> Reading:
        """Judge the step that has just run, by what it returned as well."""
        started = time.perf_counter()
        try:
            return self.watch.read(returned, self.losses)
        except Exception as error:  # noqa: BLE001 - a measurement of ours
            self._ledger.own_error(error)
            return Reading(losses={}, stepped=True)
        finally:
            self._ledger.cost(time.perf_counter() - started)

    def close(self) -> None:
        """Take every hook off, and let go of everything: a monitor kept for its diagnosis keeps no model alive."""
        self.watch.close()
        self.losses.clear()
        del self.model, self._optimizers, self._replay_buffer, self.parameters, self.subject
        del self._on_update, self._after_update
