"""What a fault does to a run under each `on_nonfinite`, and what an exception of the caller's own does under all."""

from __future__ import annotations

import gc
import math
import weakref
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stabilitykit as sk

QUIET = sk.MonitorConfig(report=False, compact=False, snapshot_every=1)
FEW_SNAPSHOTS = QUIET.replace(snapshot_every=10)


class Training:
    """Eight batches; those named in `bad` hold a NaN in row 2."""

    def __init__(self, *, bad: tuple[int, ...] = (), without: tuple[int, ...] = (), dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(dropout), nn.Linear(8, 2)
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.batches = [torch.randn(5, 4) for _ in range(8)]
        for index in bad:
            self.batches[index][2, 1] = math.nan
        self.batches = [batch for index, batch in enumerate(self.batches) if index not in without]

    def step(self, batch: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.model(batch).square().mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def run(self) -> list[Tensor]:
        return [self.step(batch) for batch in self.batches]

    def contents(self) -> dict[str, Any]:
        optimizer = self.optimizer.state_dict()["state"]
        return {
            "model": {name: entry.numpy().tobytes() for name, entry in self.model.state_dict().items()},
            "optimizer": {(i, k): v.numpy().tobytes() for i, state in optimizer.items() for k, v in state.items()},
            "torch": torch.get_rng_state().numpy().tobytes(),
        }


def attach(training: Training, run_dir: Path, policy: str, **options: Any) -> sk.Monitor:
    return sk.attach(training.model, training.optimizer, run_dir, config=QUIET.replace(**options), on_nonfinite=policy)


def bits(losses: list[Tensor | None]) -> list[bytes | None]:
    return [None if loss is None else loss.numpy().tobytes() for loss in losses]


# record


@pytest.mark.parametrize("bad", [(0,), (3,), (3, 5), tuple(range(8))], ids=str)
def test_record_leaves_the_run_as_it_would_have_been(bad: tuple[int, ...], tmp_path: Path) -> None:
    bare = Training(bad=bad, dropout=0.5)
    expected = bits(bare.run()), bare.contents()
    watched = Training(bad=bad, dropout=0.5)

    with attach(watched, tmp_path / "run", "record") as monitor:
        step = monitor.replayable(watched.step)
        found = bits([step(batch) for batch in watched.batches]), watched.contents()

    assert found == expected
    assert monitor.diagnosis is not None
    assert monitor.diagnosis.origin.step == bad[0]
    assert monitor.step_index == 8


# raise


@pytest.mark.parametrize("bad", [0, 3])
def test_raise_leaves_the_state_in_which_the_failing_step_began(bad: int, tmp_path: Path) -> None:
    bare = Training(bad=(bad,), dropout=0.5)
    for batch in bare.batches[:bad]:
        bare.step(batch)
    expected = bare.contents()
    watched = Training(bad=(bad,), dropout=0.5)

    with attach(watched, tmp_path / "run", "raise") as monitor:
        step = monitor.replayable(watched.step)
        for batch in watched.batches[:bad]:
            step(batch)
        with pytest.raises(sk.NonFiniteError) as caught:
            step(watched.batches[bad])
        found = watched.contents()

    assert found == expected
    assert caught.value.diagnosis is monitor.diagnosis
    assert monitor.diagnosis.origin.step == bad


def test_the_error_says_step_task_phase_module_operation_line_code_cause_and_remedy(tmp_path: Path) -> None:
    class Head(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return torch.log(inputs.clamp_min(0.0))  # the line to be named

    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": Head()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model["head"](model["body"](batch)).mean()
        loss.backward()
        optimizer.step()
        return loss

    with sk.attach(model, optimizer, tmp_path / "run", config=QUIET) as monitor:
        monitor.log(task=4)
        with pytest.raises(sk.NonFiniteError) as caught:
            monitor.replayable(train_step)(torch.randn(6, 4))

    text = str(caught.value)
    line = Head.forward.__code__.co_firstlineno + 1
    assert (
        f"step 0, task 4: first Inf in the forward phase: `log` in module `head` at {_shown(__file__)}:{line}" in text
    )
    assert "return torch.log(inputs.clamp_min(0.0))" in text
    assert "cause: The logarithm of zero is -Inf" in text
    assert "try: " in text
    assert "noticed in loss; proved by a bit-identical replay" in text


def _shown(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def test_the_diagnosis_is_on_disk_before_anything_is_raised(tmp_path: Path) -> None:
    training = Training(bad=(0,))

    with attach(training, tmp_path / "run", "raise") as monitor:
        try:
            monitor.replayable(training.step)(training.batches[0])
        except sk.NonFiniteError:
            written = sk.Diagnosis.from_json((tmp_path / "run" / "diagnosis.json").read_text())

    assert written.origin == monitor.diagnosis.origin


# skip


@pytest.mark.parametrize("snapshot_every", [1, 5])
@pytest.mark.parametrize("bad", [(0,), (3,), (2, 6), (4, 5)], ids=str)
def test_skip_is_as_if_the_batch_had_never_been(bad: tuple[int, ...], snapshot_every: int, tmp_path: Path) -> None:
    clean = Training(without=bad)
    losses = bits(clean.run())
    watched = Training(bad=bad)

    with attach(watched, tmp_path / "run", "skip", snapshot_every=snapshot_every) as monitor:
        step = monitor.replayable(watched.step)
        found = [step(batch) for batch in watched.batches]

    assert [index for index, loss in enumerate(found) if loss is None] == list(bad)
    assert bits([loss for loss in found if loss is not None]) == losses
    assert watched.contents()["model"] == clean.contents()["model"]
    assert watched.contents()["optimizer"] == clean.contents()["optimizer"]
    assert monitor.step_index == 8


def test_skip_does_not_give_the_next_step_the_random_draws_of_the_failed_one(tmp_path: Path) -> None:
    bare = Training(bad=(3,), dropout=0.5)
    for batch in bare.batches[:4]:
        bare.step(batch)
    after_the_failed_step = bare.contents()["torch"]
    watched = Training(bad=(3,), dropout=0.5)

    with attach(watched, tmp_path / "run", "skip") as monitor:
        step = monitor.replayable(watched.step)
        for batch in watched.batches[:4]:
            step(batch)
        found = watched.contents()["torch"]

    assert found == after_the_failed_step


def test_a_skipped_step_keeps_its_number_and_is_marked(tmp_path: Path) -> None:
    training = Training(bad=(2,))

    with attach(training, tmp_path / "run", "skip") as monitor:
        step = monitor.replayable(training.step)
        for batch in training.batches:
            step(batch)

    steps = sk.open_run(tmp_path / "run").steps()
    assert list(steps["step"]) == list(range(8))
    assert list(steps["skipped"]) == [0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_too_many_undone_steps_in_a_row_end_the_run(policy: str, tmp_path: Path) -> None:
    training = Training(bad=(2, 4, 5, 6))

    with attach(training, tmp_path / "run", policy, max_consecutive_skips=3) as monitor:
        step = monitor.replayable(training.step)
        results = [step(batch) for batch in training.batches[:6]]
        with pytest.raises(sk.NonFiniteError, match="3 steps in a row were undone; step"):
            step(training.batches[6])

    assert [index for index, loss in enumerate(results) if loss is None] == [2, 4, 5]


# rollback


def test_rollback_goes_back_at_least_the_steps_asked_for(tmp_path: Path) -> None:
    training = Training(bad=(6,))
    history = []

    with attach(training, tmp_path / "run", "rollback", rollback_steps=2) as monitor:
        step = monitor.replayable(training.step)
        for batch in training.batches[:6]:
            history.append(training.contents())
            step(batch)
        returned = step(training.batches[6])
        found = training.contents()

    events = sk.open_run(tmp_path / "run").events()
    (message,) = events.loc[events["kind"] == "rollback", "message"]
    back_to = int(message.rsplit(" ", 1)[1])
    assert returned is None
    assert back_to <= 4
    assert (found["model"], found["optimizer"]) == (history[back_to]["model"], history[back_to]["optimizer"])


def test_a_rollback_in_the_first_step_is_a_skip(tmp_path: Path) -> None:
    training = Training(bad=(0,))
    before = training.contents()

    with attach(training, tmp_path / "run", "rollback") as monitor:
        returned = monitor.replayable(training.step)(training.batches[0])
        after = training.contents()

    assert returned is None
    assert (after["model"], after["optimizer"]) == (before["model"], before["optimizer"])


def test_training_goes_on_finite_after_a_rollback(tmp_path: Path) -> None:
    training = Training(bad=(4,))

    with attach(training, tmp_path / "run", "rollback", rollback_steps=2) as monitor:
        step = monitor.replayable(training.step)
        losses = [step(batch) for batch in training.batches]

    assert losses[4] is None
    assert all(math.isfinite(loss) for loss in losses if loss is not None)


# several faults


@pytest.mark.parametrize(
    ("policy", "faulty"),
    [("skip", [2, 4, 6]), ("rollback", [2, 4, 6]), ("record", [2, 3, 4, 5, 6, 7])],  # what is recorded stays NaN
)
def test_faults_beyond_those_to_be_replayed_are_events(policy: str, faulty: list[int], tmp_path: Path) -> None:
    training = Training(bad=(2, 4, 6))

    with attach(training, tmp_path / "run", policy, replays=1) as monitor:
        step = monitor.replayable(training.step)
        for batch in training.batches:
            step(batch)

    run = sk.open_run(tmp_path / "run")
    events = run.events()
    faults = events[events["kind"] == "nonfinite"]
    assert list(faults["step"]) == faulty
    assert [message.startswith("not finite again") for message in faults["message"]] == [step > 2 for step in faulty]
    assert len(run.diagnoses) == 1


def test_each_replayed_fault_has_a_diagnosis_of_its_own_and_the_first_is_the_runs(tmp_path: Path) -> None:
    training = Training(bad=(2, 4))

    with attach(training, tmp_path / "run", "skip") as monitor:
        step = monitor.replayable(training.step)
        for batch in training.batches:
            step(batch)

    assert [found.origin.step for found in sk.open_run(tmp_path / "run").diagnoses] == [2, 4]
    assert monitor.diagnosis.origin.step == 2


# the caller's own exceptions


@pytest.mark.parametrize("policy", ["raise", "rollback"])
@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyError, StopIteration])
def test_an_exception_of_the_callers_passes_through_unchanged(
    kind: type[Exception], policy: str, tmp_path: Path
) -> None:
    bare = Training(dropout=0.5)
    for batch in bare.batches[:3]:
        bare.step(batch)
    expected = bare.contents()
    training = Training(dropout=0.5)
    thrown = kind("expected 4 features, got 3")

    def train_step(batch: Tensor) -> Tensor:
        loss = training.step(batch)
        if batch is training.batches[2]:
            raise thrown
        return loss

    with attach(training, tmp_path / "run", policy) as monitor:
        step = monitor.replayable(train_step)
        step(training.batches[0])
        step(training.batches[1])
        with pytest.raises(kind) as caught:
            step(training.batches[2])
        found = training.contents()

    assert caught.value is thrown
    assert caught.value.__cause__ is None
    assert monitor.diagnosis is None
    assert found == expected


def test_a_shape_error_passes_through_and_the_next_step_runs(tmp_path: Path) -> None:
    training = Training()

    with attach(training, tmp_path / "run", "raise") as monitor:
        step = monitor.replayable(training.step)
        step(training.batches[0])
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            step(torch.randn(5, 3))
        loss = step(training.batches[1])

    assert math.isfinite(loss)
    assert monitor.diagnosis is None


def test_a_wrong_shape_beside_marked_missing_values_is_still_the_callers_error(tmp_path: Path) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    targets = torch.tensor([1.0, math.nan, 2.0])  # NaN marks a missing target

    def train_step(inputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        optimizer.zero_grad()
        known = ~torch.isnan(targets)
        if weights.shape != targets.shape:
            raise ValueError(f"got {len(weights)} weights, expected {len(targets)}")
        loss = (weights * (model(inputs)[:, 0] - targets))[known].square().mean()
        loss.backward()
        optimizer.step()
        return loss

    with (
        sk.attach(model, optimizer, tmp_path / "run", config=QUIET) as monitor,
        pytest.raises(ValueError, match="got 2 weights") as caught,
    ):
        monitor.replayable(train_step)(torch.randn(3, 4), targets, torch.ones(2))

    assert not isinstance(caught.value, sk.NonFiniteError)
    assert monitor.diagnosis is None


def test_an_assertion_of_the_callers_about_a_nan_is_told_with_its_origin(tmp_path: Path) -> None:
    training = Training(bad=(1,))

    def train_step(batch: Tensor) -> Tensor:
        training.optimizer.zero_grad()
        loss = training.model(batch).square().mean()
        assert torch.isfinite(loss), "loss is nan"
        loss.backward()
        training.optimizer.step()
        return loss

    with attach(training, tmp_path / "run", "raise") as monitor:
        step = monitor.replayable(train_step)
        step(training.batches[0])
        with pytest.raises(sk.NonFiniteError) as caught:
            step(training.batches[1])

    assert isinstance(caught.value.__cause__, AssertionError)
    assert (monitor.diagnosis.origin.phase, monitor.diagnosis.origin.samples) == ("data", (2,))


@pytest.mark.parametrize("left", [KeyboardInterrupt, SystemExit, StopIteration, KeyError])
def test_a_step_that_was_left_half_way_is_not_run_again_on_the_way_to_a_later_one(
    left: type[BaseException], tmp_path: Path
) -> None:
    training = Training(bad=(6,))
    calls: list[int] = []

    with sk.attach(training.model, training.optimizer, tmp_path / "run", config=FEW_SNAPSHOTS) as monitor:

        @monitor.replayable
        def step(index: int) -> Tensor:
            calls.append(index)
            loss = training.step(training.batches[index])
            if index == 3:
                raise left("enough")
            return loss

        for index in range(3):
            step(index)
        with pytest.raises(left):
            step(3)
        for index in range(4, 6):
            step(index)
        before = len(calls)
        with pytest.raises(sk.NonFiniteError, match="bit-identical"):
            step(6)

    assert 3 not in calls[before:]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interruption_passes_and_training_can_go_on(interruption: type[BaseException], tmp_path: Path) -> None:
    training = Training()
    interrupted = [True]

    def train_step(batch: Tensor) -> Tensor:
        loss = training.step(batch)
        if interrupted[0]:
            interrupted[0] = False
            raise interruption
        return loss

    with attach(training, tmp_path / "run", "raise") as monitor:
        step = monitor.replayable(train_step)
        with pytest.raises(interruption):
            step(training.batches[0])
        loss = step(training.batches[1])

    assert math.isfinite(loss)
    assert monitor.diagnosis is None
    assert not monitor.replaying


@pytest.mark.parametrize("rerun", range(1, 5), ids=lambda rerun: f"step run again: {rerun}")
def test_an_interruption_of_a_replay_leaves_the_state_that_the_step_had_left(rerun: int, tmp_path: Path) -> None:
    bare = Training(bad=(3,), dropout=0.5)
    for batch in bare.batches[:4]:
        bare.step(batch)
    watched = Training(bad=(3,), dropout=0.5)
    runs = [0]

    def train_step(batch: Tensor) -> Tensor:
        runs[0] += 1
        if runs[0] == 4 + rerun:
            raise KeyboardInterrupt
        return watched.step(batch)

    with attach(watched, tmp_path / "run", "skip", snapshot_every=10) as monitor:
        step = monitor.replayable(train_step)
        for batch in watched.batches[:3]:
            step(batch)
        with pytest.raises(KeyboardInterrupt):
            step(watched.batches[3])
        found = watched.contents()

    assert found == bare.contents()
    assert not monitor.replaying


def test_what_a_step_made_is_gone_once_its_exception_is_handled(tmp_path: Path) -> None:
    training = Training()
    made: list[weakref.ref[Tensor]] = []

    def train_step(batch: Tensor) -> Tensor:
        activations = training.model(batch) + torch.zeros(1_000, 1, 1)
        made.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("simulated")

    with attach(training, tmp_path / "run", "raise") as monitor:
        step = monitor.replayable(train_step)
        gc.disable()
        try:
            for batch in training.batches:
                with suppress(torch.OutOfMemoryError):
                    step(batch)
            alive = [reference() is not None for reference in made]
        finally:
            gc.enable()

    assert alive == [False] * len(training.batches)  # and none was run again: memory that ran out is no number


def test_a_running_statistic_spoilt_between_two_steps_is_an_event_and_no_fault(tmp_path: Path) -> None:
    training = Training()

    with sk.attach(training.model, training.optimizer, tmp_path / "run", config=QUIET) as monitor:
        step = monitor.replayable(training.step)
        for index, batch in enumerate(training.batches):
            if index == 3:
                training.model[1].running_mean.data[2] = math.nan
            step(batch)

    events = sk.open_run(tmp_path / "run").events()
    assert monitor.diagnosis is None
    assert list(events[events.kind == "module_buffer"].subject) == ["1.running_mean"]


# without a replayable step


@pytest.mark.parametrize("blocks", [True, False])
def test_raise_without_a_replay_names_module_and_step_before_the_update(blocks: bool, tmp_path: Path) -> None:
    training = Training(bad=(2,))

    def step(batch: Tensor) -> None:
        with monitor.step() if blocks else nullcontext():
            training.step(batch)

    with attach(training, tmp_path / "run", "raise") as monitor:
        step(training.batches[0])
        step(training.batches[1])
        before = [entry.clone() for entry in training.model.parameters()]
        with pytest.raises(sk.NonFiniteError) as caught:
            step(training.batches[2])

    origin = caught.value.diagnosis.origin
    assert (origin.step, origin.phase, origin.proof) == (2, "data", "hooks")
    assert all(map(torch.equal, before, training.model.parameters()))


def test_skip_without_a_replay_leaves_the_parameters_alone(tmp_path: Path) -> None:
    training = Training(bad=(2,))

    with attach(training, tmp_path / "run", "skip") as monitor:
        for index, batch in enumerate(training.batches):
            before = [entry.clone() for entry in training.model.parameters()]
            with monitor.step():
                training.step(batch)
            if index == 2:
                assert all(map(torch.equal, before, training.model.parameters()))

    assert monitor.diagnosis.origin.step == 2
    assert all(entry.isfinite().all() for entry in training.model.parameters())


# a step that depends on more than it is given


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_a_run_is_never_put_into_a_state_that_only_the_repetition_of_its_steps_has_made(
    policy: str, tmp_path: Path
) -> None:
    training, outside = Training(), {"divisor": 1.0}

    def step(batch: Tensor) -> Tensor:
        training.optimizer.zero_grad()
        loss = training.model(batch).square().mean() / outside["divisor"]  # the past ones will see the last's
        loss.backward()
        training.optimizer.step()
        return loss.detach()

    with attach(training, tmp_path / "run", policy, snapshot_every=10) as monitor:
        watched = monitor.replayable(step)
        before = training.contents()["model"]
        for index, batch in enumerate(training.batches):
            outside["divisor"] = 0.0 if index == 5 else 1.0
            raises = policy == "raise" and index == 5
            with pytest.raises(sk.NonFiniteError) if raises else nullcontext():
                watched(batch)
            if index == 5:
                assert training.contents()["model"] == before

    run = sk.open_run(tmp_path / "run")
    assert all(entry.isfinite().all() for entry in training.model.parameters())
    assert "went bad when they were run again" in " ".join(run.events()["message"])
    assert list(run.steps()["skipped"]) == [index == 5 for index in range(8)]
    tensors = run.tensors()
    assert not tensors[(tensors["step"] < 5) & (tensors["nan"] + tensors["posinf"] > 0)].shape[0]
