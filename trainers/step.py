"""One training step, read from top to bottom."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stabilitykit.errors import UsageError
from trainers.guards import GradientClip, gradient_norm

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
        clip: GradientClip,
        *,
        check: bool,
    ) -> None:
        self.method = method
        self.optimizer = optimizer
        self.schedule = schedule
        self.precision = precision
        self.clip = clip
        self.check = check
        self.parameters = [parameter for parameter in method.network.parameters() if parameter.requires_grad]
        self.grad_norm = math.nan
        self.watch: Watch | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """Run the step on `batch`; the loss, finite or not.  With `check`, a step that is not sound updates nothing."""
        self.inspect(batch)
        self.begin(batch)
        draws = self.method.draw(batch)
        logits = self.method.forward(batch, draws)
        loss = self.total(self.method.losses(batch, logits, draws))
        self.backward(loss)
        if self.is_sound(loss):
            self.clip(self.gradients(), self.grad_norm)
            self.update()
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
        check_labels(batch.labels, self.method.buffer.storage["logits"].shape[1])

    def begin(self, batch: Batch) -> None:
        """Set the learning rate (no rebuilt or restored optimizer loses it), clear gradients, audit the buffer."""
        self.schedule.apply(self.optimizer, batch.task, batch.epoch)
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

    def is_sound(self, loss: Tensor) -> bool:
        """Whether the update may happen; always without checks.  Overflown gradients are a scaler's own business."""
        if not self.check:
            return True
        return bool(loss.isfinite()) and (math.isfinite(self.grad_norm) or self.precision.scaler.is_enabled())

    def update(self) -> None:
        """Change the weights."""
        self.precision.update(self.optimizer)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse labels that are no class: an index out of range kills a CUDA context.

    Raises:
        UsageError: not int64, negative, or `num_classes` and above.
    """
    if labels.dtype != torch.int64:
        raise UsageError(f"labels: got {labels.dtype}, expected torch.int64; convert them when loading")
    low, high = (int(bound) for bound in labels.aminmax())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise UsageError(f"labels: got {wrong}, expected 0 to {num_classes - 1}; check the dataset's labels")
