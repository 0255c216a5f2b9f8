import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic_runs import FAULT_STEP, GROWTH_FROM, LAYERS, write_run

from stabilitykit.analyse.findings import analyse, first_nonfinite
from stabilitykit.read import open_run
from stabilitykit.record import Recorder
from stabilitykit.schema import ROWS

NO_EVENTS = pd.DataFrame({"step": [], "kind": [], "severity": [], "message": []})[
    ["step", "kind", "severity", "message"]
]


def steps(**columns: list[float]) -> pd.DataFrame:
    length = len(next(iter(columns.values())))
    empty = {name: [math.nan] * length for name in ("loss", "grad_norm", "grad_norm_clipped", "parameter_norm")}
    return pd.DataFrame({"step": range(length), "skipped": [0] * length} | empty | columns)


def test_a_diverging_run_is_told_by_its_verdict_and_where_growth_began(tmp_path: Path) -> None:
    findings = analyse(open_run(write_run(tmp_path / "run", fault=True, ending="raised")))

    outputs = findings.maps[0]
    assert findings.level == "fault"
    assert findings.headline == findings.diagnoses[0].verdict
    assert outputs.nonfinite[0] == (FAULT_STEP, LAYERS[3])
    assert outputs.growth[0].began == pytest.approx(GROWTH_FROM, abs=5)
    assert any("began to grow around step 1" in note for note in findings.notes)


def test_a_healthy_run_has_headroom_and_nothing_else_to_tell(tmp_path: Path) -> None:
    findings = analyse(open_run(write_run(tmp_path / "run", num_steps=100)))

    assert (findings.level, findings.headline) == ("fine", "No non-finite value in 100 steps")
    assert findings.nearest is not None
    assert findings.nearest.bits == pytest.approx(128 - math.log2(2.1), abs=0.01)
    assert len(findings.notes) == 1
    assert [(span.first_step, span.last_step) for span in findings.tasks] == [(0, 49), (50, 99)]


def test_an_empty_run_is_no_fault(tmp_path: Path) -> None:
    findings = analyse(open_run(write_run(tmp_path / "run", num_steps=0)))

    assert (findings.level, findings.headline) == ("empty", "No step was recorded")


def test_a_nan_loss_without_diagnosis_is_a_fault_all_the_same() -> None:
    assert first_nonfinite(steps(loss=[3.0, 2.0, 1.0, math.nan, math.nan]), NO_EVENTS) == (3, "the loss was NaN")
    assert first_nonfinite(steps(loss=[1.0, math.inf]), NO_EVENTS) == (1, "the loss was Inf")


def test_an_event_of_a_non_finite_value_is_a_fault_also_where_the_loss_is_unknown() -> None:
    events = pd.DataFrame([(1, "nonfinite", "error", "gradient of head is NaN")], columns=NO_EVENTS.columns)

    assert first_nonfinite(steps(loss=[math.nan] * 3), events) == (1, "gradient of head is NaN")


@pytest.mark.parametrize(
    "columns",
    [
        {"loss": [1.0, 2.0]},
        {"loss": [math.nan] * 20},
        {"loss": [1.0, *[math.nan] * 9] * 3},
        {"grad_norm": [math.inf, 1.0], "skipped": [1, 0]},
        {"parameter_norm": [3.0, *[math.nan] * 6, 3.0]},
    ],
)
def test_what_was_not_measured_or_was_skipped_by_a_scaler_is_no_fault(columns: dict[str, list[float]]) -> None:
    assert first_nonfinite(steps(**columns), NO_EVENTS) is None


def test_gradients_that_were_finite_when_the_optimizer_used_them_are_no_fault() -> None:
    infinite = [math.inf, math.inf]

    assert first_nonfinite(steps(grad_norm=infinite, grad_norm_clipped=[1.0, 0.0]), NO_EVENTS) is None
    assert first_nonfinite(steps(grad_norm=infinite, grad_norm_clipped=infinite), NO_EVENTS) is not None


def test_a_resumed_run_shows_the_later_attempt(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", num_steps=20)
    again = Recorder(folder, attempt=1)
    rows = np.zeros(1, ROWS["tensors"])
    rows["tensor"], rows["role"] = again.tensor_id("embed", kind="module"), 1
    rows["max"] = 1e6
    for step in range(10, 20):
        again.write(step, steps=np.zeros(1, ROWS["steps"]), tensors=rows)
    again.close()

    grid = analyse(open_run(folder)).maps[0].overview

    assert 10 ** grid.log10[0, 9] < 10
    assert 10 ** grid.log10[0, 10:] == pytest.approx(np.full(10, 1e6), rel=1e-4)
    assert len(analyse(open_run(folder)).steps) == 20


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # sums of arbitrary bits overflow
def test_rows_of_arbitrary_bits_cost_no_report(tmp_path: Path) -> None:
    from stabilitykit.report import FORMATS, write_report

    generator = np.random.default_rng(7)
    recorder = Recorder(tmp_path / "run")
    for step in range(40):
        rows = {name: np.frombuffer(generator.bytes(3 * dtype.itemsize), dtype).copy() for name, dtype in ROWS.items()}
        recorder.write(step, **rows)  # type: ignore[arg-type]
    recorder.close()
    run = open_run(tmp_path / "run")

    sizes = [write_report(run, tmp_path / name, name).stat().st_size for name in FORMATS]

    assert max(sizes) < 2_000_000
