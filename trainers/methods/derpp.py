"""DER++ (Buzzega et al., 2020), as Mammoth does it: two independent draws, logits of the training forward stored."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, mse_loss

from stabilitykit.errors import UsageError
from trainers.batch import Batch, Replay
from trainers.guards import linear_to_half
from trainers.importance import heuristic_importance

if TYPE_CHECKING:
    from trainers.buffer import ReplayBuffer
    from trainers.precision import Precision
    from trainers.stream import Transform

Distillation = Literal["mse", "kl"]


@dataclass(frozen=True, kw_only=True)
class DerppConfig:
    """The replay terms.

    Attributes:
        alpha: weight of the distillation towards stored logits.
        beta: weight of the cross-entropy on replays.
        kd: `mse` over all logits (the paper), or `kl` at `temperature`; alpha does not carry over between them.
        temperature: of `kl`.
        warmup_tasks: tasks without replay: 1 begins to rehearse when there is something to forget.
        adaptive: let alpha and beta fall to one half by the last task (guard 8).
    """

    alpha: float = 0.3
    beta: float = 0.5
    kd: Distillation = "mse"
    temperature: float = 2.0
    warmup_tasks: int = 0
    adaptive: bool = False

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"--{name}: got {getattr(self, name)}, expected a finite number, 0 or more")
        if self.warmup_tasks < 0:
            raise UsageError(f"--replay_warmup_tasks: got {self.warmup_tasks}, expected 0 or more")
        if self.kd not in get_args(Distillation):
            raise UsageError(f"--kd: got {self.kd!r}, expected mse or kl")
        if not 0 < self.temperature < math.inf:
            raise UsageError(f"--kd_temperature: got {self.temperature}, expected a finite number above 0")


class Draws(NamedTuple):
    """What a step replays: one draw a term, independent of each other."""

    kd: Replay
    ce: Replay


class Derpp:
    """The phases of a step that make it DER++."""

    def __init__(
        self,
        network: nn.Module,
        buffer: ReplayBuffer,
        transform: Transform,
        precision: Precision,
        config: DerppConfig,
        num_tasks: int,
    ) -> None:
        self.network = network
        self.buffer = buffer
        self.transform = transform
        self.precision = precision
        self.config = config
        self.num_tasks = num_tasks

    def draw(self, task: int) -> Draws | None:
        """Two independent draws, augmented afresh; nothing while the buffer is empty, or the warm-up lasts."""
        if not self.buffer or task < self.config.warmup_tasks:
            return None
        probabilities = self.probabilities(task)
        return Draws(self.replay(probabilities), self.replay(probabilities))

    def probabilities(self, task: int) -> Tensor | None:
        """How likely each slot is drawn; None for evenly."""
        return None

    def replay(self, probabilities: Tensor | None) -> Replay:
        """One draw."""
        slots = self.buffer.draw(probabilities)
        inputs = self.transform(self.buffer.examples[slots])
        return Replay(slots, inputs, self.buffer.labels[slots], self.buffer.logits[slots])

    def forward(self, batch: Batch) -> Tensor:
        """Logits of the batch."""
        with self.precision.stream():
            logits: Tensor = self.network(batch.inputs)
        return logits

    def losses(self, batch: Batch, logits: Tensor, draws: Draws | None) -> dict[str, Tensor]:
        """The terms of the loss, weighted, so that their sum is the loss."""
        terms = {"ce": cross_entropy(logits.float(), batch.labels)}
        if draws is not None:
            alpha, beta = self.weights(batch.task)
            terms["kd"] = alpha * self.distillation(draws.kd)
            terms["replay_ce"] = beta * self.rehearsal(draws.ce)
        return terms

    def weights(self, task: int) -> tuple[float, float]:
        """Alpha and beta in `task`."""
        share = linear_to_half(task, self.num_tasks) if self.config.adaptive else 1.0
        return self.config.alpha * share, self.config.beta * share

    def distillation(self, replay: Replay) -> Tensor:
        """How far the network has moved from the logits it once gave."""
        with self.precision.replay():
            logits = self.network(replay.inputs)
        if self.config.kd == "mse":
            return mse_loss(logits.float(), replay.logits)
        student = (logits.float() / self.config.temperature).log_softmax(1)
        teacher = (replay.logits / self.config.temperature).log_softmax(1)
        return self.config.temperature**2 * kl_div(student, teacher, reduction="batchmean", log_target=True)

    def rehearsal(self, replay: Replay) -> Tensor:
        """Cross-entropy on stored labels."""
        with self.precision.replay():
            logits = self.network(replay.inputs)
        return cross_entropy(logits.float(), replay.labels)

    def insert(self, batch: Batch, logits: Tensor) -> None:
        """Offer the batch to the buffer, with the logits of its training forward (before the update)."""
        detached = logits.detach().float()
        importance = heuristic_importance(detached, batch.labels)
        self.buffer.insert(batch.examples, batch.labels, detached, importance, batch.task)
