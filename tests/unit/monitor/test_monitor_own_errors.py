"""A fault of our own never becomes a fault of the training: one warning, one event, the same bits."""

from __future__ import annotations

import importlib
import json
import re
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabilitykit as sk

FULL = sk.MonitorConfig(report=False, compact=False, cadence=1, optimizer_state=True, audit_every=1, snapshot_every=1)

MEASUREMENTS = {
    "a row's measurement": "stabilitykit.watch.rows.ordinary",
    "the statistics of small tensors": "stabilitykit.watch.rows.measure_each",
    "the rows of a step": "stabilitykit.watch.rows._Blank.filled",
    "the norms of a trail": "stabilitykit.watch.modules.tensor_norms",
    "the norms of gradients": "stabilitykit.watch.gradients.GradientTracker._norms",
    "the norms of module buffers": "stabilitykit.watch.module_buffers.tensor_norms",
    "the norms before a step": "stabilitykit.watch.writes.ParameterNorms._measure",
    "the sentinel's transfer": "stabilitykit.watch.sentinel.transfer",
    "the norm of an update": "stabilitykit.watch.parameters.tensor_norms",
    "the buffer's audit": "stabilitykit.monitor.ledger.full_audit",
    "a snapshot": "stabilitykit.snapshot.TrainingState.capture",
    "a step's random state": "stabilitykit.snapshot.TrainingState.moment",
    "a step's fingerprint": "stabilitykit.snapshot.TrainingState.fingerprint",
}
ONLY = {  # a trail is kept for want of a replay, a state for the sake of one
    "the norms of a trail": "blocks",
    "the norms before a step": "replayable",
    "a snapshot": "replayable",
    "a step's random state": "replayable",
    "a step's fingerprint": "replayable",
}
CASES = [(name, mode) for name in MEASUREMENTS for mode in ("replayable", "blocks") if ONLY.get(name, mode) == mode]


class Broken(Exception):
    """What a measurement of ours raises."""


def training() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return model, optimizer, step


def outcome(model: nn.Module, losses: list[Tensor]) -> list[bytes]:
    return [entry.numpy(force=True).tobytes() for entry in (*losses, *model.parameters(), torch.get_rng_state())]


def fail(*_args: Any, **_kwargs: Any) -> None:
    raise Broken("ours")


