"""Every known fault is named exactly, and no healthy run is disturbed: nanzoo's cases and ours, through its adapter."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import stabilitykit as sk

ROOT = Path(__file__).parents[2]
HARNESS = ROOT / "benchmarks" / "nanzoo"

MODES = ("a step block", "nothing but attach")


def load(name: str, path: Path) -> ModuleType:
    """A module by path, under the name by which others import it."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # the cases say `from nanzoo import ...`
    spec.loader.exec_module(module)
    return module


nanzoo = load("nanzoo", HARNESS / "nanzoo.py")
adapter = load("nanzoo_adapter", ROOT / "benchmarks" / "nanzoo_adapter.py")
CASES = [case for folder in (HARNESS / "cases", ROOT / "tests" / "cases") for case in nanzoo.load_cases(folder)]


def marked_for(case: Any, line: int) -> bool:
    """Whether the line's mark is this case's own: in a file with several cases the mark names those it belongs to."""
    text = Path(case.file).read_text().splitlines()[line - 1]
    names = text.partition(nanzoo.ORIGIN_MARK)[2].split()
    return not names or case.id in names


def our_warnings(recorded: pytest.WarningsRecorder) -> list[str]:
    """A measurement of ours that failed is reported as a warning; a user's own code may warn as it likes."""
    return [str(entry.message) for entry in recorded if str(entry.message).startswith("stabilitykit")]


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_the_verdict_is_the_truth_in_every_field(case: Any, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    verdict = nanzoo.run_case(case, adapter.StabilityKit(), tmp_path)

    marks = nanzoo.judge(case, verdict)
    assert all(marks.values()), f"missed {[name for name, good in marks.items() if not good]}: {verdict}"
    if marks.get("line"):
        assert marked_for(case, verdict.line), f"line {verdict.line} is the origin of another case: {verdict}"
    assert not our_warnings(recwarn)


@pytest.mark.parametrize(
    ("case", "mode"),
    [pytest.param(case, mode, id=f"{case.id}-{mode}") for case in CASES for mode in MODES if case.truth.healthy],
)
def test_a_healthy_run_that_cannot_be_replayed_raises_no_alarm(
    case: Any, mode: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    nanzoo.seed_everything()
    loop = case.build()
    monitor = sk.attach(loop.model, loop.optimizer, run_dir=tmp_path / "run", config=sk.MonitorConfig(**adapter.CONFIG))
    try:
        for batch in loop.batches:
            with monitor.step() if mode == "a step block" else nullcontext():
                loop.train_step(batch)
    finally:
        monitor.close()

    assert monitor.diagnosis is None, monitor.diagnosis


def test_no_two_cases_share_an_id() -> None:
    identifiers = [case.id for case in CASES]

    assert len(identifiers) == len(set(identifiers))
