"""What the sentinel says of one step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the sentinel saw in one step.  The lists name what is not finite, or looks it."""

    losses: Mapping[str, float]
    grad_norm: float = math.nan  # L2 when the last backward ended, as it was: scaled where a scaler scales
    grad_norm_clipped: float = math.nan
    parameter_norm: float = math.nan
    num_backwards: int = 0
    stepped: bool = False
    changed_gradients: bool = False  # between the end of backward and the optimizer
    bad_losses: Sequence[str] = ()
    bad_gradients: Sequence[str] = ()
    bad_clipped: Sequence[str] = ()
    bad_used: Sequence[str] = ()  # those of them, as they were in the end, that an optimizer has used
    bad_parameters: Sequence[str] = ()
    bad_buffers: Sequence[str] = ()
    gradient_norms: Sequence[float] = field(default=(), repr=False)

    @property
    def suspicious(self) -> bool:
        """Whether anything looks non-finite that a step is supposed to keep finite."""
        return bool(self.bad_losses or self.bad_used or self.bad_parameters or self.bad_buffers)

    @property
    def unused_gradients(self) -> bool:
        """Whether gradients are bad but no optimizer stepped: a scaler's skip, or an accumulation still under way."""
        return bool(self.bad_gradients) and not self.stepped

    @property
    def mended_gradients(self) -> bool:
        """Whether gradients were bad when backward ended and finite when the optimizer started."""
        return bool(self.bad_gradients) and self.stepped and self.changed_gradients and not self.bad_clipped

    def same_step(self, other: Reading) -> bool:
        """Whether two runs of a step agree bit for bit in losses, gradient norms and parameters."""
        mine = (*self.losses.values(), *self.gradient_norms, self.grad_norm_clipped, self.parameter_norm)
        theirs = (*other.losses.values(), *other.gradient_norms, other.grad_norm_clipped, other.parameter_norm)
        same = all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(mine, theirs, strict=False))
        return same and len(mine) == len(theirs)
