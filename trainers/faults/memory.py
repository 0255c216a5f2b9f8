"""Faults of the replay buffer: what is stored, and how it is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from trainers.batch import Batch
from trainers.faults.base import GARBAGE, NUM_SLOTS, OVERFLOW, Fault


class BufferFault(Fault):
    """The base of faults in stored samples: they show when one of the slots is drawn."""

    guard = "buffer"
    field: ClassVar[str] = "logits"
    value: ClassVar[float] = math.nan
    phases: ClassVar[frozenset[str]] = frozenset({"buffer"})

    def strike(self, batch: Batch) -> Batch:
        """Spoil some slots."""
        slots = self.draws.sample(range(len(self.buffer)), min(NUM_SLOTS, len(self.buffer)))
        stored = self.buffer.storage[self.field]
        for slot in slots:
            stored[slot].view(-1)[:3] = self.value
        known = frozenset(slots) if self.phases == {"buffer"} else frozenset()
        self.truth = self.expect(self.phases, within=10**6, samples=known)
        return batch


class BufferExample(BufferFault):
    """A stored image holds NaN.  Nothing happens until it is drawn; then the loss is NaN."""

    name = "buffer_example_nan"
    field = "examples"


class BufferLogits(BufferFault):
    """Stored logits hold NaN: the teacher of the distillation is none."""

    name = "buffer_logits_nan"


class BufferOverflow(BufferFault):
    """Logits stored as float16 have become Inf (O11), and with them the distillation term."""

    name = "buffer_logits_inf"
    value = math.inf


class BufferGarbage(BufferFault):
    """Stored logits are enormous but finite: their squared distance overflows, every time one of them is drawn."""

    name = "buffer_logits_garbage"
    value = GARBAGE
    phases = OVERFLOW | {"buffer"}


class BufferLabel(BufferFault):
    """A stored label is no class: an IndexError when it is drawn."""

    name = "buffer_label"
    field = "labels"
    value = 99


class NanSampling(Fault):
    """Sampling weights are NaN, from a softmax written as exp over sum (O10): torch.multinomial raises."""

    name = "nan_sampling_weights"
    guard = "buffer"

    def plant(self) -> None:
        """Come between the scores and the draw."""
        super().plant()
        original: Callable[[Batch], Tensor | None] = self.method.probabilities  # type: ignore[attr-defined]

        def probabilities(batch: Batch) -> Tensor | None:
            found = original(batch)
            return torch.full((len(self.buffer),), math.nan) if self.is_struck(batch) else found

        self.method.probabilities = probabilities  # type: ignore[attr-defined]
        self.truth = self.expect({"buffer", "forward"})
