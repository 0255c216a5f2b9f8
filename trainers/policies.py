"""Which offers a full buffer takes, and in whose place: a reservoir, a class-balanced one, a weighted one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from trainers.importance import CAP, FLOOR

Slots = dict[int, int]  # slot -> offer of the batch that goes there; the later of two offers for one slot stays


class Held(Protocol):
    """What a policy sees of the buffer, and the clock it moves."""

    capacity: int
    filled: int
    n_seen: int
    generator: torch.Generator
    storage: dict[str, Tensor]


class Reservoir:
    """Vitter's algorithm R: after n offers every one of them is held with probability capacity / n."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def accept(self, held: Held, labels: Tensor, importance: Tensor) -> Slots:
        """Slots of the offers that are taken; every offer counts, taken or not."""
        accepted: Slots = {}
        chances = torch.rand(len(labels), dtype=torch.float64, generator=held.generator).tolist()
        capacity, filled, seen = held.capacity, held.filled, held.n_seen
        for offer, chance in enumerate(chances):
            seen += 1
            slot = filled if filled < capacity else int(chance * seen)
            if slot < capacity:
                accepted[slot] = offer
                filled += filled < capacity
        held.filled, held.n_seen = filled, seen
        return accepted

    def state(self) -> dict[str, Tensor]:
        """What it remembers besides the buffer's slots, by reference."""
        return {}


class ClassBalanced(Reservoir):
    """Class-balancing reservoir sampling (Chrysakis and Moens, 2020): a reservoir within each class.

    A class that was never the largest takes a slot from the largest; one that was competes within itself only.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.class_seen = torch.zeros(num_classes, dtype=torch.int64)
        self.class_full = torch.zeros(num_classes, dtype=torch.bool)

    def accept(self, held: Held, labels: Tensor, importance: Tensor) -> Slots:
        """Slots of the offers that are taken."""
        accepted: Slots = {}
        chances = torch.rand(len(labels), 2, dtype=torch.float64, generator=held.generator)
        for offer, (label, (chance, choice)) in enumerate(zip(labels.tolist(), chances.tolist(), strict=True)):
            self.class_seen[label] += 1
            held.n_seen += 1
            slot = self.slot(held, label, chance, choice)
            if slot is not None:
                held.filled = max(held.filled, slot + 1)
                held.storage["labels"][slot] = label
                accepted[slot] = offer
        return accepted

    def slot(self, held: Held, label: int, chance: float, choice: float) -> int | None:
        """Where one offer goes, None for nowhere."""
        if held.filled < held.capacity:
            return held.filled
        counts = torch.bincount(held.storage["labels"], minlength=self.num_classes)
        largest = int(counts.argmax())
        self.class_full |= counts == counts[largest]
        if self.class_full[label] and chance * self.class_seen[label] >= counts[label]:
            return None
        members = (held.storage["labels"] == (label if self.class_full[label] else largest)).nonzero().flatten()
        return int(members[int(choice * len(members))])

    def state(self) -> dict[str, Tensor]:
        """Offers a class, and the classes that were ever the largest."""
        return {"class_seen": self.class_seen, "class_full": self.class_full}


class Weighted(Reservoir):
    """A-Res (Efraimidis and Spirakis, 2006): the slots hold the offers with the largest keys u^(1/w).

    That is a draw without replacement with probabilities proportional to the importance w, whenever offers came.
    Keys are kept as log(u) / w, which does not underflow.
    """

    def accept(self, held: Held, labels: Tensor, importance: Tensor) -> Slots:
        """Slots of the offers that are taken."""
        accepted: Slots = {}
        chances = torch.rand(len(labels), dtype=torch.float64, generator=held.generator)
        weights = torch.where(importance.isfinite(), importance, FLOOR).double().clamp(FLOOR, CAP)
        keys = held.storage["keys"]
        for offer, key in enumerate((chances.log() / weights).tolist()):
            held.n_seen += 1
            slot = held.filled if held.filled < held.capacity else int(keys.argmin())
            if held.filled < held.capacity or key > keys[slot]:
                held.filled = max(held.filled, slot + 1)
                keys[slot] = key
                accepted[slot] = offer
        return accepted


POLICIES: Mapping[str, type[Reservoir]] = {
    "reservoir": Reservoir,
    "class_balanced": ClassBalanced,
    "importance": Weighted,
}
