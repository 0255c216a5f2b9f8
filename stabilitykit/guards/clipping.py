"""Guard 7: gradient clipping that checks first and whose norm cannot overflow."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from stabilitykit.errors import UsageError
from stabilitykit.guards.checks import gradient_norm
from stabilitykit.guards.guard import Guard


class GradientClip(Guard):
    """Scales the gradients down to `max_norm`, never up, and never when they are not finite.

    `clip_grad_norm_` turns one infinite gradient into zeros and NaN, one NaN into NaN everywhere, and finite gradients
    of 1e25 into zeros, since their float32 norm overflows. Here a norm that is not finite leaves the gradients as they
    are, for whoever looks at them next, and is returned:

        clip = GradientClip(1.0)
        for x, y in loader:
            loss_of(x, y).backward()
            if math.isfinite(clip(model.parameters())):
                optimizer.step()

    Args:
        max_norm: largest L2 norm over all gradients; 0 measures and never clips.

    Attributes:
        num_steps: how often it was asked; `num_acted / num_steps` is the clip rate.

    Raises:
        UsageError: `max_norm` is negative or not finite.
    """

    name: ClassVar[str] = "clip"

    def __init__(self, max_norm: float, *, on_event: object | None = None) -> None:
        super().__init__(on_event)
        if not 0 <= max_norm < math.inf:
            raise UsageError(f"GradientClip: got max_norm={max_norm}, expected 0 (off) or a positive norm")
        self.max_norm = max_norm
        self.num_steps = 0

    def __call__(self, parameters: Iterable[Tensor], norm: float | None = None) -> float:
        """Clip in place; the norm before clipping: judge the distribution of this one, the one after is a given.

        Args:
            parameters: whose gradients are clipped.
            norm: their norm, where it is known already.
        """
        gradients = [entry.grad for entry in parameters if entry.grad is not None]
        norm = gradient_norm(gradients) if norm is None else norm
        self.num_steps += 1
        if self.max_norm and self.max_norm < norm < math.inf:
            torch._foreach_mul_(gradients, self.max_norm / norm)
            message = f"gradient norm {norm:.4g} clipped to {self.max_norm:g}"
            self.acted(message, severity="info", norm=norm, max_norm=self.max_norm)
        elif not math.isfinite(norm):
            message = f"gradient norm is {norm}, expected a finite one; gradients left as they are, nothing clipped"
            self.acted(message, norm=norm, phase="backward")
        return norm

    def state_dict(self) -> dict[str, Any]:
        """How often it acted, and was asked."""
        return super().state_dict() | {"num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the counts back."""
        super().load_state_dict(state)
        self.num_steps = state["num_steps"]
