"""The integer ids that rows use instead of names: handed out by the recorder, resolved by every reader."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stabilitykit.record.sections import well_formed

Entry = dict[str, Any]


class Names:
    """Ids of tensors and scalars, never given twice.

    Attributes:
        tensors: by id: `{"id", "name", "dtype", "shape", "kind"}`.
        scalars: by id: `{"id", "name"}`.
    """

    def __init__(self) -> None:
        self.tensors: dict[int, Entry] = {}
        self.scalars: dict[int, Entry] = {}
        self._tensor_ids: dict[tuple[str, str], int] = {}
        self._scalar_ids: dict[str, int] = {}
        self._next_tensor = self._next_scalar = 0

    def __len__(self) -> int:
        return len(self.tensors) + len(self.scalars)

    def tensor_id(self, name: str, kind: str = "", dtype: str = "", shape: tuple[int, ...] = ()) -> int:
        """Id of a tensor; the same name and kind give the same id, dtype and shape are those first seen."""
        key = (well_formed(name), kind)
        if key not in self._tensor_ids:
            sizes = [int(size) for size in shape]  # torch.Size and torch.dtype are no JSON
            self._add_tensor(
                {"id": self._next_tensor, "name": key[0], "dtype": str(dtype), "shape": sizes, "kind": kind}
            )
        return self._tensor_ids[key]

    def scalar_id(self, name: str) -> int:
        """Id of a scalar."""
        key = well_formed(name)
        if key not in self._scalar_ids:
            self._add_scalar({"id": self._next_scalar, "name": key})
        return self._scalar_ids[key]

    def skip_to(self, number: int) -> None:
        """Give out no id below `number` any more: someone else may have."""
        self._next_tensor = max(self._next_tensor, number)
        self._next_scalar = max(self._next_scalar, number)

    def merge(self, body: Mapping[str, Any]) -> None:
        """Add what a names table says about ids not known yet."""
        for entry in body.get("tensors", ()):
            if int(entry["id"]) not in self.tensors:
                self._add_tensor(entry)
        for entry in body.get("scalars", ()):
            if int(entry["id"]) not in self.scalars:
                self._add_scalar(entry)

    def merge_text(self, text: bytes) -> bool:
        """Merge a names table from outside; False where the text is none."""
        try:
            self.merge(json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
        return True

    def table(self, first_tensor: int = 0, first_scalar: int = 0) -> dict[str, list[Entry]]:
        """The names from the given ids on, as META frames and `tensors.json` hold them."""
        return {
            "tensors": [entry for number, entry in self.tensors.items() if number >= first_tensor],
            "scalars": [entry for number, entry in self.scalars.items() if number >= first_scalar],
        }

    def _add_tensor(self, entry: Entry) -> None:
        self.tensors[entry["id"]] = entry
        self._tensor_ids.setdefault((entry["name"], entry.get("kind", "")), entry["id"])
        self._next_tensor = max(self._next_tensor, entry["id"] + 1)

    def _add_scalar(self, entry: Entry) -> None:
        self.scalars[entry["id"]] = entry
        self._scalar_ids.setdefault(entry["name"], entry["id"])
        self._next_scalar = max(self._next_scalar, entry["id"] + 1)


def load_names(path: Path, names: Names) -> bool:
    """Merge the file's names into `names`; False where there is no such file or it is damaged."""
    try:
        return names.merge_text(path.read_bytes())
    except OSError:
        return False
