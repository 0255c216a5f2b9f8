"""Guard 2, precision: float32, or the whole step under autocast, with a gradient scaler where float16 needs one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stabilitykit.errors import UsageError

Format = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """The format of the arithmetic.

    Attributes:
        format: `fp32`, `bf16` or `fp16`.
        whole_step: autocast around every forward, float16 with a scaler.  False is how Causal-DER began: autocast
            around the replay forwards alone and no scaler, so that small gradients vanish and large ones overflow.
    """

    format: Format = "fp32"
    whole_step: bool = True

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            raise UsageError(f"--mixed_precision: got {self.format!r}, expected 0, 1, fp32, bf16 or fp16")


class Precision:
    """Autocast contexts and the scaler of a run."""

    def __init__(self, config: PrecisionConfig) -> None:
        self.config = config
        scaled = config.whole_step and config.format == "fp16"
        self.scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**12)

    def stream(self) -> AbstractContextManager[Any]:
        """Around the forward of the batch."""
        return self._autocast() if self.config.whole_step else nullcontext()

    def replay(self) -> AbstractContextManager[Any]:
        """Around the forwards of the replays."""
        return self._autocast()

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.format == "fp32":
            return nullcontext()
        return torch.autocast("cpu", torch.bfloat16 if self.config.format == "bf16" else torch.float16)

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, scaled where there is a scaler."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """True gradients, before anyone checks or clips them."""
        self.scaler.unscale_(optimizer)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's step; the scaler skips it when gradients overflowed, and lowers its scale."""
        self.scaler.step(optimizer)
        self.scaler.update()
