"""How much a stored sample matters, and how that shapes the draw.  Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

FLOOR, CAP = 1e-3, 1.0


def heuristic_importance(logits: Tensor, labels: Tensor) -> Tensor:
    """Mode 1: loss, scaled to [0, 1] over the batch, times the squared doubt of the network; (N,) float32.

    High for samples the network gets wrong without being sure.  Computed in log space: exp of a raw logit overflows
    float32 at 89.
    """
    scores = logits.float()
    losses = cross_entropy(scores, labels, reduction="none")
    doubt = 1 - scores.log_softmax(1).amax(1).exp()
    low, high = losses.aminmax()
    return (losses - low) / (high - low).clamp_min(1e-12) * doubt.square()


def blended_probabilities(importance: Tensor, weight: float) -> Tensor:
    """p_i = (1 - weight) / N + weight * w_i / sum(w), w the importance within [FLOOR, CAP]; float64.

    An importance that is not finite counts as the floor: torch.multinomial refuses NaN, and one bad score must not
    end a run.
    """
    known = torch.where(importance.isfinite(), importance, FLOOR).double().clamp(FLOOR, CAP)
    return (1 - weight) / len(known) + weight * known / known.sum()


def warmed_up(weight: float, task: int, warmup_tasks: int) -> float:
    """The blend of `task`: it grows linearly over the first tasks, from nothing in task 0."""
    return weight * min(1.0, task / warmup_tasks) if warmup_tasks else weight
