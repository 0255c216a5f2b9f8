"""Precision of a run: guard 2 around the whole step, or half precision around the replays alone, as it once was."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, get_args

from stabilitykit.errors import UsageError
from stabilitykit.guards import MixedPrecision
from stabilitykit.guards.precision import Format


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


class Precision(MixedPrecision):
    """Guard 2; without `whole_step` it guards nothing, and the replays are on their own."""

    def __init__(self, config: PrecisionConfig) -> None:
        super().__init__(config.format if config.whole_step else "fp32")
        self.config = config
        self.replays = MixedPrecision(config.format)

    def stream(self) -> AbstractContextManager[Any]:
        """Around the forward of the batch."""
        return self.autocast()

    def replay(self) -> AbstractContextManager[Any]:
        """Around the forwards of the replays."""
        return self.replays.autocast()
