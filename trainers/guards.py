"""The eight guards' own arithmetic, each a small part by itself; the trainer decides when they act.

1 `cosine_over_tasks`  2 `trainers.precision`  3 `freeze_batch_norm`  4 `finite_rows` (used by the buffer)  5 `isolated`
6 `all_finite`  7 `GradientClip`  8 `linear_to_half`
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LR_FLOOR = 0.1


def cosine_over_tasks(task: int, num_tasks: int) -> float:
    """Guard 1: share of the base learning rate; of ten tasks 0 has 100 %, 2 90.5 %, 5 50 %, 9 the floor of 10 %."""
    return max(LR_FLOOR, 0.5 * (1 + math.cos(math.pi * task / num_tasks)))


def linear_to_half(task: int, num_tasks: int) -> float:
    """Guard 8: share of the replay weights, 100 % at the first task, 50 % at the last."""
    return 1 - 0.5 * task / max(1, num_tasks - 1)


class _Frozen:
    """What freezing adds to a BatchNorm: `train()` cannot undo it, and a forward in training mode is refused."""

    training: bool

    def train(self, mode: bool = True) -> Any:
        return super().train(False)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("frozen BatchNorm: got training=True, expected eval mode; change modes through train()")
        normalised: Tensor = super().forward(x)  # type: ignore[misc]
        return normalised


class FrozenBatchNorm1d(_Frozen, nn.BatchNorm1d):
    """A BatchNorm1d that normalises with the statistics it was frozen with."""


class FrozenBatchNorm2d(_Frozen, nn.BatchNorm2d):
    """A BatchNorm2d that normalises with the statistics it was frozen with."""


class FrozenBatchNorm3d(_Frozen, nn.BatchNorm3d):
    """A BatchNorm3d that normalises with the statistics it was frozen with."""


FROZEN: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: FrozenBatchNorm1d,
    nn.BatchNorm2d: FrozenBatchNorm2d,
    nn.BatchNorm3d: FrozenBatchNorm3d,
}


def freeze_batch_norm(model: nn.Module) -> int:
    """Guard 3: freeze the running statistics of every BatchNorm for good; the number frozen by this call.

    The class changes, not the module: its parameters, hooks, name and `state_dict` keys stay, and it can still be
    pickled.  Scale and shift go on learning.  (`eval()` alone is undone by the next `train()`, and with
    `track_running_stats=False` set afterwards training and evaluation normalise differently.)
    """
    norms = [module for module in model.modules() if type(module) in FROZEN]
    for module in norms:
        module.__class__ = FROZEN[type(module)]
        module.eval()
    return len(norms)


def finite_rows(values: Tensor) -> Tensor:
    """Guard 4: which rows hold nothing but finite values, (N,) bool; true where a row is empty."""
    return values.isfinite().flatten(1).all(1)


@contextmanager
def isolated(model: nn.Module) -> Iterator[None]:
    """Guard 5: look at `model` without a trace: no graph, eval mode, every module's mode and the RNG put back."""
    modes = [(module, module.training) for module in model.modules()]
    random_state = torch.get_rng_state()
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training  # not train(): it would recurse into children that differ
        torch.set_rng_state(random_state)


def all_finite(tensors: Iterable[Tensor | None]) -> bool:
    """Guard 6: whether nothing is NaN or Inf, in one transfer to the host; integers are always finite."""
    floats = [tensor for tensor in tensors if tensor is not None and tensor.is_floating_point() and tensor.numel()]
    if not floats:
        return True
    # A sum of finite fp32 magnitudes may overflow; extremes cannot, and aminmax hands NaN on.
    extremes = torch.stack([torch.stack(torch.aminmax(tensor.detach())).float() for tensor in floats])
    return bool(extremes.isfinite().all())


def gradient_norm(gradients: Iterable[Tensor]) -> float:
    """L2 norm over all gradients in float64: finite float32 gradients of 1e25 do not overflow it."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


class GradientClip:
    """Guard 7: scale the gradients down to `max_norm`, never up, and never when they are not finite.

    A non-finite norm leaves the gradients as they are, so that whoever looks at them still sees what happened:
    scaling by 1/Inf would turn the finite ones into zeros and the infinite ones into NaN.
    """

    def __init__(self, max_norm: float) -> None:
        self.max_norm = max_norm
        self.num_clipped = 0

    def __call__(self, gradients: list[Tensor], norm: float) -> None:
        """Clip in place, given their norm."""
        if self.max_norm and self.max_norm < norm < math.inf:
            torch._foreach_mul_(gradients, self.max_norm / norm)
            self.num_clipped += 1

    def state_dict(self) -> dict[str, int]:
        """How often it acted."""
        return {"num_clipped": self.num_clipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Put the count back."""
        self.num_clipped = state["num_clipped"]


def train_eval_gap(model: nn.Module, inputs: Tensor) -> float:
    """Root mean square of (train-mode minus eval-mode output) over that of the eval-mode output.

    Read it as BatchNorm's health: about 0 when frozen, a few tenths while statistics follow the data, 1 and more when
    evaluation sees another network than training does.  The model's buffers are copies here, so none moves.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with isolated(model):
        settled = torch.func.functional_call(model, buffers, (inputs,))
        model.train()
        training = torch.func.functional_call(model, buffers, (inputs,))
    scale = settled.square().mean().sqrt()
    return float((training - settled).square().mean().sqrt() / scale)
