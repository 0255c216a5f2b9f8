import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stabilitykit.record import Recorder
from stabilitykit.schema import SCALAR_ROW, STEP_ROW, TENSOR_ROW, Event


@pytest.fixture(autouse=True, scope="module")
def no_disk_syncs() -> Iterator[None]:
    """No power is cut here, and waiting for a disk is most of what these tests would take."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, lambda descriptor: None)
        yield


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def write_meta(run_dir: Path) -> Callable[..., None]:
    """Writes run.json as the monitor does."""

    def write(**facts: Any) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "run.json").write_text(json.dumps({"schema_version": 1, "run_id": "r1"} | facts))

    return write


@pytest.fixture
def write_steps() -> Callable[..., None]:
    """Writes per step: a step row, two tensors in two roles, two scalars, and in step 2 an event."""

    def write(recorder: Recorder, steps: range, sign: float = 1.0) -> None:
        names = [recorder.tensor_id(name, kind="module") for name in ("stem", "head")]
        scalars = [recorder.scalar_id(name) for name in ("loss/ce", "lr/1")]
        for step in steps:
            row = np.zeros(1, STEP_ROW)
            row["loss"] = sign * step
            tensors = np.zeros(4, TENSOR_ROW)
            tensors["tensor"], tensors["role"], tensors["phase"] = names * 2, [1, 1, 3, 3], [3, 3, 4, 4]
            tensors["order"], tensors["max"] = range(4), sign * (step + np.arange(4) / 8)
            values = np.zeros(2, SCALAR_ROW)
            values["scalar"], values["value"] = scalars, [step / 2, step / 4]
            events = [Event(kind="task", message="task 1", data={"task": 1})] if step == 2 else []
            assert recorder.write(step, steps=row, tensors=tensors, scalars=values, events=events)

    return write
