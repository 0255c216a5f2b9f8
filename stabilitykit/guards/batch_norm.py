"""Guard 3: BatchNorm statistics kept sound, or frozen for good, and the train/eval gap that shows their health."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from stabilitykit.errors import UsageError
from stabilitykit.guards.checks import measured
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


STATISTICS = ("running_mean", "running_var")
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
    """Freezes BatchNorm statistics after a task and notices if anything thaws them; until then it keeps them sound.

    `eval()` alone is undone by the next `train()`, and with `track_running_stats=False` set afterwards training and
    evaluation normalise differently. Here the layers stay frozen whatever mode is set:

        freeze = BatchNormFreeze(model)
        for task, loader in enumerate(loaders):
            train(model, loader)  # calls model.train() as often as it likes
            freeze.end_task(task)
        freeze.check()  # between steps: puts back what code has changed by other ways

    Freezing changes what is learnt: scale and shift train against statistics that grow stale, and a learning rate that
    batch statistics held in check may diverge.  With `after_task=None` no layer is ever frozen; running statistics that
    are NaN or Inf, jump, or are reset between two checks are put back to the last sound ones, and nothing else changes.

    Args:
        model: its BatchNorm layers.
        after_task: the task after which to freeze; None to keep statistics sound and freeze nothing.
        max_jump: how much larger than before (and than 1) the norm of a layer's statistics may be a step later.

    Raises:
        UsageError: `max_jump` is not above 1.
    """

    name: ClassVar[str] = "freeze_bn"

    def __init__(
        self,
        model: nn.Module,
        *,
        after_task: int | None = 0,
        max_jump: float = 1e3,
        on_event: object | None = None,
    ) -> None:
        super().__init__(on_event)
        if not max_jump > 1:
            raise UsageError(f"BatchNormFreeze: got max_jump={max_jump}, expected a factor above 1")
        self.model, self.after_task, self.max_jump = model, after_task, max_jump
        self._held: dict[str, tuple[Any, Tensor, Tensor]] = {}  # of frozen layers: module, mean, variance
        self._sound: dict[str, Tensor] = {}  # of the others: the statistics of the last check, and their norms
        self._norms: dict[str, float] = {}
        self._layers: Mapping[str, Any] = {}  # whose they are

    def end_task(self, task: int) -> None:
        """Freeze, if `task` is the one."""
        if task == self.after_task:
            self.freeze()

    def freeze(self) -> int:
        """Freeze now, with the statistics the layers have now; the number of layers frozen by this call."""
        count = freeze_batch_norm(self.model)
        self._held = {
            name: (norm, norm.running_mean.clone(), norm.running_var.clone())
            for name, norm in _batch_norms(self.model)
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
        """Put back every layer that was thawed, in class, mode or statistics, or whose statistics are not sound.

        Returns:
            Names of these layers.
        """
        return self._freeze_again() + self._keep_sound()

    def state_dict(self) -> dict[str, Any]:
        """How often it acted, and the statistics it would go back to."""
        sound = {name: entry.clone() for name, entry in self._sound.items()}
        return super().state_dict() | {"sound": sound, "norms": dict(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put all of it back."""
        super().load_state_dict(state)
        self._norms = dict(state["norms"])
        self._sound = {name: entry.clone() for name, entry in state["sound"].items()}

    def _freeze_again(self) -> list[str]:
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

    def _keep_sound(self) -> list[str]:
        """Look at the layers that are not frozen; those put back."""
        layers = {name: norm for name, norm in _batch_norms(self.model) if name not in self._held}
        statistics = {f"{name}.{kind}": getattr(norm, kind) for name, norm in layers.items() for kind in STATISTICS}
        if not statistics:
            return []
        now = {name: norm for name, _, norm in measured(statistics.items())}
        self._meet(layers, statistics, now)
        bad = {name: reason for name, norm in now.items() if (reason := self._why_unsound(norm, self._norms[name]))}
        spoilt = [name for name in layers if any(f"{name}.{kind}" in bad for kind in STATISTICS)]
        labels = [f"{name}.{kind}" for name in spoilt for kind in STATISTICS]
        with torch.no_grad():
            for label in labels:
                statistics[label].copy_(self._sound[label])
            torch._foreach_copy_([self._sound[label] for label in statistics], list(statistics.values()))
        self._norms |= now | {label: self._norms[label] for label in labels}
        if spoilt:
            first, reason = next(iter(bad.items()))
            message = f"BatchNorm statistics: {first} {reason}; {len(spoilt)} layers put back to the last sound ones"
            self.acted(message, modules=spoilt, module=spoilt[0], tensor=first, phase="state")
        return spoilt

    def _meet(self, layers: Mapping[str, Any], statistics: Mapping[str, Tensor], norms: Mapping[str, float]) -> None:
        """Take the statistics of layers that were not there at the last check for sound."""
        replaced = {name for name, norm in layers.items() if self._layers.get(name, norm) is not norm}
        self._layers = layers
        for label, entry in statistics.items():
            if label not in self._sound or label.rpartition(".")[0] in replaced:
                self._sound[label], self._norms[label] = entry.detach().clone(), norms[label]

    def _why_unsound(self, norm: float, sound: float) -> str:
        """What is wrong with statistics of this norm that had the other one before; empty for nothing."""
        if not math.isfinite(sound):
            return ""  # they never were sound: nothing to go back to
        if not math.isfinite(norm):
            return f"has a norm of {norm}"
        if norm > self.max_jump * max(sound, 1.0):
            return f"jumped from a norm of {sound:.4g} to {norm:.4g}"
        return f"was reset from a norm of {sound:.4g} to 0" if sound and not norm else ""


def _batch_norms(model: nn.Module) -> list[tuple[str, Any]]:
    """Layers with running statistics, by name."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


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
