"""Causal-DER: DER++ whose draws lean towards the samples that matter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from stabilitykit.errors import UsageError
from stabilitykit.guards import Isolation, isolated
from trainers.batch import Batch
from trainers.graph import Order, task_graph, task_responses
from trainers.importance import (
    blended_probabilities,
    effective_classes,
    effective_share,
    head_influence,
    heuristic_importance,
    ranked,
    warmed_up,
)
from trainers.intervention import Intervention, Samples
from trainers.irm import irm_penalty
from trainers.methods.derpp import Derpp
from trainers.methods.sgd import Draws

NONE, HEURISTIC, HYBRID, INTERVENTIONAL, INFLUENCE = range(5)
Balance = Literal["none", "class", "past"]


@dataclass(frozen=True, kw_only=True)
class CausalConfig:
    """How the draws are weighed.

    Attributes:
        mode: importance, 0 none, 1 heuristic, 2 hybrid, 3 interventional, 4 influence.
        weight: blend between even draws (0) and draws by importance (1).
        warmup_tasks: tasks over which the blend grows.
        balance: what importance decides among: `none`, all stored samples; `class`, those of a class, each class with
            the same share; `past`, as `class` without those of the present task, which the stream shows anyway.  With
            mode 0 samples of a class are then drawn evenly.
        refresh_every: steps between scorings of the whole buffer with the present network (modes 1 and 4); 0 keeps the
            heuristic scores the samples came with.
        interval: steps between interventions (modes 2 and 3), from the second task on.
        num_interventions: candidates an evaluation intervenes on.
        hybrid_candidates: slots of which mode 2 intervenes on those nearest, by features, to the batch.
        num_probes: stored samples an effect is measured on, never candidates themselves.
        micro_steps: steps an intervention takes.
        step_size: of an intervention; 0 for the optimizer's own.
        graph: fit the task graph when a task ends.
        graph_order: `temporal`, or `free` to let NOTEARS find the order of the tasks.
        graph_sparsity: weight of the graph's L1 penalty.
        irm_weight: of the IRMv1 penalty over the batch and the tasks in the replay.
        isolate: score without touching the model (guard 5); False scores in whatever mode the model is, as the first
            versions did, so that every scoring moves BatchNorm's statistics.
    """

    mode: int = HEURISTIC
    weight: float = 0.3
    warmup_tasks: int = 2
    balance: Balance = "none"
    refresh_every: int = 25
    interval: int = 50
    num_interventions: int = 32
    hybrid_candidates: int = 128
    num_probes: int = 64
    micro_steps: int = 1
    step_size: float = 0.0
    graph: bool = True
    graph_order: Order = "temporal"
    graph_sparsity: float = 0.1
    irm_weight: float = 0.0
    isolate: bool = True

    FLAGS: ClassVar[dict[str, str]] = {
        "warmup_tasks": "causal_warmup_tasks",
        "refresh_every": "importance_refresh",
        "interval": "causal_eval_interval",
        "num_interventions": "causal_num_interventions",
        "hybrid_candidates": "causal_hybrid_candidates",
        "num_probes": "causal_num_probes",
        "micro_steps": "true_micro_steps",
    }

    def __post_init__(self) -> None:
        if self.mode not in range(5):
            raise UsageError(
                f"--use_causal_sampling: got {self.mode}, expected 0 (none), 1 (heuristic), 2 (hybrid), "
                "3 (interventional) or 4 (influence)"
            )
        if not 0 <= self.weight <= 1:
            raise UsageError(f"--causal_weight: got {self.weight}, expected 0 to 1")
        for name, flag in self.FLAGS.items():
            least = 0 if name in ("warmup_tasks", "refresh_every") else 1
            if getattr(self, name) < least:
                raise UsageError(f"--{flag}: got {getattr(self, name)}, expected {least} or more")
        for flag, value in (
            ("true_temp_lr", self.step_size),
            ("graph_sparsity", self.graph_sparsity),
            ("irm_weight", self.irm_weight),
        ):
            if not 0 <= value < math.inf:
                raise UsageError(f"--{flag}: got {value}, expected a finite number, 0 or more")
        if self.balance not in get_args(Balance):
            raise UsageError(f"--causal_balance: got {self.balance!r}, expected none, class or past")
        if self.graph_order not in get_args(Order):
            raise UsageError(f"--graph_order: got {self.graph_order!r}, expected temporal or free")


class CausalDer(Derpp):
    """DER++ with blended sampling.

    Scores live in `buffer.importance`; a generator of their own chooses candidates and probes, so that scoring shifts
    no other draw.  `num_bad_scores` counts scores that were not finite; they weigh as the least important.
    """

    def __init__(
        self,
        *parts: Any,
        causal: CausalConfig,
        generator: torch.Generator,
        lr: Callable[[Batch], float],
    ) -> None:
        super().__init__(*parts)
        self.causal = causal
        self.generator = generator
        self.lr = lr
        self.twin = copy.deepcopy(self.network).eval()
        self.num_bad_scores = 0
        self.isolation = Isolation(self.network) if causal.isolate else None

    def probabilities(self, batch: Batch) -> Tensor | None:
        """The blend of even draws and draws by importance; None (evenly) while it weighs nothing."""
        if self.is_due(batch):
            self.buffer.quarantine()  # a score looks at every slot, and one bad label would end the run
            if self.buffer:
                self.refresh(batch)
        weight = self.blend(batch.task)
        return self.blended(weight, batch.task) if weight and self.buffer else None

    def blend(self, task: int) -> float:
        """Share of the draws that goes by importance."""
        weighs = self.causal.mode or self.causal.balance != "none"
        return warmed_up(self.causal.weight, task, self.causal.warmup_tasks) if weighs else 0.0

    def blended(self, weight: float, task: int) -> Tensor:
        """Probabilities of the slots in `task`."""
        scores = self.buffer.importance if self.causal.mode else torch.ones(len(self.buffer))
        if self.causal.balance == "none":
            return blended_probabilities(scores, weight)
        groups = self.buffer.labels
        if self.causal.balance == "past":
            groups = groups.where(self.buffer.task_labels != task, -1)
        return blended_probabilities(scores, weight, groups)

    def is_due(self, batch: Batch) -> bool:
        """Whether it is time to score."""
        if self.causal.mode in (HYBRID, INTERVENTIONAL):
            return batch.task > 0 and len(self.buffer) > 1 and self.buffer.num_steps % self.causal.interval == 0
        every = self.causal.refresh_every
        return bool(self.causal.mode and every) and self.buffer.num_steps % every == 0

    def refresh(self, batch: Batch) -> None:
        """Score stored samples with the present network."""
        if self.causal.mode in (HYBRID, INTERVENTIONAL):
            slots, effects = self.intervene(batch)
            scores = ranked(-effects)
        else:
            slots = torch.arange(len(self.buffer))
            scores = self.score()
        self.num_bad_scores += len(scores) - int(scores.isfinite().sum())
        self.buffer.importance[slots] = scores.float()

    def score(self) -> Tensor:
        """Scores of the whole buffer, from one forward."""
        with self.aside():
            features = self.network.features(self.inputs(slice(None)))
            logits = self.network.classifier(features)
        if self.causal.mode == INFLUENCE:
            return ranked(-head_influence(features, logits, self.buffer.labels))
        return heuristic_importance(logits, self.buffer.labels)

    def aside(self) -> AbstractContextManager[None]:
        """Around forwards that only look."""
        return torch.no_grad() if self.isolation is None else self.isolation()

    def inputs(self, slots: Tensor | slice) -> Tensor:
        """Stored examples as evaluation would see them: no augmentation, so no random number."""
        return self.transform.normalise(self.buffer.examples[slots])

    def samples(self, slots: Tensor) -> Samples:
        """Stored samples of some slots."""
        return Samples(self.inputs(slots), self.buffer.labels[slots])

    def intervene(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Candidates' slots and their effects on probes that are none of them."""
        order = torch.randperm(len(self.buffer), generator=self.generator)
        hybrid = self.causal.mode == HYBRID
        count = self.causal.hybrid_candidates if hybrid else self.causal.num_interventions
        count = min(count, max(1, len(order) // 2))
        candidates, probes = order[:count], order[count : count + self.causal.num_probes]
        if hybrid:
            candidates = self.nearest(candidates, batch)
        intervention = Intervention(
            self.twin,
            self.network,
            step=Samples(batch.inputs, batch.labels),
            probes=self.samples(probes),
            lr=self.causal.step_size or self.lr(batch),
            micro_steps=self.causal.micro_steps,
        )
        return candidates, intervention.effects(self.samples(candidates)).detach()

    def nearest(self, slots: Tensor, batch: Batch) -> Tensor:
        """The slots whose features point the way the batch's do: what the step is about to overwrite."""
        with self.aside():
            stored = self.network.features(self.inputs(slots))
            present = self.network.features(batch.inputs).mean(0, keepdim=True)
        closest = cosine_similarity(stored, present).argsort(descending=True)
        return slots[closest[: self.causal.num_interventions]]

    def importance(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The heuristic: samples have a score before the first refresh."""
        return heuristic_importance(logits, labels)

    def penalties(self, batch: Batch, logits: Tensor, draws: Draws, replayed: Tensor) -> dict[str, Tensor]:
        """The IRM penalty, if it weighs anything: the batch and every task in the replay are its environments."""
        if not self.causal.irm_weight:
            return {}
        environments = [(logits.float(), batch.labels)]
        for task in sorted(set(draws.ce.tasks.tolist())):
            rows = draws.ce.tasks == task
            environments.append((replayed[rows], draws.ce.labels[rows]))
        return {"irm": self.causal.irm_weight * irm_penalty(environments)}

    def end_task(self, task: int) -> dict[str, Any]:
        """How far from even the draws are by now, over samples and over classes, and the task graph."""
        if not self.buffer:
            return {}
        probabilities, labels = self.blended(self.blend(task), task), self.buffer.labels
        facts: dict[str, Any] = {
            "effective_share": effective_share(probabilities),
            "effective_classes": effective_classes(probabilities, labels),
            "effective_classes_stored": effective_classes(torch.ones_like(probabilities), labels),
        }
        graph = self.task_graph(task)
        return facts | ({} if graph is None else {"task_graph": graph.tolist()})

    def task_graph(self, task: int) -> Tensor | None:
        """The graph over the tasks learnt so far, all as the present network sees the buffer; None where undefined."""
        if not self.causal.graph or self.classes_of is None or task == 0:
            return None
        with isolated(self.network):
            responses = task_responses(
                self.network(self.inputs(slice(None))), list(map(self.classes_of, range(task + 1)))
            )
        if not responses.isfinite().all():
            return None
        return task_graph(responses, self.causal.graph_sparsity, self.causal.graph_order)

    def state_dict(self) -> dict[str, Any]:
        """The scoring's own generator and counter."""
        return {"generator": self.generator.get_state(), "num_bad_scores": self.num_bad_scores}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put them back."""
        self.generator.set_state(state["generator"])
        self.num_bad_scores = state["num_bad_scores"]
