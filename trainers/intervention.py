"""What would learning this sample do to the others?  Asked of a copy of the network, one intervention a candidate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from stabilitykit.snapshot import TrainingState

Weights = dict[str, Tensor]


class Samples(NamedTuple):
    """What a loss is taken over."""

    inputs: Tensor  # (N, C, H, W) normalised
    labels: Tensor  # (N,) int64


def functional_copy(network: nn.Module) -> tuple[Weights, Weights]:
    """Parameters and module buffers by name, as the toolkit's snapshot holds them: detached from the live ones."""
    copies = {id(live): held for live, held in TrainingState(network, ()).capture().tensors}
    parameters = {name: copies[id(live)] for name, live in network.named_parameters()}
    return parameters, {name: copies[id(live)] for name, live in network.named_buffers()}


class Intervention:
    """A training step taken with and without one more sample, both on copies of the weights.

    Effect of z = probe loss after the step on (batch, z) - probe loss after the same step on (batch) alone; negative is
    helpful.  As the step gets small it becomes -lr <probe gradient, z's gradient>.

    Args:
        twin: the network's architecture in eval mode; its own weights are not used, and nothing hooks it.
        network: the live network, only read.
        step: the batch of the present step, the same on both sides.
        probes: what the effect is measured on; none of them may be a candidate.
        lr: size of the step.
        micro_steps: how often it is taken.
        trained: what the names of the parameters begin with that the step changes: all, or `classifier.` for instance.
    """

    def __init__(
        self,
        twin: nn.Module,
        network: nn.Module,
        *,
        step: Samples,
        probes: Samples,
        lr: float,
        micro_steps: int = 1,
        trained: str = "",
    ) -> None:
        self.twin = twin
        self.step = step
        self.probes = probes
        self.lr = lr
        self.micro_steps = micro_steps
        parameters, self.fixed = functional_copy(network)
        self.fixed |= {name: value for name, value in parameters.items() if not name.startswith(trained)}
        self.weights = {name: value for name, value in parameters.items() if name.startswith(trained)}
        self.step_gradient = self.gradient(self.weights, step)
        self.baseline = self.probe_loss(self.updated(None))

    def effects(self, candidates: Samples) -> Tensor:
        """The effect of every candidate, (N,), in the dtype of the loss."""
        rows = range(len(candidates.labels))
        return torch.stack([self.effect(Samples(*(part[row : row + 1] for part in candidates))) for row in rows])

    def effect(self, candidate: Samples) -> Tensor:
        """The effect of one candidate."""
        return self.probe_loss(self.updated(candidate)) - self.baseline

    def updated(self, candidate: Samples | None) -> Weights:
        """Weights after the step, with the candidate or without."""
        weights = self.weights
        for micro_step in range(self.micro_steps):
            gradient = self.gradient(weights, self.step) if micro_step else self.step_gradient
            moved = {name: value - self.lr * gradient[name] for name, value in weights.items()}
            if candidate is not None:
                own = self.gradient(weights, candidate)
                moved = {name: value - self.lr * own[name] for name, value in moved.items()}
            weights = moved
        return weights

    def gradient(self, weights: Weights, samples: Samples) -> Weights:
        """Of the mean cross-entropy over the samples."""
        leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
        with torch.enable_grad():
            loss = self.loss(leaves, samples)
            return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    @torch.no_grad()
    def probe_loss(self, weights: Weights) -> Tensor:
        """Mean cross-entropy over the probes."""
        return self.loss(weights, self.probes)

    def loss(self, weights: Weights, samples: Samples) -> Tensor:
        """Mean cross-entropy over samples, of the network with other weights."""
        logits: Tensor = functional_call(self.twin, weights | self.fixed, (samples.inputs,))
        return cross_entropy(logits, samples.labels)
