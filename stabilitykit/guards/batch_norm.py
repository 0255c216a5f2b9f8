"""Guard 3: BatchNorm statistics frozen for good, and the train/eval gap that shows their health."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm

from stabilitykit.guards.guard import Guard
from stabilitykit.guards.isolation import isolated


class _Frozen:
    """What freezing adds to a BatchNorm: no mode that is set makes it use or move batch statistics."""

    training: bool

    def train(self, mode: bool = True) -> Any:
        return super().train(False)  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        norm: Any = self
        return batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


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
    """Freeze the running statistics of every BatchNorm for good; the number frozen by this call.

    The class changes, not the module: its parameters, hooks, name and `state_dict` keys stay, and it can still be
    pickled.  Scale and shift go on learning.  A BatchNorm without running statistics has nothing to freeze.
    """
    norms = [module for module in model.modules() if type(module) in FROZEN and module.running_mean is not None]
    for module in norms:
        module.__class__ = FROZEN[type(module)]
        module.eval()
    return len(norms)


class BatchNormFreeze(Guard):
    """Freezes BatchNorm statistics after a task, and notices if anything thaws them.

    `eval()` alone is undone by the next `train()`, and with `track_running_stats=False` set afterwards training and
    evaluation normalise differently. Here the layers stay frozen whatever mode is set:

        freeze = BatchNormFreeze(model)
        for task, loader in enumerate(loaders):
            train(model, loader)  # calls model.train() as often as it likes
            freeze.end_task(task)
        freeze.check()  # whenever it suits: puts back what code has changed by other ways

    Args:
        model: its BatchNorm layers.
        after_task: the task after which to freeze.
    """

    name: ClassVar[str] = "freeze_bn"

    def __init__(self, model: nn.Module, *, after_task: int = 0, on_event: object | None = None) -> None:
        super().__init__(on_event)
        self.model, self.after_task = model, after_task
        self._held: dict[str, tuple[Any, Tensor, Tensor]] = {}

    def end_task(self, task: int) -> None:
        """Freeze, if `task` is the one."""
        if task == self.after_task:
            self.freeze()

    def freeze(self) -> int:
        """Freeze now, with the statistics the layers have now; the number of layers frozen by this call."""
        count = freeze_batch_norm(self.model)
        self._held = {
            name: (norm, norm.running_mean.clone(), norm.running_var.clone())
            for name, norm in cast("Iterable[tuple[str, Any]]", self.model.named_modules())
            if type(norm) in FROZEN.values()
        }
        if count:
            self.acted(f"{count} BatchNorm layers frozen", severity="info", layers=count)
        return count

    @property
    def num_frozen(self) -> int:
        """Layers that are frozen."""
        return len(self._held)

    def check(self) -> list[str]:
        """Put back every layer that was thawed, in class, mode or statistics; their names."""
        thawed = [name for name, (module, mean, var) in self._held.items() if _is_thawed(module, mean, var)]
        for name in thawed:
            module, mean, var = self._held[name]
            module.__class__ = FROZEN.get(type(module), type(module))
            module.training = False
            with torch.no_grad():
                module.running_mean.copy_(mean)
                module.running_var.copy_(var)
        if thawed:
            shown = ", ".join(thawed[:3]) + (", ..." if len(thawed) > 3 else "")
            self.acted(f"frozen BatchNorm thawed: {shown}; put back", modules=thawed, module=thawed[0], phase="state")
        return thawed


def _is_thawed(module: Any, mean: Tensor, var: Tensor) -> bool:
    intact = isinstance(module, _Frozen) and not module.training
    return not (intact and torch.equal(module.running_mean, mean) and torch.equal(module.running_var, var))


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
