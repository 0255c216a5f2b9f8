"""What is written is what is read: whatever is measured, however often a run is resumed, killed and compacted."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import stabilitykit as sk
from stabilitykit.record import Recorder
from stabilitykit.record.compact import compact
from stabilitykit.schema import ROWS, SCALAR_ROW, STEP_ROW, TENSOR_ROW

NAMES = st.text(max_size=12)
SHAPES = st.lists(st.integers(0, 2**40), max_size=5).map(tuple)
DTYPES = st.sampled_from(["float32", "bfloat16", "complex64", "float8_e4m3fn", "int4", ""])
MEASURED = [  # integers cannot be non-finite: a module that gives them has no row
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.complex64, torch.complex128),
]
ACTIONS = st.one_of(
    st.tuples(st.just("write"), st.integers(1, 12)),
    st.tuples(st.just("jump"), st.integers(0, 30)),  # a step number, back or forth
    st.tuples(st.just("resume"), st.booleans()),  # after a kill, or after it was closed
    st.tuples(st.just("compact"), st.integers(0, 25)),  # killed before this call of those that change the folder
    st.tuples(st.just("compact"), st.none()),
)


class Killed(BaseException):
    """Stands for a kill: nothing that catches Exception may clean up after it."""


@dataclass
class Writer:
    """A run that is written by turns, and what it should hold."""

    run_dir: Path
    attempt: int = 0
    step: int = 0
    rows: list[tuple[int, int, float]] = field(default_factory=list)  # attempt, step, value

    def __post_init__(self) -> None:
        self.recorder = self.new_recorder()

    def new_recorder(self) -> Recorder:
        return Recorder(self.run_dir, attempt=self.attempt, segment_bytes=6000)

    def write(self, count: int) -> None:
        for _ in range(count):
            value = float(len(self.rows))
            row, tensors, scalars = np.zeros(1, STEP_ROW), np.zeros(2, TENSOR_ROW), np.zeros(1, SCALAR_ROW)
            tensors["tensor"] = [self.recorder.tensor_id(name) for name in (f"late.{self.step // 10}", "stem")]
            tensors["order"] = [0, 1]
            scalars["scalar"] = self.recorder.scalar_id("loss/ce")
            row["loss"] = tensors["max"] = scalars["value"] = value
            assert self.recorder.write(self.step, steps=row, tensors=tensors, scalars=scalars)
            self.rows.append((self.attempt, self.step, value))
            self.step += 1

    def jump(self, step: int) -> None:
        self.step = step

    def resume(self, killed: bool) -> None:
        if killed and self.recorder._segment is not None:
            self.recorder._segment.close()
        self.recorder.close()
        self.attempt += 1
        self.recorder = self.new_recorder()

    def compact(self, last: int | None) -> None:
        with pytest.MonkeyPatch.context() as dying:
            left = [10**9 if last is None else last]
            for name in ("mkdir", "write", "replace", "unlink"):
                dying.setattr(os, name, self.dying(getattr(os, name), left))
            with suppress(Killed):
                compact(self.run_dir, include_open=True)

    @staticmethod
    def dying(real: Any, left: list[int]) -> Any:
        def call_or_die(*arguments: Any, **keywords: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*arguments, **keywords)

        return call_or_die

    def latest(self) -> list[tuple[int, int, float]]:
        """Without the steps that lie in what a later attempt recorded."""
        spans = {}
        for attempt, step, _ in self.rows:
            first, last = spans.get(attempt, (step, step))
            spans[attempt] = (min(first, step), max(last, step))
        return [
            (attempt, step, value)
            for attempt, step, value in self.rows
            if not any(later > attempt and first <= step <= last for later, (first, last) in spans.items())
        ]


@settings(max_examples=60)
@given(actions=st.lists(ACTIONS, max_size=12))
def test_parts_and_segments_read_as_one_in_order_whatever_became_of_the_run(actions: list[tuple[str, Any]]) -> None:
    with TemporaryDirectory() as folder:
        (Path(folder) / "run.json").write_text("{}")
        writer = Writer(Path(folder))
        for name, argument in actions:
            getattr(writer, name)(argument)
        run = sk.open_run(folder)

        for attempts, rows in (("all", writer.rows), ("latest", writer.latest())):
            expected = sorted(rows, key=lambda row: (row[1], row[0]))
            steps, tensors = run.steps(attempts=attempts), run.tensors(attempts=attempts)
            assert list(steps[["attempt", "step", "loss"]].itertuples(index=False, name=None)) == expected
            stem = tensors[tensors["name"] == "stem"]
            assert list(stem[["attempt", "step", "max"]].itertuples(index=False, name=None)) == expected
            late = tensors[tensors["name"] != "stem"]
            assert late["name"].tolist() == [f"late.{step // 10}" for _, step, _ in expected]
            # a step that one attempt records twice shows its last scalars in both rows
            if "loss/ce" in steps and len(set(zip(steps["attempt"], steps["step"], strict=True))) == len(steps):
                assert steps["loss/ce"].tolist() == steps["loss"].tolist()
        assert run.damage == []
        writer.recorder.close()


@settings(max_examples=40)
@given(tensors=st.lists(st.tuples(NAMES, DTYPES, SHAPES), unique_by=lambda entry: entry[0], max_size=6), data=st.data())
def test_names_dtypes_shapes_and_every_bit_of_a_row_come_back(
    tensors: list[tuple[str, str, tuple[int, ...]]], data: st.DataObject
) -> None:
    with TemporaryDirectory() as folder:
        recorder = Recorder(Path(folder))
        bits = data.draw(
            st.binary(min_size=TENSOR_ROW.itemsize * len(tensors), max_size=TENSOR_ROW.itemsize * len(tensors))
        )
        rows = np.frombuffer(bits, TENSOR_ROW).copy()
        rows["role"], rows["phase"] = rows["role"] % 9, rows["phase"] % 8
        rows["tensor"] = [recorder.tensor_id(name, dtype=dtype, shape=shape) for name, dtype, shape in tensors]
        recorder.write(0, tensors=rows)
        recorder.close()
        if data.draw(st.booleans()):
            compact(Path(folder))
        run = sk.open_run(folder)

        found = run.names()
        assert list(zip(found["name"], found["dtype"], map(tuple, found["shape"]), strict=True)) == tensors
        for (name, _, _), row in zip(tensors, rows, strict=True):
            [read] = run.tensors(name).to_dict("records")
            columns = set(ROWS["tensors"].names or ()) - {"role", "phase"}
            assert all(same_bits(read[column], row[column]) for column in columns)


def same_bits(read: Any, written: np.generic) -> bool:
    return bool(np.isnan(read)) if np.isnan(written) else written.dtype.type(read).tobytes() == written.tobytes()


class Outputs(nn.Module):
    """A module a tensor, each of which gives its tensor as it is."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in tensors)
        self.tensors = tensors

    def forward(self) -> list[Tensor]:
        return [layer(tensor) for layer, tensor in zip(self.layers, self.tensors, strict=True)]


@settings(max_examples=30)
@given(
    kinds=st.lists(
        st.tuples(st.sampled_from(MEASURED), st.lists(st.integers(0, 4), max_size=4), st.integers(-3, 3)), max_size=6
    )
)
def test_an_output_of_any_dtype_and_shape_gives_a_row_of_its_own(
    kinds: list[tuple[torch.dtype, list[int], int]],
) -> None:
    tensors = [torch.full(shape, value).to(dtype) for dtype, shape, value in kinds]
    with TemporaryDirectory() as folder:
        config = sk.MonitorConfig(report=False, compact=False, cadence=1)
        model = Outputs(tensors)
        with sk.attach(model, None, Path(folder) / "run", config=config) as monitor, monitor.step():
            model()

        run = sk.open_run(Path(folder) / "run")
        outputs = run.tensors(role="output")
        assert run.damage == []
        for number, tensor in enumerate(tensors):
            [row] = outputs[outputs["name"] == f"layers.{number}"].to_dict("records")
            assert row["numel"] == tensor.numel()
            if not row["unsupported"] and tensor.numel() and not tensor.is_complex():
                assert row["min"] == row["max"] == tensor.double().max()
            assert (row["nan"], row["posinf"], row["neginf"]) == (0, 0, 0)
