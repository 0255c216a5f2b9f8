"""A run folder, opened: what it says of itself and its tables; reports, commands and notebooks start here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from stabilitykit.errors import UnreadableRunError, UsageError
from stabilitykit.read import rollups, views
from stabilitykit.read.store import Store
from stabilitykit.record.columns import STORED_TABLES
from stabilitykit.record.ending import is_running
from stabilitykit.schema import PHASES, ROLES, SCHEMA_VERSION, TABLES, Diagnosis, Ending, Role

if TYPE_CHECKING:
    from stabilitykit.record.names import Names

Attempts = Literal["latest", "all"]
_DAMAGE = {  # kinds of events that say what is missing, and how
    "damaged_log": "{message}",
    "lost_rows": "{message}",
    "own_error": "measurements failed from step {step:,} on and are left out: {message}",
}


def open_run(path: str | PathLike[str]) -> Run:
    """Open a run folder, whether its run is over, killed or still going on.

    Raises:
        UnreadableRunError: it is no run folder, or one written by a newer major version of the format.
    """
    folder = Path(path)
    if not any((folder / entry).exists() for entry in ("run.json", "wal", *TABLES)):
        raise UnreadableRunError(f"open_run: {folder} has no run.json, expected a run folder; check the path")
    run = Run(folder)
    version = run.meta.get("schema_version", SCHEMA_VERSION)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise UnreadableRunError(
            f"open_run: {folder} has schema version {version}, expected at most {SCHEMA_VERSION}; update stabilitykit"
        )
    return run


class Run:
    """One run, as it was when it was opened and its tables first read; `open_run` makes it.

    Attributes:
        path: the run folder.
        meta: what `run.json` says; empty where it is missing or damaged.
        ending_facts: what `ending.json` says of the last attempt; empty while it runs and after a kill.
        diagnoses: every diagnosis of the run, oldest first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._damage: list[str] = []
        self._store = Store(path)
        self.meta = self._facts()
        self.ending_facts = self._ending_facts()
        self.diagnoses = self._read_diagnoses()

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @cached_property
    def ending(self) -> Ending:
        """How the last attempt ended; `running` takes the same living process on this machine, else it was `killed`."""
        ending = self.ending_facts.get("ending")
        if ending in ("completed", "raised"):
            return cast("Ending", ending)
        process = self.meta | self._last_attempt
        pid, started, machine = (process.get(fact) for fact in ("pid", "process_start", "machine"))
        return "running" if is_running(pid, str(started), str(machine)) else "killed"

    @property
    def diagnosis(self) -> Diagnosis | None:
        """The first diagnosis, None for a run without faults."""
        return self.diagnoses[0] if self.diagnoses else None

    @cached_property
    def last_step(self) -> int:
        """The highest step recorded, -1 for none."""
        short = [self._highest_step(table) for table in TABLES if table != "tensors"]
        return max(short) if max(short) >= 0 else self._highest_step("tensors")

    @property
    def damage(self) -> list[str]:
        """Sentences about what is missing: damaged frames, lost rows, measurements that failed, unreadable files.

        Parts are checked when they are read, so a whole picture takes reading every table.
        """
        columns = ["kind", "step", "message"]
        events = self._store.read("events", columns, pc.field("kind").isin([*_DAMAGE]))
        told = [_DAMAGE[entry["kind"]].format(**entry) for entry in events.to_pylist()]
        return [*self._damage, *told, *self._store.damage]

    def steps(self, *, attempts: Attempts = "latest") -> pd.DataFrame:
        """One row a step, with a column for every scalar logged (`loss/ce`, `lr/1`, ...).

        Args:
            attempts: `latest` leaves out steps that a later attempt of a resumed run did again, `all` keeps them.
        """
        frame = views.ordered(self._select(self._store.read("steps").to_pandas(), attempts))
        return views.pivot_scalars(frame, self._store.read("scalars").to_pandas(), self._names)

    def tensors(
        self,
        name: str | Sequence[str] | None = None,
        role: Role | None = None,
        steps: tuple[int, int] | range | None = None,
        *,
        attempts: Attempts = "latest",
    ) -> pd.DataFrame:
        """Tensor statistics, a row a measurement, with `name`, `role` and `phase` as text.

        Args:
            name: a tensor's qualified name, or several; None for all.
            role: one of `schema.ROLES`; None for all.
            steps: first and last step, both included, or a range; None for all.
            attempts: as in `steps`.
        """
        where = _all_of(self._of(name, role), _within(steps))
        frame = views.ordered(self._select(self._store.read("tensors", where=where).to_pandas(), attempts))
        frame["phase"] = views.texts(frame["phase"].to_numpy(), PHASES)
        return self._named_rows(frame)

    def rollup(
        self, name: str | Sequence[str] | None = None, role: Role | None = None, *, attempts: Attempts = "latest"
    ) -> pd.DataFrame:
        """Tensor statistics at a row per 100 steps, for maps of long runs: counts summed, extremes kept.

        `step` is the first of the window, `num_rows` the measurements in it. No row mixes attempts: the window in
        which a run was resumed has one of each, of the steps that `attempts` selects.

        Args:
            name: as in `tensors`.
            role: as in `tensors`.
            attempts: as in `steps`.
        """
        where = self._of(name, role)
        rows = self._store.read("rollup", where=where).to_pandas()
        if _checked(attempts) == "latest" and self._may_be_resumed:
            spans = self._spans_of(rows)
            rows, cut = rollups.settled(rows, spans)
            if len(cut):
                fresh = self._store.read("tensors", rollups.MEASURED, _all_of(where, rollups.within(cut))).to_pandas()
                rows = rollups.joined(rows, views.latest(fresh, spans), cut)
        return self._named_rows(rollups.merged(rows))

    def events(self, *, attempts: Attempts = "all") -> pd.DataFrame:
        """What happened once, oldest first; `data` is JSON."""
        return views.ordered(self._select(self._store.read("events").to_pandas(), attempts))

    def buffer(self, *, attempts: Attempts = "latest") -> pd.DataFrame:
        """Health of the replay buffer, a row an audit."""
        return views.ordered(self._select(self._store.read("buffer").to_pandas(), attempts))

    def names(self, rank: int = 0) -> pd.DataFrame:
        """The tensors of the run: id, name, dtype, shape and kind."""
        entries = list(self._store.names(rank).tensors.values())
        return pd.DataFrame(entries, columns=["id", "name", "dtype", "shape", "kind"])

    def table(self, name: str) -> ds.Dataset:
        """A table as it is stored, ids and all, parts and log as one pyarrow dataset.

        Raises:
            UsageError: there is no such table.
        """
        if name not in STORED_TABLES:
            raise UsageError(f"Run.table: got {name!r}, expected one of {', '.join(STORED_TABLES)}")
        return self._store.dataset(name)

    @cached_property
    def _names(self) -> Mapping[int, Names]:
        return {rank: self._store.names(rank) for rank in self._store.ranks()}

    @cached_property
    def _spans(self) -> views.Spans:
        return views.spans(self._store.read("steps", ["rank", "attempt", "step"]).to_pandas())

    @property
    def _may_be_resumed(self) -> bool:
        """False where run.json says that it is not: then no table has to be looked through for later attempts."""
        return len(self.meta.get("attempts") or ()) != 1

    @property
    def _last_attempt(self) -> dict[str, Any]:
        attempts = self.meta.get("attempts") or [{}]
        return cast("dict[str, Any]", attempts[-1])

    def _facts(self) -> dict[str, Any]:
        """What `run.json` says, less a list whose entries are not what they should be."""
        facts = self._json_object("run.json")
        for name in ("attempts", "modules"):
            entries = facts.get(name) or []
            if not isinstance(entries, list) or not all(map(_is_entry, entries)):
                self._damage.append(f"run.json: {name} are damaged and were left out")
                del facts[name]
        return facts

    def _ending_facts(self) -> dict[str, Any]:
        facts = self._json_object("ending.json")
        if not _is_entry(facts):
            self._damage.append("ending.json is damaged and was left out")
            return {}
        stale = facts.get("attempt", 0) < self._last_attempt.get("attempt", 0)  # of an attempt before a resume
        return {} if stale else facts

    def _read_diagnoses(self) -> list[Diagnosis]:
        found = []
        for file in sorted(self.path.glob("diagnosis*.json"), key=lambda file: (len(file.name), file.name)):
            try:
                found.append(Diagnosis.from_json(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                self._damage.append(f"{file.name} is no diagnosis and was skipped: {error}")
        return found

    def _select(self, frame: pd.DataFrame, attempts: Attempts) -> pd.DataFrame:
        if _checked(attempts) == "all" or not self._may_be_resumed:
            return frame
        return views.latest(frame, self._spans, views.spans(frame))

    def _spans_of(self, frame: pd.DataFrame) -> views.Spans:
        """What each attempt covered; where an attempt in `frame` has no step rows, by its tensors."""
        attempts = set(zip(frame["rank"].tolist(), frame["attempt"].tolist(), strict=True))
        if attempts <= self._spans.keys():
            return self._spans
        measured = self._store.read("tensors", ["rank", "attempt", "step"]).to_pandas()
        return views.spans(measured) | self._spans

    def _highest_step(self, table: str) -> int:
        highest = pc.max(self._store.read(table, ["step"])["step"]).as_py()
        return -1 if highest is None else int(highest)

    def _named_rows(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Rows of tensors with text for ids."""
        names = views.tensor_names(frame["rank"].to_numpy(), frame["tensor"].to_numpy(), self._names)
        frame.insert(0, "name", names)
        frame["role"] = views.texts(frame["role"].to_numpy(), ROLES)
        return frame

    def _of(self, name: str | Sequence[str] | None, role: Role | None) -> pc.Expression | None:
        """Rows of these tensors in this role; ids are resolved first, integers filter ten times faster than names."""
        if role is not None and role not in ROLES:
            raise UsageError(f"Run.tensors: got role {role!r}, expected one of {', '.join(ROLES)}")
        in_role = None if role is None else pc.field("role") == ROLES.index(role)
        if name is None:
            return in_role
        wanted = {name} if isinstance(name, str) else set(name)
        anything = pc.scalar(False)
        for rank, names in self._names.items():
            ids = [number for number, entry in names.tensors.items() if entry["name"] in wanted]
            anything = anything | ((pc.field("rank") == rank) & _one_of("tensor", ids))
        return _all_of(anything, in_role)

    def _json_object(self, file: str) -> dict[str, Any]:
        """A JSON file of the folder, {} where there is none; a damaged one is told in `damage`."""
        try:
            body = json.loads((self.path / file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._damage.append(f"{file} cannot be read: {error}")
            return {}
        if not isinstance(body, dict):
            self._damage.append(f"{file} cannot be read: it holds no JSON object")
            return {}
        return body


def _is_entry(facts: object) -> bool:
    """Whether it is an object whose attempt, if it says one, is a number."""
    return isinstance(facts, dict) and isinstance(facts.get("attempt", 0), int)


def _checked(attempts: Attempts) -> Attempts:
    if attempts not in ("latest", "all"):
        raise UsageError(f"Run: got attempts={attempts!r}, expected 'latest' or 'all'")
    return attempts


def _within(steps: tuple[int, int] | range | None) -> pc.Expression | None:
    if steps is None:
        return None
    step = pc.field("step")
    if isinstance(steps, range):
        return _one_of("step", list(steps)) if steps.step != 1 else (step >= steps.start) & (step < steps.stop)
    return (step >= steps[0]) & (step <= steps[1])


def _one_of(column: str, values: Sequence[int]) -> pc.Expression:
    """A comparison for a single value: older Arrow versions prune row groups for it alone."""
    return pc.field(column) == values[0] if len(values) == 1 else pc.field(column).isin(pa.array(values, pa.int64()))


def _all_of(*conditions: pc.Expression | None) -> pc.Expression | None:
    given = [condition for condition in conditions if condition is not None]
    combined = given[0] if given else None
    for condition in given[1:]:
        combined = combined & condition
    return combined
