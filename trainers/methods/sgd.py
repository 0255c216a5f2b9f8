"""Plain SGD: the lower bound, and the base of every method; on all tasks at once it is `joint`, the upper bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from stabilitykit.errors import UsageError
from stabilitykit.guards import AdaptiveReplayWeights, Isolation, linear_to_half, unchanged
from trainers.batch import Batch, Replay
from trainers.guarding import GuardMode, check_mode

if TYPE_CHECKING:
    from trainers.buffer import ReplayBuffer
    from trainers.networks import Network
    from trainers.precision import Precision
    from trainers.stream import Transform

Distillation = Literal["mse", "kl"]


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """The replay terms.

    Attributes:
        alpha: weight of the distillation towards stored logits (der, derpp, causal-der).
        beta: weight of the cross-entropy on replays (derpp, causal-der).
        kd: `mse` over all logits (the paper), or `kl` at `temperature`; alpha does not carry over between them.
        temperature: of `kl`.
        draws: 2 independent draws, one a term (the paper), or 1 that both terms share, at two thirds of the cost.
        warmup_tasks: tasks without replay: 1 begins to rehearse when there is something to forget.
        asymmetric_ce: the cross-entropy on the stream leaves the classes of earlier tasks out (ER-ACE: Caccia et al.,
            2022), so that learning new classes does not push old ones down; replays decide among all of them.
        adaptive: guard 8: `on` lets alpha and beta fall to one half by the last task, `hold` keeps them.
    """

    alpha: float = 0.3
    beta: float = 0.5
    kd: Distillation = "mse"
    temperature: float = 2.0
    draws: int = 2
    warmup_tasks: int = 0
    asymmetric_ce: bool = False
    adaptive: GuardMode = "off"

    def __post_init__(self) -> None:
        check_mode("adaptive_replay_weights", self.adaptive)
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"--{name}: got {getattr(self, name)}, expected a finite number, 0 or more")
        if self.warmup_tasks < 0:
            raise UsageError(f"--replay_warmup_tasks: got {self.warmup_tasks}, expected 0 or more")
        if self.kd not in get_args(Distillation):
            raise UsageError(f"--kd: got {self.kd!r}, expected mse or kl")
        if self.draws not in (1, 2):
            raise UsageError(f"--replay_draws: got {self.draws}, expected 1 or 2")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"--kd_temperature: got {self.temperature}, expected a finite number above 0")


class Draws(NamedTuple):
    """What a step replays: a draw for the distillation, one for the cross-entropy; the same object where shared."""

    kd: Replay
    ce: Replay


class Sgd:
    """The phases of a step that a method decides: what it replays, its loss, what it stores.  Here: nothing but CE.

    `classes_of` gives the classes of each task where tasks have their own.
    """

    def __init__(
        self,
        network: Network,
        buffer: ReplayBuffer,
        transform: Transform,
        precision: Precision,
        config: ReplayConfig,
        num_tasks: int,
        classes_of: Callable[[int], range] | None = None,
    ) -> None:
        self.network = network
        self.buffer = buffer
        self.transform = transform
        self.precision = precision
        self.config = config
        self.num_tasks = num_tasks
        self.classes_of = classes_of
        self.isolation: Isolation | None = None  # of computations on the side, where a method has some
        share = linear_to_half if config.adaptive == "on" else unchanged
        self.adaptive = AdaptiveReplayWeights(num_tasks, share=share) if config.adaptive != "off" else None

    def draw(self, batch: Batch) -> Draws | None:
        """What the step replays; None for nothing."""
        return None

    def forward(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Logits of the batch."""
        with self.precision.stream():
            logits: Tensor = self.network(batch.inputs)
        return logits

    def losses(self, batch: Batch, logits: Tensor, draws: Draws | None) -> dict[str, Tensor]:
        """The terms of the loss, weighted, so that their sum is the loss."""
        return {"ce": cross_entropy(self.decidable(batch, logits), batch.labels)}

    def decidable(self, batch: Batch, logits: Tensor) -> Tensor:
        """Logits as the cross-entropy sees them, in float32: those of the batch, then those of a replay if any."""
        logits = logits.float()
        if not self.config.asymmetric_ce or self.classes_of is None:
            return logits
        left = logits.clone()
        left[: len(batch.labels), : self.classes_of(batch.task).start] = torch.finfo(left.dtype).min
        return left

    def insert(self, batch: Batch, logits: Tensor) -> None:
        """Store what later steps replay, with the logits of the training forward (before the update)."""

    def end_task(self, task: int) -> dict[str, Any]:
        """A task has been learnt; facts worth a place in the results."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a method changes besides network and buffer."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put that back."""
