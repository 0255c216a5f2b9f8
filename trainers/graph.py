"""The task graph: how strongly the network's response to one task's classes is carried by its responses to others.

Variables are tasks, observations stored samples, all seen through the present network.  Fitted when a task ends, on a
copy of the numbers; nothing here enters the network's loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Order = Literal["temporal", "free"]
H_TOLERANCE, MAX_RHO = 1e-8, 1e16  # as NOTEARS has them
INNER_STEPS, SMALLEST_STEP, SETTLED = 100, 1e-14, 1e-7
NEGLIGIBLE = 0.01  # an edge below this share of a standard deviation is none


def task_responses(logits: Tensor, classes: Sequence[range]) -> Tensor:
    """Log-sum-exp of the logits of each task's classes, (N, T) float64."""
    scores = logits.double()
    return torch.stack([scores[:, own.start : own.stop].logsumexp(1) for own in classes], 1)


def standardised(responses: Tensor) -> Tensor:
    """Columns with mean 0 and deviation 1; a constant column becomes 0."""
    centred = responses - responses.mean(0)
    deviation = centred.square().mean(0).sqrt()
    return torch.where(deviation > 0, centred / deviation, 0.0)


def task_graph(responses: Tensor, sparsity: float, order: Order = "temporal") -> Tensor:
    """Weights A, (T, T) float64: A[i, j] is what a standard deviation of task i's response adds to task j's.

    Args:
        responses: (N, T), finite.
        sparsity: weight of the L1 penalty; 1 and more leaves no edge.
        order: `temporal`: only earlier tasks may explain later ones, so the graph is acyclic by construction;
            `free`: NOTEARS (Zheng et al., 2018) finds the order too.
    """
    standard = standardised(responses.double())
    gram = standard.T @ standard / len(standard)
    if order == "free":
        return notears(gram, sparsity)
    earlier = torch.ones_like(gram).triu(1)
    return lasso(gram, sparsity, earlier)


def lasso(gram: Tensor, sparsity: float, allowed: Tensor, steps: int = 500) -> Tensor:
    """Argmin of 1/(2n) ||X - X A||^2 + sparsity |A|_1 over `allowed` entries, given X'X / n; by FISTA."""
    size = 1 / max(float(torch.linalg.matrix_norm(gram, 2)), 1e-12)
    weights = ahead = torch.zeros_like(gram)
    momentum = 1.0
    for _ in range(steps):
        moved = ahead - size * (gram @ ahead - gram)
        before, weights = weights, soft_threshold(moved, size * sparsity) * allowed
        grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = weights + (momentum - 1) / grown * (weights - before)
        momentum = grown
    return weights


def soft_threshold(values: Tensor, amount: float) -> Tensor:
    """Shrunk towards 0 by `amount`."""
    return values.sign() * (values.abs() - amount).clamp_min(0)


def acyclicity(weights: Tensor) -> float:
    """h(A) = tr(exp(A * A)) - T: 0 for an acyclic graph.  In float64: float32 overflows at entries of 5."""
    squared = weights.double().square()
    return float(torch.linalg.matrix_exp(squared).trace()) - len(weights)


def notears(gram: Tensor, sparsity: float) -> Tensor:
    """The acyclic graph of least 1/(2n) ||X - X A||^2 + sparsity |A|_1, by augmented Lagrangian, float64 on the CPU.

    Each inner problem is solved by proximal gradient with backtracking: a large rho makes Adam's steps, all of one
    size, shrink both directions of an edge before the data can choose between them.
    """
    weights = torch.zeros_like(gram)
    rho, multiplier, h = 1.0, 0.0, math.inf
    while h > H_TOLERANCE and rho < MAX_RHO:
        weights = _descend(weights, gram, sparsity, multiplier, rho)
        before, h = h, acyclicity(weights)
        multiplier += rho * h
        rho *= 10 if h > 0.25 * before else 1
    return without_cycles(weights)


def _descend(weights: Tensor, gram: Tensor, sparsity: float, multiplier: float, rho: float) -> Tensor:
    """The inner problem of `notears`, from `weights` on."""
    off_diagonal = 1 - torch.eye(len(gram), dtype=gram.dtype)
    value, slope = _lagrangian(weights, gram, multiplier, rho)
    size = 1.0
    for _ in range(INNER_STEPS):
        while True:
            moved = soft_threshold(weights - size * slope, size * sparsity) * off_diagonal
            change = moved - weights
            reached, next_slope = _lagrangian(moved, gram, multiplier, rho)
            model = value + float((slope * change).sum()) + float(change.square().sum()) / (2 * size)
            if reached <= model or size < SMALLEST_STEP:
                break
            size /= 2
        weights, value, slope = moved, reached, next_slope
        size *= 1.5
        if float(change.abs().max()) < SETTLED:
            break
    return weights


def _lagrangian(weights: Tensor, gram: Tensor, multiplier: float, rho: float) -> tuple[float, Tensor]:
    """Fit + multiplier h + rho/2 h^2, and its gradient."""
    exponential = torch.linalg.matrix_exp(weights.square())
    h = float(exponential.trace()) - len(gram)
    fit = 0.5 * float((weights.T @ gram @ weights).trace() - 2 * (gram @ weights).trace() + gram.trace())
    gradient = gram @ weights - gram + 2 * (multiplier + rho * h) * exponential.T * weights
    return fit + multiplier * h + rho / 2 * h * h, gradient


def without_cycles(weights: Tensor) -> Tensor:
    """What is left of a nearly acyclic graph when negligible edges go, and then the weakest while there is a cycle."""
    kept = torch.where(weights.abs() >= NEGLIGIBLE, weights, 0.0)
    while kept.any() and has_cycle(kept):
        kept[kept.abs() == kept.abs()[kept != 0].min()] = 0
    return kept


def has_cycle(weights: Tensor) -> bool:
    """Whether some task reaches itself: a matrix of edges is nilpotent exactly when none does."""
    edges = (weights != 0).double()
    reach = torch.eye(len(edges), dtype=edges.dtype)
    for _ in range(len(edges)):
        reach = (reach @ edges).clamp_max(1)
    return bool(reach.any())
