import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from stabilitykit.record import Recorder
from stabilitykit.record.folder import list_segments, segment_path
from stabilitykit.schema import ROWS, Event

Rows = np.ndarray


@pytest.fixture(autouse=True, scope="module")
def no_disk_syncs() -> Iterator[None]:
    """No power is cut here, and waiting for a disk is most of what these tests would take."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, lambda descriptor: None)
        yield


@pytest.fixture
def random_rows() -> Callable[..., Rows]:
    """Rows of a table with arbitrary bits, NaN payloads included."""

    def make(table: str, count: int, seed: int = 0) -> Rows:
        noise = np.random.default_rng([seed, count]).bytes(count * ROWS[table].itemsize)
        return np.frombuffer(noise, dtype=ROWS[table]).copy()

    return make


@pytest.fixture
def small_log(tmp_path: Path, random_rows: Callable[..., Rows]) -> bytes:
    """A sealed log of four steps: every table, an event, and a name that turns up late."""
    recorder = Recorder(tmp_path / "run")
    recorder.tensor_id("block.0", kind="module")
    recorder.write(0, steps=random_rows("steps", 1, 0), tensors=random_rows("tensors", 2, 0))
    recorder.write(1, steps=random_rows("steps", 1, 1), events=[Event(kind="task", message="task 1", wall_time=1.0)])
    recorder.scalar_id("loss/ce")
    recorder.write(2, scalars=random_rows("scalars", 1, 2), buffer=random_rows("buffer", 1, 2))
    recorder.write(3, tensors=random_rows("tensors", 1, 3))
    recorder.close()
    [key] = list_segments(tmp_path / "run")
    return segment_path(tmp_path / "run", *key).read_bytes()
