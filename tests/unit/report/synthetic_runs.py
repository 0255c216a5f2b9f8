"""Run folders written through the Recorder, each with a known truth; no real model makes all of these on demand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from stabilitykit.record import Recorder
from stabilitykit.record.ending import this_process, write_ending
from stabilitykit.schema import (
    BUFFER_ROW,
    PHASES,
    ROLES,
    SCALAR_ROW,
    STEP_ROW,
    TENSOR_ROW,
    ChainLink,
    Diagnosis,
    Event,
    Origin,
    RunUpStep,
    TensorSummary,
)

LAYERS = ("embed", "block.0.attn", "block.0.mlp", "block.1.attn", "block.1.mlp", "head")
HOSTILE = (
    "</script><script>window.owned = 1</script>",
    "<img src=x onerror='window.owned = 2'>",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07bell",
    "$\\frac{1}{0}$ & _x^ %s {0} {{ 7 * 7 }}",
    "a" * 10_000,
    "\u202egnp.exe",
    "lone\udce4surrogate",
    "back`tick",
    "]]>--><!--\u2028",
    "two\nlines [bold]markup[/bold]",
)
FAULT_STEP = 239
GROWTH_FROM = 180
DEAD = {"pid": 2**22 - 1, "process_start": "1", "machine": "elsewhere"}


def write_run(
    path: Path,
    *,
    num_steps: int = FAULT_STEP + 1,
    layers: tuple[str, ...] = LAYERS,
    cadence: int = 1,
    fault: bool = False,
    ending: str = "completed",
    tasks: int = 2,
    meta: dict[str, Any] | None = None,
    events: tuple[Event, ...] = (),
) -> Path:
    """A run of `num_steps`; with `fault`, the middle layer grows from GROWTH_FROM on and overflows in the last step."""
    path.mkdir(parents=True)
    recorder = Recorder(path)
    process = DEAD if ending == "killed" else this_process()
    facts = {"schema_version": 1, "run_id": "r1", "name": "synthetic", "created": "2026-11-22T09:14:00+00:00"}
    facts |= {"command": ["python", "train.py", "--lr", "0.1"], "seed": 42, "device": "cpu"} | process | (meta or {})
    (path / "run.json").write_text(json.dumps(facts))
    for step in range(num_steps):
        last = fault and step == num_steps - 1
        recorder.write(
            step,
            steps=_step(step, num_steps, cadence, tasks, last),
            tensors=_tensors(recorder, layers, step, num_steps, last) if step % cadence == 0 or last else None,
            scalars=_scalars(recorder, step),
            buffer=_buffer(step) if step % 50 == 0 else None,
            events=events if step == num_steps // 2 else (),
        )
    recorder.close()
    if fault:
        (path / "diagnosis.json").write_text(diagnosis(layers, num_steps - 1).to_json())
    if ending != "killed":
        write_ending(path, ending, num_steps - 1, "RuntimeError: boom" if ending == "raised" else "")
    return path


def diagnosis(layers: tuple[str, ...], step: int) -> Diagnosis:
    guilty = layers[len(layers) // 2]
    scores = TensorSummary(name="scores", dtype="float32", shape=(4, 8), numel=32, min=-12.0, max=91.4, mean=0.2)
    bad = TensorSummary(name="weights", dtype="float32", shape=(4, 8), numel=32, posinf=12, min=0.0, max=3.1e38)
    loss = TensorSummary(name="loss", dtype="float32", shape=(), numel=1, nan=1)
    origin = Origin(
        step=step,
        phase="forward",
        kind="inf",
        module=guilty,
        op="exp",
        file="model.py",
        line=88,
        code="weights = (scores - shift).exp()",
        samples=(3, 17),
        proof="replayed",
    )
    links = (
        ChainLink(phase="forward", op="exp", module=guilty, file="model.py", line=88, code=origin.code, output=bad),
        ChainLink(phase="forward", op="nll_loss", module="", file="train.py", line=9, code="loss = f(x)", output=loss),
    )
    run_up = tuple(RunUpStep(step=step - 3 + i, loss=1.0 + i, absmax=60.0 + i, absmax_tensor=guilty) for i in range(4))
    return Diagnosis(
        origin=origin,
        noticed="loss",
        chain=links,
        inputs=(scores,),
        rule="exp_overflow",
        cause="`exp` of 91.4 is more than float32 holds.",
        remedies=("subtract the row maximum: `scores - scores.amax(-1)`", "clip gradients"),
        run_up=run_up,
        task=1,
    )


def _step(step: int, num_steps: int, cadence: int, tasks: int, last: bool) -> np.ndarray:
    row = np.zeros(1, STEP_ROW)
    bad = math.nan if last else 1.0
    grown = 10.0 ** max(0.0, (step - GROWTH_FROM) / 30)
    values: dict[str, float] = {
        "task": tasks * step // num_steps if tasks else -1,
        "epoch": -1,
        "seconds": 0.5,
        "loss": bad * (2.0 - step / num_steps),
        "grad_norm": bad * grown,
        "grad_norm_clipped": bad * min(grown, 1.0),
        "lr": 0.1,
        "parameter_norm": 10.0,
        "update_norm": 0.01 * bad,
        "loss_scale": math.nan,
        "cadence": cadence,
        "cost_seconds": 0.005,
    }
    for name, value in values.items():
        row[name] = value
    return row


def _tensors(recorder: Recorder, layers: tuple[str, ...], step: int, num_steps: int, last: bool) -> np.ndarray:
    rows = np.zeros(2 * len(layers), TENSOR_ROW)
    middle = len(layers) // 2
    for place, (layer, role) in enumerate((layer, role) for role in ("output", "gradient") for layer in layers):
        row, index = rows[place : place + 1], place % len(layers)
        size = 2.0 + 0.1 * math.sin(step + index)
        if num_steps > GROWTH_FROM and last is not None and index == middle:
            size *= 10.0 ** max(0.0, (step - GROWTH_FROM) / 15) if num_steps == FAULT_STEP + 1 else 1.0
        row["tensor"] = recorder.tensor_id(layer, kind="module")
        row["role"], row["phase"], row["order"], row["numel"] = ROLES.index(role), PHASES.index("forward"), index, 32
        row["min"], row["max"], row["headroom"] = -size, size / 2, 128 - math.log2(size)
        if last and index >= middle:
            row["posinf" if index == middle else "nan"] = 12
            row["min"] = row["max"] = row["headroom"] = math.nan
    return rows


def _scalars(recorder: Recorder, step: int) -> np.ndarray:
    rows = np.zeros(2, SCALAR_ROW)
    rows["scalar"] = [recorder.scalar_id("loss/ce"), recorder.scalar_id("accuracy")]
    rows["value"] = [1.0, step / 1000]
    return rows


def _buffer(step: int) -> np.ndarray:
    row = np.zeros(1, BUFFER_ROW)
    row["capacity"], row["filled"], row["bad_logits"], row["class_balance"] = 500, step, step // 100, 0.97
    row["age"] = row["teacher_drift"] = math.nan
    return row
