"""`run.json`: what a report needs to know of a run beside its rows.  Written by the monitor when it attaches."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import platform
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from stabilitykit.config import MonitorConfig
from stabilitykit.diagnose.site import Site
from stabilitykit.errors import RunFolderError
from stabilitykit.record.ending import ended_attempt, is_running, machine_id, this_process
from stabilitykit.record.folder import replace_file
from stabilitykit.schema import SCHEMA_VERSION, plain

PACKAGES = ("stabilitykit", "torch", "torchvision", "numpy", "pyarrow")


class RunFile:
    """The run's facts, kept in memory and written whole at each change."""

    def __init__(self, folder: Path, facts: dict[str, Any], attempt: int, *, made_folder: bool) -> None:
        self.folder = folder
        self._made_folder = made_folder
        self.attempt = attempt
        self._facts = facts

    @classmethod
    def open(cls, folder: Path, model: nn.Module, config: MonitorConfig) -> RunFile:
        """Make the folder and its `run.json`, or add an attempt to the one that is there.

        Raises:
            RunFolderError: the folder holds another run and `resume` is off, another process records into it, or it
                cannot be written.
        """
        made_folder = not folder.exists()
        try:
            with _claimed(folder):
                exists = (folder / "run.json").exists()
                facts = _read(folder) if exists else _facts(folder, model, config)
                if exists:
                    _refuse_if_taken(folder, facts, config)
                attempts = facts.setdefault("attempts", [])
                started = datetime.now(UTC).isoformat(timespec="seconds")
                attempts.append({"attempt": len(attempts), "created": started} | this_process())
                made = cls(folder, facts, len(attempts) - 1, made_folder=made_folder)
                made.write()
        except RunFolderError:
            raise
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"run folder {folder}: {error}, expected one that can be written; choose another run_dir"
            ) from error
        return made

    def withdraw(self) -> None:
        """Leave the folder as it was: nothing is recorded after all."""
        self._facts["attempts"].pop()
        with suppress(OSError):  # what is in the way is somebody's
            if self.attempt:
                self.write()
                return
            (self.folder / "run.json").unlink()
            (self.folder / "tmp").rmdir()
            if self._made_folder:
                self.folder.rmdir()

    def update(self, facts: Mapping[str, Any]) -> str:
        """Add facts of the caller's.

        Returns:
            Why they are not in the file, empty when they are; the next update, or the one at close, tries again.
        """
        self._facts |= plain(dict(facts))
        try:
            self.write()
        except RunFolderError as error:
            return str(error.__cause__)
        return ""

    def write(self) -> None:
        """Replace `run.json` in one move.

        Raises:
            RunFolderError: the folder cannot be written.
        """
        try:
            replace_file(self.folder, self.folder / "run.json", json.dumps(plain(self._facts), indent=1).encode())
        except OSError as error:
            raise RunFolderError(f"run folder {self.folder}: {error}, expected one that can be written") from error


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Hold the folder while its `run.json` is looked for and written: of two processes, one is first.

    Creating a file that must not exist is atomic on network file systems as well, where locks may not be.
    """
    claim = folder / "tmp" / "claim"
    claim.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
    except FileExistsError as error:
        raise RunFolderError(
            f"run folder {folder}: another process is attaching to it, expected one folder a process; choose another "
            f"run_dir (where none is, one was killed as it attached: remove {claim})"
        ) from error
    try:
        yield
    finally:
        claim.unlink(missing_ok=True)


def _read(folder: Path) -> dict[str, Any]:
    facts = json.loads((folder / "run.json").read_text())
    attempts = facts.get("attempts", []) if isinstance(facts, dict) else None
    if not isinstance(attempts, list) or not all(isinstance(entry, dict) for entry in attempts):
        raise ValueError("run.json is damaged")
    return cast("dict[str, Any]", facts)


def _refuse_if_taken(folder: Path, facts: Mapping[str, Any], config: MonitorConfig) -> None:
    """Refuse a folder that holds a run, unless it is to go on and no other process is at it."""
    if not config.resume:
        raise RunFolderError(
            f"run folder {folder}: holds the run of {facts.get('created', '?')}, expected a new one; "
            "choose another run_dir, or pass MonitorConfig(resume=True) to go on with that run"
        )
    last = facts["attempts"][-1] if facts.get("attempts") else {}
    process = (last.get("pid"), str(last.get("process_start")), str(last.get("machine")))
    if process[0] != os.getpid() and is_running(*process) and ended_attempt(folder) != last.get("attempt"):
        raise RunFolderError(
            f"run folder {folder}: process {process[0]} still records into it, expected a run that has ended; "
            "end that process, or choose another run_dir"
        )


def _facts(folder: Path, model: nn.Module, config: MonitorConfig) -> dict[str, Any]:
    first = next(model.parameters(), torch.empty(0))
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": uuid.uuid4().hex,
        "name": folder.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "versions": {"python": platform.python_version()} | dict(_versions()),
        "host": {
            "platform": f"{platform.system()} {platform.machine()}",
            "cpu_count": os.cpu_count(),
            "machine": machine_id(),
        },
        "device": str(first.device),
        "num_threads": torch.get_num_threads(),
        "seed": config.seed,
        "config": asdict(config),
        "modules": list(_modules(model)),
        "loss_terms": [],
    }


def _command() -> list[str]:
    """The command as a user would type it: `python -m package` where it was started so, paths relative."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        return ["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    script = Site(str(Path(sys.argv[0]).resolve()), 1).shown if sys.argv and sys.argv[0] else ""
    return ["python", script, *sys.argv[1:]]


def _versions() -> Iterable[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def _modules(model: nn.Module) -> Iterable[dict[str, Any]]:
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        yield {
            "name": name,
            "type": type(module).__name__,
            "parameters": sum(entry.numel() for entry in own if not isinstance(entry, nn.UninitializedParameter)),
            "dtype": str(own[0].dtype).removeprefix("torch.") if own else "",
        } | _source(type(module))


def _source(kind: type[nn.Module]) -> dict[str, Any]:
    """File and line of a module class's forward, for classes of the user's own; nothing for torch's."""
    code = getattr(inspect.getattr_static(kind, "forward"), "__code__", None)  # a scripted class has a descriptor
    if kind.__module__.startswith("torch.") or code is None:
        return {}
    return {"file": Site(code.co_filename, code.co_firstlineno).shown, "line": code.co_firstlineno}
