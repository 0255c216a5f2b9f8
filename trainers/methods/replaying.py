"""What the replay methods share: one or two draws, their weights, insertion; and the first of them, ER and DER."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, mse_loss

from trainers.batch import Batch, Replay
from trainers.importance import heuristic_importance
from trainers.methods.sgd import Draws, Sgd


class Replaying(Sgd):
    """A method with a buffer."""

    def draw(self, batch: Batch) -> Draws | None:
        """Draws from the buffer, augmented afresh; nothing while it is empty, or the warm-up lasts."""
        if not self.buffer or batch.task < self.config.warmup_tasks:
            return None
        draws = self.draws(self.probabilities(batch))
        return draws if self.buffer else None  # a draw may find that nothing stored is fit to be replayed

    def draws(self, probabilities: Tensor | None) -> Draws:
        """One draw for the method's one term."""
        replay = self.replay(probabilities)
        return Draws(replay, replay)

    def probabilities(self, batch: Batch) -> Tensor | None:
        """How likely each slot is drawn; None for evenly."""
        return None

    def replay(self, probabilities: Tensor | None) -> Replay:
        """One draw."""
        rows = self.buffer.sample(probabilities)
        inputs = self.transform(rows["examples"])
        return Replay(rows["slots"], inputs, rows["labels"], rows["logits"], rows["task_labels"])

    def predict(self, replay: Replay) -> Tensor:
        """Logits of a draw, in float32."""
        with self.precision.replay():
            logits: Tensor = self.network(replay.inputs)
        return logits.float()

    def weights(self, task: int) -> tuple[float, float]:
        """Alpha and beta in `task`."""
        alpha, beta = self.config.alpha, self.config.beta
        return (alpha, beta) if self.adaptive is None else self.adaptive(task, alpha, beta)

    def distillation(self, logits: Tensor, replay: Replay) -> Tensor:
        """How far the network has moved from the logits it once gave."""
        if self.config.kd == "mse":
            return mse_loss(logits, replay.logits)
        student = (logits / self.config.temperature).log_softmax(1)
        teacher = (replay.logits / self.config.temperature).log_softmax(1)
        return self.config.temperature**2 * kl_div(student, teacher, reduction="batchmean", log_target=True)

    def insert(self, batch: Batch, logits: Tensor) -> None:
        """Offer the batch to the buffer, with the logits of its training forward."""
        detached = logits[: len(batch.labels)].detach().float()
        self.buffer.insert(batch.examples, batch.labels, detached, self.importance(detached, batch.labels), batch.task)

    def importance(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What a sample is stored with; computed where somebody asks for it."""
        wanted = self.buffer.config.policy == "importance"
        return heuristic_importance(logits, labels) if wanted else logits.new_zeros(len(labels))


class Er(Replaying):
    """Experience replay, as Mammoth has it: batch and replay in one forward, one cross-entropy over both."""

    def forward(self, batch: Batch, draws: Draws | None) -> Tensor:
        """Logits of the batch, then of the replay."""
        if draws is None:
            return super().forward(batch, draws)
        with self.precision.stream():
            logits: Tensor = self.network(torch.cat([batch.inputs, draws.ce.inputs]))
        return logits

    def losses(self, batch: Batch, logits: Tensor, draws: Draws | None) -> dict[str, Tensor]:
        """One cross-entropy."""
        labels = batch.labels if draws is None else torch.cat([batch.labels, draws.ce.labels])
        return {"ce": cross_entropy(self.decidable(batch, logits), labels)}


class Der(Replaying):
    """DER (Buzzega et al., 2020): distillation towards the stored logits; stored labels are not used."""

    def losses(self, batch: Batch, logits: Tensor, draws: Draws | None) -> dict[str, Tensor]:
        """Cross-entropy on the batch, distillation on the replay."""
        terms = super().losses(batch, logits, draws)
        if draws is not None:
            alpha, _ = self.weights(batch.task)
            terms["kd"] = alpha * self.distillation(self.predict(draws.kd), draws.kd)
        return terms
