"""Guard 4: nothing that is not finite gets into a replay buffer, stays in it, or is drawn from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from stabilitykit.guards.checks import in_range, norms
from stabilitykit.guards.guard import Guard


class BufferSanitiser(Guard):
    """Says which rows may be stored, and which stored slots must go.

    Rows are refused, never repaired: a clamped or zeroed teacher would be learned. It works on tensors with the sample
    or slot first, whatever the buffer looks like:

        sanitiser = BufferSanitiser(num_classes=10)
        keep = sanitiser.admit(examples=x, logits=logits, labels=y)
        buffer.add(x[keep], logits[keep], y[keep])
        bad = sanitiser.audit(examples=buffer.x, logits=buffer.logits, labels=buffer.y)
        buffer.remove(bad)

    Args:
        num_classes: labels are integers from 0 to one less; None leaves them unchecked.
        max_magnitude: a number beyond it is garbage though it is finite: its square may not be.

    Attributes:
        num_rejected: samples that were not stored.
        num_quarantined: stored samples that were set aside.
    """

    name: ClassVar[str] = "buffer"

    def __init__(
        self, *, num_classes: int | None = None, max_magnitude: float = 1e6, on_event: object | None = None
    ) -> None:
        super().__init__(on_event)
        self.num_classes, self.max_magnitude = num_classes, max_magnitude
        self.num_rejected = self.num_quarantined = 0

    def admit(self, *, labels: Tensor | None = None, uids: Tensor | None = None, **columns: Tensor) -> Tensor:
        """Rows that may be stored, (n,) int64.

        Args:
            labels: class labels, (N,).
            uids: names of the rows for the event, (N,).
            **columns: floating tensors, (N, ...).
        """
        bad = self._bad(labels, columns)
        if bad:
            rows = _any(bad)
            self.num_rejected += len(rows)
            text = f"{len(rows)} samples refused: {_describe(bad)}"
            self.acted(text, rows=rows, uids=_pick(uids, rows), tensor=next(iter(bad)), phase="forward")
        return self._others(bad, labels, columns)

    def audit(self, *, labels: Tensor | None = None, uids: Tensor | None = None, **columns: Tensor) -> Tensor:
        """Stored slots that must go, (n,) int64, announced by slot and uid; arguments as `admit`, slot first."""
        bad = self._bad(labels, columns)
        slots = _any(bad)
        if slots:
            self.num_quarantined += len(slots)
            text = f"{len(slots)} stored samples set aside: {_describe(bad)}"
            self.acted(text, slots=slots, uids=_pick(uids, slots), tensor=next(iter(bad)), phase="buffer")
        return torch.tensor(slots, dtype=torch.int64)

    def is_sound(self, *, labels: Tensor | None = None, **columns: Tensor) -> bool:
        """Whether a draw may be used; says nothing: `audit` names the slots."""
        return not self._bad(labels, columns)

    def weights(self, probabilities: Tensor) -> Tensor | None:
        """Sampling weights that `torch.multinomial` accepts: as given, or None (draw evenly) where they are not.

        One NaN raises there, and so does a sum of zero or infinity: one bad score must not end a run.
        """
        sound = bool(probabilities.isfinite().all()) and bool((probabilities >= 0).all())
        if sound and 0 < float(probabilities.double().sum()) < math.inf:
            return probabilities
        slots = (~probabilities.isfinite() | (probabilities < 0)).nonzero().flatten().tolist()
        text = (
            f"sampling weights of {len(slots)} slots are no probabilities, expected finite, positive ones; drew evenly"
        )
        self.acted(text, slots=slots[:100], tensor="sampling weights", phase="buffer")
        return None

    def state_dict(self) -> dict[str, int]:
        """How often it acted, and on how many samples."""
        return super().state_dict() | {
            "num_rejected": self.num_rejected,
            "num_quarantined": self.num_quarantined,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Put the counts back."""
        super().load_state_dict(state)
        self.num_rejected, self.num_quarantined = state["num_rejected"], state["num_quarantined"]

    def _bad(self, labels: Tensor | None, columns: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """Rows that must not be there, by column."""
        floating = {name: column for name, column in columns.items() if column.is_floating_point() and column.numel()}
        wrong: dict[str, Tensor] = {}
        # No value is larger than the norm, which hands NaN on and is cheap: rows are looked for where it leaves room
        # for one. Half of what is allowed, so that no rounding of the norm can hide it.
        for (name, column), norm in zip(floating.items(), norms(list(floating.values())), strict=True):
            if not norm <= self.max_magnitude / 2:
                # In float64: float16 would take a bound of 1e6 for infinity, and infinity for sound.
                wrong[name] = ~(column.abs().double() <= self.max_magnitude).reshape(len(column), -1).all(1)
        if labels is not None and self.num_classes is not None and not in_range(labels, self.num_classes):
            wrong["labels"] = (labels < 0) | (labels >= self.num_classes)
        return {name: rows.nonzero().flatten().tolist() for name, rows in wrong.items() if rows.any()}

    def _others(self, bad: Mapping[str, list[int]], labels: Tensor | None, columns: Mapping[str, Tensor]) -> Tensor:
        count = len(next(iter(columns.values()))) if columns else len(labels if labels is not None else ())
        if not bad:
            return torch.arange(count)
        kept = torch.ones(count, dtype=torch.bool)
        kept[_any(bad)] = False
        return kept.nonzero().flatten()


def _any(bad: Mapping[str, list[int]]) -> list[int]:
    return sorted({row for rows in bad.values() for row in rows})


def _describe(bad: Mapping[str, list[int]]) -> str:
    return ", ".join(f"{len(rows)} with impossible {name}" for name, rows in bad.items())


def _pick(uids: Tensor | None, rows: list[int]) -> list[int]:
    return [] if uids is None else uids[rows].tolist()
