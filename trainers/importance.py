"""How much a stored sample matters, and how that shapes the draw.  Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

FLOOR, CAP = 1e-3, 1.0
LAST = 1e-9  # of what is drawn only when nothing else is left


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


def head_influence(features: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Mode 4: how the mean loss of all other samples changes, per unit of step, when one is learnt; (N,), float64.

    -<mean of the others' g, own g>, g the gradient of a sample's cross-entropy for the classifier's weight and bias:
    (p - onehot(y)) (x) (h, 1).  First order; negative is helpful.  Leaving the sample itself out keeps it from
    recommending itself.  One forward for the whole buffer.

    Args:
        features: (N, D), what the classifier saw.
        logits: (N, K).
        labels: (N,) int64.
    """
    errors = logits.double().softmax(1)
    errors[torch.arange(len(labels)), labels] -= 1
    inputs = torch.cat([features.double(), features.new_ones(len(features), 1).double()], 1)
    with_all = ((errors @ (errors.T @ inputs)) * inputs).sum(1)
    own = errors.square().sum(1) * inputs.square().sum(1)
    return (own - with_all) / max(1, len(labels) - 1)


def ranked(values: Tensor) -> Tensor:
    """Ranks scaled to [0, 1], the largest 1: effects are heavy-tailed, and one outlier must not take every draw."""
    return values.argsort().argsort().float() / max(1, len(values) - 1)


def effective_share(probabilities: Tensor) -> float:
    """Kish's effective sample size over the number of slots: 1 for even draws, 1 / N when one slot takes them all."""
    return float(probabilities.sum().square() / probabilities.square().sum() / len(probabilities))


def effective_classes(probabilities: Tensor, labels: Tensor) -> float:
    """How many classes are drawn, counted by the inverse of Simpson's index: all of them only where all are even."""
    known, places = labels.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    shares = probabilities.new_zeros(len(known)).index_add_(0, places, probabilities / probabilities.sum())
    return float(1 / shares.square().sum())


def blended_probabilities(importance: Tensor, weight: float, groups: Tensor | None = None) -> Tensor:
    """p_i = (1 - weight) / N + weight * w_i / sum(w), w the importance within [FLOOR, CAP]; float64.

    An importance that is not finite counts as the floor: torch.multinomial refuses NaN, and one bad score must not
    end a run.

    Args:
        importance: (N,).
        weight: 0 draws evenly, 1 by importance alone.
        groups: (N,) int64; every group that is there gets the same share of what goes by importance, and importance
            decides within it.  Samples of a negative group get next to none of it, unless all of them are.
    """
    known = torch.where(importance.isfinite(), importance, FLOOR).double().clamp(FLOOR, CAP)
    if groups is not None and (groups >= 0).any():
        there, places = groups.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        sums = known.new_zeros(len(there)).index_add_(0, places, known)
        known = (known / sums[places]).where(groups >= 0, LAST)
    return (1 - weight) / len(known) + weight * known / known.sum()


def warmed_up(weight: float, task: int, warmup_tasks: int) -> float:
    """The blend of `task`: it grows linearly over the first tasks, from nothing in task 0."""
    return weight * min(1.0, task / warmup_tasks) if warmup_tasks else weight
