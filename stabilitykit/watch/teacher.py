"""How far the current model has drifted from the logits a replay buffer stores; called by the auditor."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabilitykit.containers import tensors_of
from stabilitykit.errors import UsageError
from stabilitykit.random_states import RandomStates

Forward = Callable[[Tensor], Any]


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Stored logits against those of the current model.

    Attributes:
        rms: root mean square of the difference, in units of a logit; inf where the current logits are not finite.
        stored_rms: root mean square of the stored logits themselves: a drift of that size says something else.
        agreement: share of the slots in which both rank the same class first.
        num_slots: slots compared.
    """

    rms: float = math.nan
    stored_rms: float = math.nan
    agreement: float = math.nan
    num_slots: int = 0


def teacher_drift(
    model: nn.Module | Forward,
    examples: Tensor,
    logits: Tensor,
    *,
    unfit: Collection[int],
    preprocess: Forward | None,
    sample: int,
) -> Drift:
    """Compare the logits of evenly spaced slots with what the model gives for their examples now.

    A module is copied first and the copy run in eval mode without gradients, so that no weight, running statistic,
    counter, hook or mode of the live one changes; the random streams are put back. Any other callable is called as it
    is: that it changes nothing is up to its author.

    Args:
        model: gives logits [slots, classes] (or a container that holds them first) for examples.
        examples: [slots, ...] as stored.
        logits: [slots, classes] as stored.
        unfit: slots to leave out: their example or logits are not finite.
        preprocess: turns stored examples into the model's input: a normalisation, say.
        sample: at most so many slots.

    Raises:
        UsageError: the module cannot be copied, or gives something that cannot be compared.
    """
    sound = torch.tensor([slot for slot in range(len(examples)) if slot not in unfit], dtype=torch.int64)
    count = min(sample, len(sound))
    if not count:
        return Drift()
    slots = sound[torch.arange(count) * len(sound) // count].to(examples.device)  # chosen without a random stream
    streams = RandomStates.capture()
    try:
        with torch.no_grad():
            run = _bystander(model)
            inputs = examples[slots].to(_device(run, examples))
            current = _first_tensor(run(inputs if preprocess is None else preprocess(inputs)))
    finally:
        streams.restore()
    return _compared(logits[slots.to(logits.device)].detach().to(current.device), current)


def _bystander(model: nn.Module | Forward) -> Forward:
    if not isinstance(model, nn.Module):
        return model
    try:
        return copy.deepcopy(model).eval()
    except Exception as error:
        raise UsageError(
            f"audit_buffer: a {type(model).__name__} could not be copied ({error}), expected a module that "
            "copy.deepcopy takes; pass a callable that leaves the model as it is"
        ) from error


def _device(run: Forward, examples: Tensor) -> torch.device:
    first = next(run.parameters(), None) if isinstance(run, nn.Module) else None
    return examples.device if first is None else first.device


def _first_tensor(returned: Any) -> Tensor:
    for _, tensor in tensors_of(returned):
        return tensor.detach()
    raise UsageError(f"audit_buffer: the model gave a {type(returned).__name__}, expected a tensor of logits")


def _compared(stored: Tensor, current: Tensor) -> Drift:
    rows = stored.dim() == current.dim() == 2
    now = current[:, : stored.shape[1]] if rows else current  # a head that has grown keeps its first columns
    if now.shape != stored.shape:
        raise UsageError(
            f"audit_buffer: the model gave logits {list(current.shape)} for {len(stored)} slots, expected "
            f"{list(stored.shape)}, as they are stored; pass the model whose logits these are"
        )
    now, then = now.double(), stored.double()
    difference = float((now - then).square().mean().sqrt())
    return Drift(
        rms=math.inf if math.isnan(difference) else difference,
        stored_rms=float(then.square().mean().sqrt()),
        agreement=float((now.argmax(-1) == then.argmax(-1)).double().mean()) if then.dim() > 1 else math.nan,
        num_slots=len(then),
    )
