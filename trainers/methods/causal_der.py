"""Causal-DER: DER++ whose draws lean towards the samples that matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabilitykit.errors import UsageError
from trainers.batch import Batch
from trainers.guards import isolated
from trainers.importance import blended_probabilities, heuristic_importance, warmed_up
from trainers.methods.derpp import Derpp


@dataclass(frozen=True, kw_only=True)
class CausalConfig:
    """How the draws are weighed.

    Attributes:
        mode: importance, 0 none, 1 heuristic.
        weight: blend between even draws (0) and draws by importance (1).
        warmup_tasks: tasks over which the blend grows.
        refresh_every: steps between scorings of the whole buffer with the present network; 0 keeps the scores the
            samples came with.
        isolate: score without touching the model (guard 5); False scores in whatever mode the model is, as the first
            versions did, so that every scoring moves BatchNorm's statistics.
    """

    mode: int = 1
    weight: float = 0.3
    warmup_tasks: int = 2
    refresh_every: int = 25
    isolate: bool = True

    def __post_init__(self) -> None:
        if self.mode not in (0, 1):
            raise UsageError(f"--use_causal_sampling: got {self.mode}, expected 0 (none) or 1 (heuristic)")
        if not 0 <= self.weight <= 1:
            raise UsageError(f"--causal_weight: got {self.weight}, expected 0 to 1")
        for name, count in (("causal_warmup_tasks", self.warmup_tasks), ("importance_refresh", self.refresh_every)):
            if count < 0:
                raise UsageError(f"--{name}: got {count}, expected 0 or more")


class CausalDer(Derpp):
    """DER++ with blended sampling."""

    def __init__(self, *parts: Any, causal: CausalConfig) -> None:
        super().__init__(*parts)
        self.causal = causal

    def probabilities(self, batch: Batch) -> Tensor | None:
        """The blend of even draws and draws by importance; None (evenly) while it weighs nothing."""
        every = self.causal.refresh_every
        if self.causal.mode and every and self.buffer.num_steps % every == 0:
            self.refresh()
        weight = warmed_up(self.causal.weight, batch.task, self.causal.warmup_tasks) if self.causal.mode else 0.0
        return blended_probabilities(self.buffer.importance, weight) if weight else None

    def refresh(self) -> None:
        """Score every stored sample with the present network, in one forward."""
        inputs = self.transform.normalise(self.buffer.examples)
        if self.causal.isolate:
            with isolated(self.network):
                logits = self.network(inputs)
        else:
            with torch.no_grad():
                logits = self.network(inputs)
        self.buffer.importance.copy_(heuristic_importance(logits, self.buffer.labels))
