"""The synthetic runs as fixtures; written once a session, since reports only read them."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

import synthetic_runs
from synthetic_runs import HOSTILE, write_run

from stabilitykit.read import Run, open_run
from stabilitykit.schema import Event

CLIPPED = Event(kind="guard", subject="gradient_clipping", message="norm 3.1 clipped to 1.0")
SKIPPED = Event(kind="scaler_skip", severity="warning", subject="scaler", message="gradients overflowed")


@pytest.fixture(scope="session")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Run:
    results = {"class_il": 39.42, "accuracy": [[91.2], [71.3, 88.1]], "guards": {"precision": 0}}
    folder = tmp_path_factory.mktemp("runs") / "healthy"
    return open_run(write_run(folder, num_steps=150, meta={"results": results}, events=(CLIPPED, SKIPPED)))


@pytest.fixture(scope="session")
def diverging(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(write_run(tmp_path_factory.mktemp("runs") / "diverging", fault=True, ending="raised"))


@pytest.fixture(scope="session")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(write_run(tmp_path_factory.mktemp("runs") / "killed", num_steps=30, ending="killed"))


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(write_run(tmp_path_factory.mktemp("runs") / "empty", num_steps=0))


@pytest.fixture(scope="session")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(write_run(tmp_path_factory.mktemp("runs") / "one_step", num_steps=1, tasks=0))


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Run:
    events = tuple(Event(kind=text, subject=text, message=text, severity="warning") for text in HOSTILE)
    meta = {
        "name": HOSTILE[0],
        "command": list(HOSTILE),
        "config": {HOSTILE[1]: HOSTILE[2]},
        "results": {HOSTILE[0]: HOSTILE[1]},
    }
    folder = write_run(
        tmp_path_factory.mktemp("runs") / "hostile",
        layers=HOSTILE,
        fault=True,
        ending="raised",
        meta=meta,
        events=events,
    )
    for layers in (HOSTILE, tuple(reversed(HOSTILE))):
        text = synthetic_runs.diagnosis(layers, 239).to_json()
        (folder / f"diagnosis-{layers.index(HOSTILE[0]):04}.json").write_text(text)
    return open_run(folder)


@pytest.fixture(params=["healthy", "diverging", "killed", "empty", "one_step", "hostile"])
def any_run(request: pytest.FixtureRequest) -> Run:
    run: Run = request.getfixturevalue(request.param)
    return run
