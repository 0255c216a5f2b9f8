"""Faults of BatchNorm, and of computations on the side."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainers.batch import Batch
from trainers.faults.base import OVERFLOW, Fault


class BatchNormPoison(Fault):
    """Running statistics are NaN (S8): the training loss stays finite, evaluation is at chance."""

    name = "batch_norm_poison"
    needs_batch_norm = True

    def strike(self, batch: Batch) -> Batch:
        """Spoil one layer's variance."""
        name, norm = self.draws.choice(_batch_norms(self.network))
        norm.running_var[0] = math.nan
        self.truth = self.expect({"state"}, tensor=f"{name}.running_var")
        return batch


class ThawedBatchNorm(Fault):
    """Frozen BatchNorm is put back to training and its statistics are reset (S1, S15): evaluation drifts.  Silent."""

    name = "thawed_batch_norm"
    guard = "freeze_bn"
    needs_batch_norm = True

    @classmethod
    def steps(cls, starts: Sequence[int], total: int) -> Sequence[int]:
        """After the first task, when there is something to thaw."""
        return [step for step in super().steps(starts, total) if step > starts[1]]

    def strike(self, batch: Batch) -> Batch:
        """What a library call that reconfigures layers does."""
        for _, norm in _batch_norms(self.network):
            norm.__class__ = nn.BatchNorm2d
            norm.train()
            norm.reset_running_stats()
        self.truth = self.expect({"state"})
        return batch


class LeakingHook(Fault):
    """A causal score runs in train mode, draws random numbers and leaves gradients behind (O8, O9, O25).  Silent."""

    name = "leaking_hook"
    guard = "isolation"

    def plant(self) -> None:
        """Come between the scoring and its inputs."""
        super().plant()
        self.truth = self.expect(OVERFLOW | {"buffer"}, within=30)
        original: Callable[[Any], Tensor] = self.method.inputs  # type: ignore[attr-defined]

        def inputs(slots: Any) -> Tensor:
            found = original(slots)
            if self.now >= self.step:
                self.leak(found)
            return found

        self.method.inputs = inputs  # type: ignore[attr-defined]

    def leak(self, images: Tensor) -> None:
        """Look at noisy copies of some images, carelessly."""
        self.network.train()
        with torch.enable_grad():
            noisy = images[:8] + 20 * torch.rand_like(images[:8])
            self.network(noisy).square().mean().backward()


def _batch_norms(network: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]
