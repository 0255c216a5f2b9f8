"""The replay buffer: examples with the logits the network gave them, as a structure of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabilitykit.errors import UsageError
from stabilitykit.guards import BufferSanitiser
from trainers.policies import POLICIES

TENSORS = ("examples", "labels", "logits", "task_labels", "importance", "uids", "inserted_steps")
REPLAYED = ("examples", "labels", "logits", "task_labels")
COUNTERS = ("filled", "n_seen", "num_steps")


@dataclass(frozen=True, kw_only=True)
class BufferConfig:
    """How much is kept, and what is let in.

    Attributes:
        size: slots.
        minibatch_size: samples a draw.
        policy: which offers a full buffer takes: `reservoir`, `class_balanced` or `importance`.
        sanitise: refuse rows whose example, logits or label is impossible, and look at what is drawn (guard 4).
        clamp_logits: clamp stored logits to this magnitude; 0 stores them as they are, since a clamped teacher pulls
            every larger student logit down.
        audit_every: look through the whole buffer every so many steps and drop what is not finite; 0 never.
    """

    size: int = 200
    minibatch_size: int = 32
    policy: str = "reservoir"
    sanitise: bool = True
    clamp_logits: float = 0.0
    audit_every: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise UsageError(f"--buffer_size: got {self.size}, expected 1 or more")
        if self.minibatch_size < 1:
            raise UsageError(f"--minibatch_size: got {self.minibatch_size}, expected 1 or more")
        if self.policy not in POLICIES:
            raise UsageError(f"--buffer_policy: got {self.policy!r}, expected one of {', '.join(POLICIES)}")
        if not 0 <= self.clamp_logits < math.inf:
            raise UsageError(f"--clamp_logits: got {self.clamp_logits}, expected 0 (off) or a positive magnitude")
        if self.audit_every < 0:
            raise UsageError(f"--buffer_audit_every: got {self.audit_every}, expected 0 (off) or a number of steps")


class ReplayBuffer:
    """Slots filled by a policy; by default a reservoir, which holds every offer with the same probability.

    `examples, labels, logits, task_labels, importance, uids, inserted_steps` are views of the filled slots, first
    dimension = slot.  `uids` number the offers of the run and are never reused; `num_steps` counts insertions and is
    the clock of whatever happens every so many steps.  `preprocess` turns stored examples into the network's input, for
    whoever compares the network with the stored logits.
    """

    examples: Tensor
    labels: Tensor
    logits: Tensor
    task_labels: Tensor
    importance: Tensor
    uids: Tensor
    inserted_steps: Tensor

    def __init__(
        self, config: BufferConfig, shape: tuple[int, ...], num_classes: int, generator: torch.Generator
    ) -> None:
        self.config = config
        self.capacity = config.size
        self.generator = generator
        self.policy = POLICIES[config.policy](num_classes)
        self.preprocess: Callable[[Tensor], Tensor] | None = None
        self.filled = self.n_seen = self.num_steps = 0
        self.sanitiser = BufferSanitiser(num_classes=num_classes) if config.sanitise else None
        self.storage = {
            "examples": torch.zeros(config.size, *shape),
            "labels": torch.zeros(config.size, dtype=torch.int64),
            "logits": torch.zeros(config.size, num_classes),
            "task_labels": torch.zeros(config.size, dtype=torch.int64),
            "importance": torch.zeros(config.size),
            "uids": torch.zeros(config.size, dtype=torch.int64),
            "inserted_steps": torch.zeros(config.size, dtype=torch.int64),
            "keys": torch.zeros(config.size, dtype=torch.float64),
        }

    def __getattr__(self, name: str) -> Tensor:
        if name not in TENSORS:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return self.storage[name][: self.filled]

    def __len__(self) -> int:
        return self.filled

    def draw(self, probabilities: Tensor | None = None) -> Tensor:
        """Slots of one minibatch, without replacement: uniform, or by `probabilities` over the filled slots."""
        return self.sample(probabilities)["slots"]

    def sample(self, probabilities: Tensor | None = None) -> dict[str, Tensor]:
        """What lies in the slots of one draw, gathered once: `slots` and a copy of the columns a replay needs."""
        if probabilities is not None and len(probabilities) != self.filled:
            probabilities = None  # the draw before has dropped slots
        if probabilities is not None and self.sanitiser is not None:
            probabilities = self.sanitiser.weights(probabilities)
        rows = self.gather(self.choose(probabilities))
        if self.is_sound(rows):
            return rows
        self.quarantine()
        return self.gather(self.choose(None))  # what the probabilities spoke of has moved

    def gather(self, slots: Tensor) -> dict[str, Tensor]:
        """Copies of what lies in `slots`."""
        return {"slots": slots} | {name: self.storage[name].index_select(0, slots) for name in REPLAYED}

    def choose(self, probabilities: Tensor | None) -> Tensor:
        """Slots as they fall."""
        count = min(self.config.minibatch_size, self.filled)
        if probabilities is None:
            return torch.randperm(self.filled, generator=self.generator)[:count]
        return torch.multinomial(probabilities, count, generator=self.generator)

    def insert(self, examples: Tensor, labels: Tensor, logits: Tensor, importance: Tensor, task: int) -> None:
        """Offer a batch: un-augmented examples and the logits of the training forward, before the update."""
        rows = self.admitted(examples, labels, logits)
        accepted = self.policy.accept(self, labels.index_select(0, rows), importance.index_select(0, rows))
        if accepted:
            slots = torch.tensor(list(accepted), dtype=torch.int64)
            offers = torch.tensor(list(accepted.values()), dtype=torch.int64)
            limit = self.config.clamp_logits
            columns = {
                "examples": examples,
                "labels": labels,
                "logits": logits.clamp(-limit, limit) if limit else logits,
                "importance": importance,
            }
            for name, values in columns.items():
                stored = self.storage[name]
                stored.index_copy_(0, slots, values.index_select(0, rows[offers]).to(stored.dtype))
            self.storage["task_labels"].index_fill_(0, slots, task)
            self.storage["uids"].index_copy_(0, slots, self.n_seen - len(rows) + offers)
            self.storage["inserted_steps"].index_fill_(0, slots, self.num_steps)
        self.num_steps += 1

    def admitted(self, examples: Tensor, labels: Tensor, logits: Tensor) -> Tensor:
        """Rows that may be stored."""
        if self.sanitiser is None:
            return torch.arange(len(examples))
        return self.sanitiser.admit(examples=examples, labels=labels, logits=logits)

    def is_sound(self, rows: dict[str, Tensor]) -> bool:
        """Whether gathered rows may be replayed; always without a sanitiser."""
        if self.sanitiser is None:
            return True
        return self.sanitiser.is_sound(examples=rows["examples"], labels=rows["labels"], logits=rows["logits"])

    def audit(self) -> int:
        """Look through the whole buffer, if an audit is due; the number of slots dropped."""
        every = self.config.audit_every
        return 0 if not every or self.num_steps % every else self.quarantine()

    def quarantine(self) -> int:
        """Drop every slot that is not sound; the number dropped.

        The last filled slots move into the holes, and the next offers are taken for certain: the law holds again once
        the buffer has been refilled.
        """
        if self.sanitiser is None:
            return 0
        stored = {name: getattr(self, name) for name in ("examples", "labels", "logits", "uids")}
        bad = self.sanitiser.audit(**stored)
        kept = torch.ones(self.filled, dtype=torch.bool).index_fill_(0, bad, False).nonzero().flatten()
        if len(bad):
            for tensor in self.storage.values():
                tensor[: len(kept)] = tensor[kept]
            self.filled = len(kept)
        return len(bad)

    def state_dict(self) -> dict[str, Any]:
        """Everything a step changes; tensors by reference, as PyTorch does."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        return self.storage | self.policy.state() | counters | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put a state back, in place."""
        for name, tensor in (self.storage | self.policy.state()).items():
            tensor.copy_(state[name])
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.generator.set_state(state["generator"])
