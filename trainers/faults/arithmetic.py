"""Faults of the step's own arithmetic: losses, gradients, precision."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainers.batch import Batch
from trainers.faults.base import OVERFLOW, Fault, LossFault


class SqrtAtZero(LossFault):
    """A norm of something that is zero: the loss is finite, the derivative of sqrt at 0 is not (O5)."""

    name = "sqrt_at_zero"

    def spoil(self, terms: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """Add it."""
        self.truth = self.expect({"backward"})
        return terms | {"norm": (logits * 0).square().sum().sqrt()}


class LogOfZero(LossFault):
    """An entropy written as p log p of a probability that is 0: -Inf, then NaN."""

    name = "log_of_zero"

    def spoil(self, terms: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """Add it."""
        share = torch.relu(logits * 0)
        return terms | {"entropy": (share * share.log()).sum()}


class ZeroOverZero(LossFault):
    """A mean over a mask that happens to be empty, 0/0: the loss is NaN, and every gradient with it."""

    name = "zero_over_zero"

    def spoil(self, terms: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """Add it."""
        mask = (logits > 1e6).float()
        return terms | {"masked": (logits * mask).sum() / mask.sum()}


class InfiniteGradient(LossFault):
    """Gradients are infinite although loss and activations are fine: a derivative that overflows."""

    name = "infinite_gradient"
    factor: ClassVar[float] = math.inf
    phases: ClassVar[frozenset[str]] = frozenset({"backward"})
    within: ClassVar[int] = 0

    def spoil(self, terms: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """Scale the gradient on its way through the logits."""
        self.truth = self.expect(self.phases, within=self.within)
        logits.register_hook(lambda gradient: gradient * self.factor)  # type: ignore[no-untyped-call]
        return terms


class NormOverflow(InfiniteGradient):
    """Finite gradients of 1e25, whose float32 norm is Inf (S11): clipping makes zeros of them, or the weights jump."""

    name = "gradient_norm_overflow"
    factor = 1e27
    phases = OVERFLOW
    within = 3


class ExplodingReplay(LossFault):
    """The replay terms weigh a million times too much for three steps: training overshoots, the teachers with it."""

    name = "exploding_replay"
    lasts = 3

    def spoil(self, terms: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """Scale them."""
        self.truth = self.expect(OVERFLOW, within=10)
        return {name: term if name == "ce" else 1e6 * term for name, term in terms.items()}


class DisconnectedLoss(LossFault):
    """The loss is a constant that asks for gradients (O6): the curve shows 1.0 and nothing is trained.  Silent."""

    name = "disconnected_loss"
    lasts = 4

    def spoil(self, terms: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """Put the constant there."""
        self.truth = self.expect({"backward"})
        return {"ce": torch.tensor(1.0, requires_grad=True)}


class SaturatingClamp(Fault):
    """Logits are clamped to +-10 in the loss path (S4), and all of them lie beyond: every gradient is 0.  Silent."""

    name = "saturating_clamp"

    def strike(self, batch: Batch) -> Batch:
        """Move the logits and clamp them, for good."""
        with torch.no_grad():
            self.network.classifier.bias.sub_(50)
        self.network.register_forward_hook(lambda *call: call[-1].clamp(-10, 10))
        self.truth = self.expect({"backward"})
        return batch


class UnscaledHalf(Fault):
    """float16 with a loss scale of one's own that nobody checks (S24): scaled gradients overflow, weights are NaN."""

    name = "unscaled_half"
    guard = "precision"
    scale: ClassVar[float] = 2.0**12

    def plant(self) -> None:
        """Scale by hand where no scaler does."""
        super().plant()
        self.truth = self.expect({"backward"}, within=2)
        precision = self.trainer.step.precision
        if precision.scaler.is_enabled():
            return

        def unscale(_optimizer: torch.optim.Optimizer) -> None:
            gradients = [entry.grad for entry in self.network.parameters() if entry.grad is not None]
            torch._foreach_div_(gradients, self.scale)

        def backward(loss: Tensor) -> None:
            torch.autograd.backward(loss * self.scale)

        vars(precision).update(stream=precision.replay, backward=backward, unscale=unscale)
        original = self.method.forward

        def forward(batch: Batch, draws: Any) -> Tensor:
            logits = original(batch, draws)
            if self.is_struck(batch) and logits.requires_grad:
                logits.register_hook(_overflow)  # type: ignore[no-untyped-call]
            return logits

        self.method.forward = forward  # type: ignore[method-assign]

    def strike(self, batch: Batch) -> Batch:
        """A scaler's scale has grown too far; without one the batch is one whose gradients are too large."""
        scaler = self.trainer.step.precision.scaler
        if scaler.is_enabled():
            scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**26})
        return batch


def _overflow(gradient: Tensor) -> Tensor:
    return (gradient.half() * 2.0**16).to(gradient.dtype)
