"""A watch without a monitor: rows as they are taken, errors and updates as they are told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import nn
from torch.optim import Optimizer

from stabilitykit.config import MonitorConfig
from stabilitykit.schema import PHASES, ROLES
from stabilitykit.watch.watch import Watch


@dataclass
class Names:
    """Hands out ids, and remembers whose they are."""

    ids: dict[str, int] = field(default_factory=dict)

    def tensor_id(self, name: str, *, kind: str = "", dtype: str = "", shape: tuple[int, ...] = ()) -> int:
        return self.ids.setdefault(name, len(self.ids))


class Watched:
    """A model with a watch on it."""

    def __init__(self, model: nn.Module, *optimizers: Optimizer, **options: Any) -> None:
        self.names = Names()
        self.errors: list[Exception] = []
        self.watch = Watch(
            model,
            optimizers,
            dict(model.named_parameters()),
            self.names,
            MonitorConfig(**options),
            on_error=self.errors.append,
            on_update=lambda _optimizer: None,
            after_update=lambda _optimizer: None,
        )
        self.watch.begin(recording=True, trailing=False)

    def rows(self) -> list[dict[str, Any]]:
        """The rows since the last call, ids as names."""
        taken = self.watch.take_rows()
        names = {identity: name for name, identity in self.names.ids.items()}
        return [
            {key: row[key].item() for key in row.dtype.names}
            | {"name": names[row["tensor"]], "role": ROLES[row["role"]], "phase": PHASES[row["phase"]]}
            for row in (() if taken is None else taken)
        ]

    def of(self, role: str) -> list[str]:
        """Names of the rows of one role, in order."""
        return [row["name"] for row in self.rows() if row["role"] == role]


@pytest.fixture
def watched() -> Iterator[type[Watched]]:
    made: list[Watched] = []

    class Tracked(Watched):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    yield Tracked
    for entry in made:
        entry.watch.close()
        assert entry.errors == []
