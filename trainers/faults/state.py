"""Faults of weights, momentum and learning rate, between two steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch

from trainers.batch import Batch
from trainers.faults.base import OVERFLOW, Fault


class NanWeight(Fault):
    """One weight is NaN: a bad checkpoint, a broken memory cell.  Every later batch has a NaN loss (S7)."""

    name = "nan_weight"

    def strike(self, batch: Batch) -> Batch:
        """Spoil one number of one parameter."""
        name, weight = self.draws.choice(list(self.network.named_parameters()))
        with torch.no_grad():
            weight.view(-1)[self.draws.randrange(weight.numel())] = math.nan
        self.truth = self.expect({"weights"}, tensor=name)
        return batch


class BitFlip(Fault):
    """The top exponent bit of a weight flips: 0.05 becomes 1.7e37.  A layer's output overflows, here or further on."""

    name = "bit_flip"

    def strike(self, batch: Batch) -> Batch:
        """Flip it in a weight that matters: one whose last gradient was among the largest."""
        weight = self.draws.choice([entry for entry in self.network.parameters() if entry.dim() > 1])
        small = (weight.abs() > 1e-3) & (weight.abs() < 0.9)
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        slot = int((gradient.abs() * small).view(-1).argmax())
        with torch.no_grad():
            bits = weight.detach().view(torch.int32).view(-1)
            bits[slot] ^= 1 << 30
        self.truth = self.expect(OVERFLOW, within=3)
        return batch


class MomentumNan(Fault):
    """A NaN stays in the optimizer's momentum (S9): weights that were repaired are NaN again a step later."""

    name = "momentum_nan"

    def strike(self, batch: Batch) -> Batch:
        """Spoil the momentum of one parameter."""
        names = {id(entry): name for name, entry in self.network.named_parameters()}
        moving = [entry for entry, state in self.optimizer.state.items() if state.get("momentum_buffer") is not None]
        weight = self.draws.choice(moving)
        self.optimizer.state[weight]["momentum_buffer"].view(-1)[0] = math.nan
        self.truth = self.expect({"optimizer", "weights"}, within=1, tensor=names[id(weight)])
        return batch


class InfiniteRate(Fault):
    """The learning rate is infinite: a warm-up that divides by zero.  Every weight is Inf or NaN after the update."""

    name = "infinite_rate"
    guard = "lr"
    rate: ClassVar[float] = math.inf
    within: ClassVar[int] = 0

    def strike(self, batch: Batch) -> Batch:
        """Write it into the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.truth = self.expect({"optimizer"} if math.isinf(self.rate) else OVERFLOW, within=self.within)
        return batch


class ExplodingRate(InfiniteRate):
    """The learning rate is a thousand times too large from one step on: the loss overshoots, further each step."""

    name = "exploding_rate"
    rate = 1e3
    within = 40


class LostRate(InfiniteRate):
    """At a task boundary the optimizer is rebuilt with another learning rate (S14): no NaN, a worse network."""

    name = "lost_rate"
    rate = 5.0
    within = 40

    @classmethod
    def steps(cls, starts: Sequence[int], total: int) -> Sequence[int]:
        """The first step of any task but the first."""
        return [start for start in starts if 0 < start < total]