def break_(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, name = target.rpartition(".")
    try:
        owner = importlib.import_module(module)
    except ModuleNotFoundError:
        outer, _, kind = module.rpartition(".")
        owner = getattr(importlib.import_module(outer), kind)
    assert hasattr(owner, name)
    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize(("measurement", "mode"), CASES)
def test_training_goes_on_bit_for_bit_when_a_measurement_of_ours_fails(
    measurement: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, step = training()
    batches = [torch.randn(3, 4) for _ in range(4)]
    expected = outcome(model, [step(batch) for batch in batches])
    model, optimizer, step = training()
    batches = [torch.randn(3, 4) for _ in range(4)]
    buffer = {"examples": torch.zeros(2, 4)}

    with sk.attach(model, optimizer, tmp_path / "run", config=FULL, replay_buffer=buffer) as monitor:
        break_(MEASUREMENTS[measurement], monkeypatch)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            losses = list(map(monitor.replayable(step) if mode == "replayable" else in_blocks(monitor, step), batches))
        found = outcome(model, losses)

    assert found == expected
    said = [str(entry.message) for entry in caught if issubclass(entry.category, RuntimeWarning)]
    run = sk.open_run(tmp_path / "run")
    events = run.events()
    assert len(said) == 1
    assert "ours" in said[0]
    assert list(events["kind"]).count("own_error") == 1
    assert any("measurements failed from step" in sentence and "ours" in sentence for sentence in run.damage)
    assert monitor.diagnosis is None


def in_blocks(monitor: sk.Monitor, step: Any) -> Any:
    def run(batch: Tensor) -> Tensor:
        with monitor.step():
            return step(batch)

    return run


def test_a_stateful_object_that_cannot_be_captured_costs_the_replay_and_not_the_training(tmp_path: Path) -> None:
    class Stubborn:
        def state_dict(self) -> dict[str, int]:
            raise Broken("not now")

        def load_state_dict(self, state: dict[str, int]) -> None:
            raise AssertionError("never captured")

    model, optimizer, step = training()

    with (
        sk.attach(model, optimizer, tmp_path / "run", config=FULL, stateful=[Stubborn()]) as monitor,
        pytest.warns(RuntimeWarning, match="not now"),
    ):
        loss = monitor.replayable(step)(torch.randn(3, 4))

    assert loss.isfinite()


@pytest.mark.parametrize("policy", ["record", "skip"])
def test_a_replay_that_fails_does_not_break_the_run(
    policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, step = training()
    bad = torch.full((3, 4), torch.nan)

    with sk.attach(model, optimizer, tmp_path / "run", config=FULL, on_nonfinite=policy) as monitor:
        watched = monitor.replayable(step)
        watched(torch.randn(3, 4))
        break_("stabilitykit.monitor.inquiry.retrace", monkeypatch)
        with pytest.warns(RuntimeWarning, match="ours"):
            watched(bad)

    assert monitor.diagnosis is not None
    assert monitor.diagnosis.origin.step == 1
    assert monitor.diagnosis.origin.proof != "replayed"


def no_memory(*_args: Any, **_kwargs: Any) -> None:
    raise torch.OutOfMemoryError("no room for a copy")


@pytest.mark.parametrize("held", [True, False], ids=["during the look", "before the step"])
@pytest.mark.parametrize("policy", ["record", "skip", "rollback", "raise"])
def test_where_there_is_no_room_for_a_copy_the_fault_is_told_without_a_replay(
    policy: Any, held: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, step = training()
    config = FULL.replace(snapshot_every=50 if held else 1)

    with sk.attach(model, optimizer, tmp_path / "run", config=config, on_nonfinite=policy) as monitor:
        watched = monitor.replayable(step)
        watched(torch.randn(3, 4))
        monkeypatch.setattr("stabilitykit.snapshot.TrainingState.capture", no_memory)
        ended = pytest.raises(sk.NonFiniteError) if policy == "raise" else nullcontext()
        with pytest.warns(RuntimeWarning, match="no room"), ended:
            watched(torch.full((3, 4), torch.nan))

    assert monitor.diagnosis is not None
    assert monitor.diagnosis.origin.step == 1
    assert "could not be copied (OutOfMemoryError: no room" in monitor.diagnosis.remedies[0]


class Refuses:
    """It gives its state and does not take it back."""

    def state_dict(self) -> dict[str, int]:
        return {"count": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise Broken("ours")


@pytest.mark.parametrize("policy", ["record", "skip", "rollback"])
def test_an_object_that_refuses_its_state_keeps_nothing_else_from_being_put_back(policy: Any, tmp_path: Path) -> None:
    model, optimizer, step = training()
    batches = list(torch.randn(3, 3, 4))

    options: dict[str, Any] = {"config": FULL, "on_nonfinite": policy, "stateful": [Refuses()]}
    with sk.attach(model, optimizer, tmp_path / "run", **options) as monitor:
        watched = monitor.replayable(step)
        for batch in batches:
            watched(batch)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with pytest.warns(RuntimeWarning, match="ours"):
            watched(torch.full((3, 4), torch.nan))

    assert monitor.diagnosis is not None
    assert monitor.diagnosis.origin.proof == "replayed"
    kept = [torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True)]
    assert kept == [policy == "skip"] * len(kept)


@pytest.mark.parametrize("policy", ["record", "skip"])
def test_a_fault_is_looked_into_although_the_rows_of_its_step_cannot_be_made(
    policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, step = training()
    bad = torch.full((3, 4), torch.nan)

    with sk.attach(model, optimizer, tmp_path / "run", config=FULL, on_nonfinite=policy) as monitor:
        watched = monitor.replayable(step)
        watched(torch.randn(3, 4))
        break_("stabilitykit.watch.rows._Blank.filled", monkeypatch)
        with pytest.warns(RuntimeWarning, match="ours"):
            watched(bad)

    assert monitor.diagnosis is not None
    assert monitor.diagnosis.origin.step == 1


def test_scalars_that_are_no_numbers_do_not_break_the_run(tmp_path: Path) -> None:
    model, optimizer, step = training()

    with (
        sk.attach(model, optimizer, tmp_path / "run", config=FULL) as monitor,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)
        monitor.log(accuracy=torch.ones(2), note="text", good=0.5, task="first")  # type: ignore[arg-type]
        loss = monitor.replayable(step)(torch.randn(3, 4))

    assert loss.isfinite()
    steps = sk.open_run(tmp_path / "run").steps()
    assert steps["good"].tolist() == [0.5]
    assert "accuracy" not in steps


@pytest.mark.filterwarnings("ignore:stabilitykit. a measurement failed:RuntimeWarning")
@pytest.mark.parametrize("scalar", [torch.tensor(1 + 2j), torch.empty((), device="meta")], ids=["complex", "meta"])
def test_a_scalar_that_cannot_be_brought_over_costs_no_step_its_rows(scalar: Tensor, tmp_path: Path) -> None:
    model, optimizer, step = training()

    with sk.attach(model, optimizer, tmp_path / "run", config=FULL) as monitor:
        watched = monitor.replayable(step)
        watched(torch.randn(3, 4))
        monitor.log(phase=scalar, good=0.5)
        watched(torch.randn(3, 4))
        watched(torch.randn(3, 4))

    run = sk.open_run(tmp_path / "run")
    steps, (damage,) = run.steps(), run.damage
    assert re.search(r"log: got a (complex|meta) tensor of shape \(\) as phase, expected a number", damage)
    assert steps["step"].tolist() == [0, 1, 2]
    assert steps["good"].tolist()[1] == 0.5
    assert "phase" not in steps


def test_a_loss_term_that_is_no_number_hides_no_fault(tmp_path: Path) -> None:
    model, optimizer, step = training()

    with sk.attach(model, optimizer, tmp_path / "run", config=FULL, on_nonfinite="record") as monitor:

        @monitor.replayable
        def watched(batch: Tensor) -> Tensor:
            monitor.log_loss(terms=torch.ones(2), ce=torch.tensor([0.5]))
            return step(batch)

        with pytest.warns(RuntimeWarning, match=r"log_loss: got a tensor of shape \(2,\) as terms, expected a number"):
            watched(torch.full((3, 4), torch.nan))

    assert monitor.diagnosis is not None
    assert monitor.diagnosis.origin.phase == "data"


def test_facts_and_events_may_hold_anything(tmp_path: Path) -> None:
    model, optimizer, step = training()

    with sk.attach(model, optimizer, tmp_path / "run", config=FULL) as monitor:
        monitor.note(accuracy=np.float32(0.5), score=torch.tensor(0.25), where=Path("a/b"), classes={3}, what=object)
        monitor.log_event("evaluated", "done", accuracy=np.float32(0.5), matrix=torch.eye(2), severity="dreadful")
        monitor.replayable(step)(torch.randn(3, 4))

    run = sk.open_run(tmp_path / "run")
    assert run.ending == "completed"
    assert run.meta["accuracy"] == 0.5
    assert run.meta["score"] == 0.25
    assert run.meta["where"] == "a/b"
    assert run.meta["classes"] == [3]
    assert json.loads(run.events()["data"][0]) == {"accuracy": 0.5, "matrix": [[1.0, 0.0], [0.0, 1.0]]}
