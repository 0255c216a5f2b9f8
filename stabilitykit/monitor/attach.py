"""attach(): the arguments checked once, then a Monitor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from stabilitykit.config import ON_NONFINITE, MonitorConfig
from stabilitykit.errors import UsageError
from stabilitykit.monitor.aftermath import as_path, new_run_dir
from stabilitykit.monitor.faults import OnNonFinite
from stabilitykit.monitor.monitor import Monitor
from stabilitykit.monitor.unwrapped import refuse_to_act_alone


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    run_dir: str | Path | None = None,
    *,
    config: MonitorConfig | str | None = None,
    on_nonfinite: OnNonFinite = "raise",
    scaler: Any = None,
    stateful: Sequence[object] = (),
    replay_buffer: object | None = None,
) -> Monitor:
    """Watch a training run from here on.

    Args:
        model: the network; hooks go onto it and come off at `close`.
        optimizer: one, or a sequence of them. One that is made later, for the next task say, is noticed when it first
            steps parameters of the model.
        run_dir: the run folder, made if need be; default `runs/<time>`.
        config: a MonitorConfig or the name of a preset: light, default, full.
        on_nonfinite: `raise` NonFiniteError with the verdict; `skip`: undo the step and go on; `rollback`: back to the
            last good snapshot and go on; `record`: diagnose and leave training exactly as it would have been. With
            several processes in torch.distributed no step is run again, and `skip` and `rollback` are refused.
        scaler: a GradScaler, put back with the rest when a step is replayed.
        stateful: what else a step changes: objects with `state_dict` and `load_state_dict`, generators, tensors.
        replay_buffer: an object or mapping with tensors `examples, labels, logits`, audited and put back on replay.
            With a callable `preprocess`, which turns stored examples into the model's input, the drift of the model
            from the stored logits is recorded too, on a copy of the model.

    Returns:
        The Monitor; also a context manager that closes itself.

    Raises:
        UsageError: an argument that cannot be right.
        RunFolderError: the run folder holds another run, or cannot be written.
    """
    if on_nonfinite not in ON_NONFINITE:
        raise UsageError(f"attach: got on_nonfinite={on_nonfinite!r}, expected one of {', '.join(ON_NONFINITE)}")
    refuse_to_act_alone(on_nonfinite)
    if not isinstance(model, nn.Module):
        raise UsageError(f"attach: got a {type(model).__name__} as model, expected a torch.nn.Module")
    if not isinstance(optimizer, Optimizer | Sequence | None):
        raise UsageError(
            f"attach: got a {type(optimizer).__name__} as optimizer, expected a torch.optim.Optimizer or a sequence"
        )
    if not isinstance(stateful, Sequence) or any(entry is None for entry in stateful):
        raise UsageError(f"attach: got stateful={stateful!r:.60}, expected a sequence of objects with state_dict")
    given = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer or ())
    optimizers = tuple(map(_followed, given))
    also = tuple(map(_followed, (entry for entry in stateful if isinstance(entry, Optimizer))))
    return Monitor(
        model,
        (*optimizers, *(entry for entry in also if entry not in optimizers)),
        new_run_dir() if run_dir is None else as_path(run_dir),
        config=MonitorConfig.of(config),
        on_nonfinite=on_nonfinite,
        scaler=scaler,
        stateful=[entry for entry in stateful if not isinstance(entry, Optimizer)],
        replay_buffer=replay_buffer,
    )


def _followed(optimizer: object) -> Optimizer:
    """The optimizer that steps: the inner one where a wrapper, as Accelerate's, is one by its class alone."""
    if not isinstance(optimizer, Optimizer):
        name = type(optimizer).__name__
        raise UsageError(f"attach: got {name} as optimizer, expected a torch.optim.Optimizer or a sequence of them")
    if hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return optimizer
    if isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        return _followed(inner)
    raise UsageError(
        f"attach: got a {type(optimizer).__name__} that has not called Optimizer.__init__ as optimizer, expected one "
        "that takes hooks; give the optimizer that it wraps"
    )
