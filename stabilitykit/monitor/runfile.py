"""`run.json`: what a report needs to know of a run beside its rows.  Written by the monitor when it attaches."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import platform
import sys
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stabilitykit.config import MonitorConfig
from stabilitykit.diagnose.site import Site
from stabilitykit.errors import RunFolderError
from stabilitykit.record.ending import machine_id, process_start
from stabilitykit.record.folder import replace_file
from stabilitykit.schema import SCHEMA_VERSION, plain

PACKAGES = ("stabilitykit", "torch", "torchvision", "numpy", "pyarrow")


class RunFile:
    """The run's facts, kept in memory and written whole at each change."""

    def __init__(self, folder: Path, facts: dict[str, Any], attempt: int) -> None:
        self.folder = folder
        self.attempt = attempt
        self._facts = facts

    @classmethod
    def open(cls, folder: Path, model: nn.Module, config: MonitorConfig) -> RunFile:
        """Make the folder and its `run.json`, or add an attempt to the one that is there.

        Raises:
            RunFolderError: the folder holds another run and `resume` is off, or it cannot be written.
        """
        path = folder / "run.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            exists = path.exists()
            facts = json.loads(path.read_text()) if exists else _facts(folder, model, config)
        except (OSError, ValueError) as error:
            raise RunFolderError(
                f"run folder {folder}: {error}, expected one that can be written; choose another run_dir"
            ) from error
        if exists and not config.resume:
            raise RunFolderError(
                f"run folder {folder}: holds the run of {facts.get('created', '?')}, expected a new one; "
                "choose another run_dir, or pass MonitorConfig(resume=True) to go on with that run"
            )
        attempts = facts.setdefault("attempts", [])
        attempts.append(
            {
                "attempt": len(attempts),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "pid": os.getpid(),
                "process_start": process_start(os.getpid()),
                "machine": machine_id(),
            }
        )
        made = cls(folder, facts, len(attempts) - 1)
        made.write()
        return made

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
