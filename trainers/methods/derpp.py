"""DER++ (Buzzega et al., 2020), as Mammoth does it: two independent draws, logits of the training forward stored."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from trainers.batch import Batch
from trainers.methods.replaying import Replaying
from trainers.methods.sgd import Draws


class Derpp(Replaying):
    """DER plus cross-entropy on stored labels."""

    def draws(self, probabilities: Tensor | None) -> Draws:
        """A draw a term, independent of each other unless one is to serve both."""
        first = self.replay(probabilities)
        return Draws(first, first if self.config.draws == 1 else self.replay(probabilities))

    def losses(self, batch: Batch, logits: Tensor, draws: Draws | None) -> dict[str, Tensor]:
        """Cross-entropy on the batch, distillation on one draw, cross-entropy on the other."""
        terms = super().losses(batch, logits, draws)
        if draws is None:
            return terms
        alpha, beta = self.weights(batch.task)
        outputs = self.predict(draws.kd)
        terms["kd"] = alpha * self.distillation(outputs, draws.kd)
        outputs = outputs if draws.ce is draws.kd else self.predict(draws.ce)
        terms["replay_ce"] = beta * cross_entropy(outputs, draws.ce.labels)
        return terms | self.penalties(batch, logits, draws, outputs)

    def penalties(self, batch: Batch, logits: Tensor, draws: Draws, replayed: Tensor) -> dict[str, Tensor]:
        """Further terms, given the logits of batch and replay."""
        return {}
