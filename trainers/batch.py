"""What travels through a training step: a batch of the stream and a draw from the replay buffer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One batch of the stream.

    It carries its own task and epoch, so that a step is a function of its state and its batch and of nothing else.
    """

    inputs: Tensor  # (B, C, H, W) augmented and normalised
    labels: Tensor  # (B,) int64
    examples: Tensor  # (B, C, H, W) the same images, un-augmented, in [0, 1]
    indices: Tensor  # (B,) int64, rows of the training set: they name samples in a diagnosis
    task: int
    epoch: int


class Replay(NamedTuple):
    """One draw from the buffer."""

    slots: Tensor  # (R,) int64
    inputs: Tensor  # (R, C, H, W) augmented and normalised afresh
    labels: Tensor  # (R,) int64
    logits: Tensor  # (R, K) as the network gave them when the sample was stored
    tasks: Tensor  # (R,) int64, the task each came from
