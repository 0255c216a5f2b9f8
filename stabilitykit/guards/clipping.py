"""Guard 7: gradient clipping that checks first and whose norm cannot overflow."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from stabilitykit.errors import UsageError
from stabilitykit.guards.checks import gradient_norm
from stabilitykit.guards.guard import Guard

RECENT, PATIENCE = 100, 10  # norms a limit that follows the run is made of, and how many it takes to have one


class GradientClip(Guard):
    """Scales the gradients down to a limit, never up, and never when they are not finite.

    `clip_grad_norm_` turns one infinite gradient into zeros and NaN, one NaN into NaN everywhere, and finite gradients
    of 1e25 into zeros, since their float32 norm overflows. Here a norm that is not finite leaves the gradients as they
    are, for whoever looks at them next, and is returned:

        clip = GradientClip(1.0)
        for x, y in loader:
            loss_of(x, y).backward()
            if math.isfinite(clip(model.parameters())):
                optimizer.step()

    A fixed limit changes every step of a run whose norms lie above it, healthy ones too. One that follows the run
    (after AutoClip: Seetharaman et al., 2020) cuts leaps alone: `slack` times the largest of the last 100 norms, as
    clipped. A run that always had norms of 50 keeps them; a norm of 5,000 after them becomes 200.

    Args:
        max_norm: largest L2 norm over all gradients; None follows the run, 0 measures and never clips.
        slack: how far above its recent norms a step may be, where the limit follows the run.

    Attributes:
        num_steps: how often it was asked; `num_acted / num_steps` is the clip rate.

    Raises:
        UsageError: `max_norm` is negative or not finite, or `slack` not above 1.
    """

    name: ClassVar[str] = "clip"

    def __init__(self, max_norm: float | None = None, *, slack: float = 4.0, on_event: object | None = None) -> None:
        super().__init__(on_event)
        if max_norm is not None and not 0 <= max_norm < math.inf:
            raise UsageError(
                f"GradientClip: got max_norm={max_norm}, expected None (it follows the run), 0 (off) or a positive norm"
            )
        if not 1 < slack < math.inf:
            raise UsageError(f"GradientClip: got slack={slack}, expected a finite number above 1")
        self.max_norm, self.slack = max_norm, slack
        self.num_steps = 0
        self._recent: deque[float] = deque(maxlen=RECENT)

    @property
    def limit(self) -> float:
        """The largest norm that passes now; `inf` where nothing is clipped."""
        if self.max_norm is not None:
            return self.max_norm or math.inf
        return self.slack * max(self._recent) if len(self._recent) >= PATIENCE and any(self._recent) else math.inf

    def __call__(self, parameters: Iterable[Tensor], norm: float | None = None) -> float:
        """Clip in place; the norm before clipping: judge the distribution of this one, the one after is a given.

        Args:
            parameters: whose gradients are clipped.
            norm: their norm, where it is known already.
        """
        gradients = [entry.grad for entry in parameters if entry.grad is not None]
        norm = gradient_norm(gradients) if norm is None else norm
        self.num_steps += 1
        limit = self.limit
        if limit < norm < math.inf:
            torch._foreach_mul_(gradients, limit / norm)
            message = f"gradient norm {norm:.4g} clipped to {limit:.4g}"
            self.acted(message, severity="info", norm=norm, max_norm=limit)
        if math.isfinite(norm):
            self._recent.append(min(norm, limit))
        else:
            message = f"gradient norm is {norm}, expected a finite one; gradients left as they are, nothing clipped"
            self.acted(message, norm=norm, phase="backward")
        return norm

    def state_dict(self) -> dict[str, Any]:
        """How often it acted and was asked, and the norms its limit is made of."""
        return super().state_dict() | {"num_steps": self.num_steps, "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put all of it back."""
        super().load_state_dict(state)
        self.num_steps = state["num_steps"]
        self._recent = deque(state["recent"], maxlen=RECENT)
