"""What a fault is: when it strikes, what it touches, what a right diagnosis says of it."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from trainers.batch import Batch

if TYPE_CHECKING:
    from trainers.trainer import Trainer

# Where numbers that are too large, but finite, may first overflow: none of it is more true than the rest.
OVERFLOW = frozenset({"forward", "backward", "state", "weights", "optimizer", "clip"})
NUM_SLOTS = 6  # of a replay buffer, spoilt together so that one of them is drawn soon
GARBAGE = 1e30
MARGIN = 12  # steps that a run has left after a strike, to notice it and to recover


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a right diagnosis says; what cannot be said in advance is left open.

    Attributes:
        first: step at which the fault strikes.
        last: last step at which it may first show.
        phases: any of these is right.
        tensor: parameter, module buffer or input it is about, empty where that is open.
        samples: rows of the batch or slots of the buffer, of which at least one must be named, empty where open.
    """

    first: int
    last: int
    phases: frozenset[str]
    tensor: str = ""
    samples: frozenset[int] = frozenset()


class Fault:
    """The base of all: strikes before step `step` of a run, and for `lasts` steps."""

    name: ClassVar[str]
    guard: ClassVar[str] = "checks"  # the guard that is there for it
    lasts: ClassVar[int] = 1
    needs_batch_norm: ClassVar[bool] = False

    def __init__(self, trainer: Trainer, step: int, draws: random.Random) -> None:
        self.trainer, self.step, self.draws = trainer, step, draws
        self.network, self.method = trainer.network, trainer.step.method
        self.optimizer, self.buffer = trainer.step.optimizer, trainer.step.method.buffer
        self.truth = self.expect({"forward"})
        self.now = -1
        self.struck: list[Tensor] = []
        self._batches = trainer.stream.batches

    @classmethod
    def steps(cls, starts: Sequence[int], total: int) -> Sequence[int]:
        """Steps at which it can strike, given the first step of each task."""
        return [step for step in range(6, total - MARGIN) if step not in starts]

    def expect(self, phases: set[str] | frozenset[str], *, within: int = 0, **truth: Any) -> Truth:
        """The truth of a strike that shows within so many steps."""
        return Truth(first=self.step, last=self.step + within, phases=frozenset(phases), **truth)

    def plant(self) -> None:
        """Set it up in a trainer that has not begun."""
        self.trainer.stream.batches = self._deliver  # type: ignore[method-assign]

    def strike(self, batch: Batch) -> Batch:
        """Do it, before the step that gets `batch`; the batch the step gets."""
        return batch

    def is_struck(self, batch: Batch) -> bool:
        """Whether the step of `batch` is one whose arithmetic goes wrong."""
        return any(torch.equal(batch.indices, indices) for indices in self.struck)

    def _deliver(self, session: int, epoch: int, skip: int = 0) -> Iterator[Batch]:
        for batch in self._batches(session, epoch, skip):
            self.now += 1
            if self.step <= self.now < self.step + self.lasts:
                self.struck.append(batch.indices)
                yield self.strike(batch)
            else:
                yield batch


class LossFault(Fault):
    """The base of faults in the loss: they change its terms in the steps they strike."""

    def plant(self) -> None:
        """Come between the method and its terms."""
        super().plant()
        original = self.method.losses

        def losses(batch: Batch, logits: Tensor, draws: Any) -> dict[str, Tensor]:
            terms = original(batch, logits, draws)
            return self.spoil(terms, logits) if self.is_struck(batch) else terms

        self.method.losses = losses  # type: ignore[method-assign]

    def spoil(self, terms: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """The terms as they come out wrong."""
        raise NotImplementedError
