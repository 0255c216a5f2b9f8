"""Guard 2: one precision for the whole step, with a gradient scaler where float16 needs one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from stabilitykit.errors import UsageError
from stabilitykit.guards.guard import Guard

Format = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class MixedPrecision(Guard):
    """float32, or the whole step under autocast; float16 always with a scaler, unscaled before anyone looks.

    Turning mixed precision off is the right diagnosis for half a step in float16 without a scaler, and not needed
    otherwise:

        precision = MixedPrecision("fp16")
        with precision.autocast():
            loss = criterion(model(x), y)
        precision.backward(loss)
        precision.unscale(optimizer)  # gradients are true from here on: check and clip them now
        precision.step(optimizer)

    Args:
        format: `fp32`, `bf16` or `fp16`.
        device: device type of the model.
        init_scale: first loss scale of fp16.

    Raises:
        UsageError: another format.
    """

    name: ClassVar[str] = "precision"

    def __init__(
        self,
        format: Format = "fp32",  # noqa: A002 - the word users know
        *,
        device: str = "cpu",
        init_scale: float = 2.0**12,
        on_event: object | None = None,
    ) -> None:
        super().__init__(on_event)
        if format not in get_args(Format):
            raise UsageError(f"MixedPrecision: got {format!r}, expected fp32, bf16 or fp16")
        self.format, self.device = format, device
        self._unscaled = False
        self.scaler = torch.amp.GradScaler(device, enabled=format == "fp16", init_scale=init_scale)

    def autocast(self) -> AbstractContextManager[Any]:
        """Around every forward, and its loss."""
        if self.format == "fp32":
            return nullcontext()
        return torch.autocast(self.device, _DTYPES[self.format])

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, scaled where there is a scaler."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def unscale(self, optimizer: Optimizer) -> None:
        """True gradients, before anyone checks or clips them."""
        self.scaler.unscale_(optimizer)
        self._unscaled = True

    def step(self, optimizer: Optimizer) -> None:
        """The optimizer's step; the scaler leaves it out when gradients overflowed, and lowers its scale."""
        self._unscaled = False
        before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        after = self.scaler.get_scale()
        if after < before:
            message = f"gradients overflowed float16: step left out, loss scale {before:g} -> {after:g}"
            self.acted(message, severity="info", scale=after, phase="backward")

    def skip(self, optimizer: Optimizer) -> None:
        """Instead of `step`, where the caller found the step unsound: the scaler must hear of it all the same.

        Without the update its scale never falls, and the next `unscale` raises.
        """
        if self.scaler.is_enabled():
            if not self._unscaled:
                self.scaler.unscale_(optimizer)
            self.scaler.update()
        self._unscaled = False
