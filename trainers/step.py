"""One training step, read from top to bottom."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stabilitykit.errors import UsageError
from stabilitykit.guards import Guards, gradient_norm, label_problem

if TYPE_CHECKING:
    from trainers.batch import Batch
    from trainers.methods.sgd import Sgd
    from trainers.optimisation import Schedule
    from trainers.precision import Precision
    from trainers.watching import Watch


class TrainingStep:
    """A step as a function of its state and its batch: that is what lets a monitor run it again, bit for bit.

    Attributes:
        grad_norm: L2 norm over all gradients of the last step, before clipping.
        watch: where the step says what it did.
    """

    def __init__(
        self,
        method: Sgd,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        precision: Precision,
        guards: Guards,
    ) -> None:
        self.method = method
        self.optimizer = optimizer
        self.schedule = schedule
        self.precision = precision
        self.guards = guards
        self.parameters = [parameter for parameter in method.network.parameters() if parameter.requires_grad]
        self.grad_norm = math.nan
        self.watch: Watch | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """Run the step on `batch`; the loss, finite or not.  A step that guard 6 finds unsound updates nothing."""
        self.inspect(batch)
        self.begin(batch)
        draws = self.method.draw(batch)
        logits = self.method.forward(batch, draws)
        loss = self.total(self.method.losses(batch, logits, draws))
        self.backward(loss)
        if self.guards.update(self.optimizer, loss.detach(), self.grad_norm):
            self.method.insert(batch, logits)
        return loss.detach()

    def inspect(self, batch: Batch) -> None:
        """Refuse a batch that cannot be right before anything has been touched."""
        shape, stored = tuple(batch.inputs.shape[1:]), tuple(self.method.buffer.storage["examples"].shape[1:])
        if shape != stored or len(batch.labels) != len(batch.inputs):
            raise UsageError(
                f"batch: got inputs {list(batch.inputs.shape)} with {len(batch.labels)} labels, "
                f"expected {['B', *stored]} with B labels; check the dataset's shape"
            )
        if self.guards.validation is None:
            return
        if wrong := label_problem(batch.labels, self.method.buffer.storage["logits"].shape[1]):
            raise UsageError(wrong.what)

    def begin(self, batch: Batch) -> None:
        """Learning rate and frozen layers as they should be, gradients cleared, the buffer audited."""
        self.guards.begin_step(self.optimizer, batch.task, within=self.schedule.within_task(batch.epoch))
        self.optimizer.zero_grad()
        self.method.buffer.audit()
        if self.watch is not None:
            self.watch.log_samples(batch.indices)

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """The sum of the loss terms, each of them logged."""
        if self.watch is not None:
            self.watch.log_loss(**{name: term.detach() for name, term in terms.items()})
        first, *others = terms.values()
        return sum(others, start=first)

    def backward(self, loss: Tensor) -> None:
        """True gradients, and their norm."""
        self.precision.backward(loss)
        self.precision.unscale(self.optimizer)
        self.grad_norm = gradient_norm(self.gradients())

    def gradients(self) -> list[Tensor]:
        """The gradients there are."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]
