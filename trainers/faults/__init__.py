"""Faults with known truth, planted into a run of the trainer: what a campaign throws at the guards.

A fault strikes at a step: it changes the batch the step is about to get, the state the step begins with, or the step's
own arithmetic.  The last kind is told by the batch, so that a step that is run again is struck again.
"""

from __future__ import annotations

from collections.abc import Mapping

from trainers.faults.arithmetic import (
    DisconnectedLoss,
    ExplodingReplay,
    InfiniteGradient,
    LogOfZero,
    NormOverflow,
    SaturatingClamp,
    SqrtAtZero,
    UnscaledHalf,
    ZeroOverZero,
)
from trainers.faults.base import MARGIN, Fault, Truth
from trainers.faults.data import BadImage, BadLabel, GarbageBatch, InfiniteBatch
from trainers.faults.layers import BatchNormPoison, LeakingHook, ThawedBatchNorm
from trainers.faults.memory import BufferExample, BufferGarbage, BufferLabel, BufferLogits, BufferOverflow, NanSampling
from trainers.faults.state import BitFlip, ExplodingRate, InfiniteRate, LostRate, MomentumNan, NanWeight

__all__ = ["FAULTS", "MARGIN", "Fault", "Truth"]

FAULTS: Mapping[str, type[Fault]] = {
    kind.name: kind
    for kind in (
        BadImage,
        InfiniteBatch,
        GarbageBatch,
        BadLabel,
        NanWeight,
        BitFlip,
        MomentumNan,
        InfiniteRate,
        ExplodingRate,
        LostRate,
        BufferExample,
        BufferLogits,
        BufferOverflow,
        BufferGarbage,
        BufferLabel,
        NanSampling,
        SqrtAtZero,
        LogOfZero,
        ZeroOverZero,
        InfiniteGradient,
        NormOverflow,
        ExplodingReplay,
        DisconnectedLoss,
        SaturatingClamp,
        UnscaledHalf,
        BatchNormPoison,
        ThawedBatchNorm,
        LeakingHook,
    )
}
