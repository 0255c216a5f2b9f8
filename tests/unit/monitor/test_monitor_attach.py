"""What attach accepts, what it refuses and how it says so."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stabilitykit as sk
from stabilitykit.config import PRESETS

QUIET = sk.MonitorConfig(report=False, compact=False)


@pytest.fixture
def model() -> nn.Module:
    return nn.Linear(2, 2)


class Outer(torch.optim.Optimizer):
    """An optimizer by its class alone, as wrappers of training libraries are."""

    def __init__(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)


def hooks(model: nn.Module) -> int:
    of_parameters = (entry._post_accumulate_grad_hooks or () for entry in model.parameters())
    return len(model._forward_hooks) + len(model._forward_pre_hooks) + sum(map(len, of_parameters))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"model": 3}, "attach: got a int as model, expected a torch.nn.Module"),
        ({"optimizer": 3.5}, "attach: got a float as optimizer, expected"),
        ({"optimizer": "adam"}, "attach: got str as optimizer, expected a torch.optim.Optimizer"),
        ({"optimizer": [3]}, "attach: got int as optimizer, expected a torch.optim.Optimizer"),
        ({"on_nonfinite": "explode"}, "attach: got on_nonfinite='explode', expected one of raise, skip"),
        ({"config": "huge"}, "attach: got config 'huge', expected a MonitorConfig or one of light, default, full"),
        ({"stateful": [object()]}, "attach: got a stateful object, expected state_dict"),
        ({"stateful": [None]}, "attach: got"),
        ({"replay_buffer": object()}, "expected"),
        ({"scaler": object()}, "expected"),
        ({"stateful": 3}, "expected"),
        ({"config": 3}, "attach: got config 3, expected"),
        ({"config": {"cadence": 3}}, "attach: got config .*, expected a MonitorConfig or one of light"),
        ({"run_dir": 3}, "attach: got run_dir=3, expected a path"),
        ({"run_dir": ""}, "attach: got run_dir='', expected a path"),
    ],
    ids=str,
)
def test_an_argument_that_cannot_be_right_is_refused_in_one_clear_line(
    arguments: dict[str, Any], complaint: str, tmp_path: Path, model: nn.Module
) -> None:
    given = {"model": model, "run_dir": tmp_path / "run", "config": QUIET} | arguments

    with pytest.raises(sk.UsageError, match=complaint) as caught:
        sk.attach(**given).close()

    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"cadence": 0}, "got cadence=0, expected at least 1"),
        ({"budget": -0.1}, "got budget=-0.1, expected at least 0"),
        ({"budget": float("nan")}, "got budget=nan, expected at least 0"),
        ({"max_consecutive_skips": 0}, "got max_consecutive_skips=0, expected at least 1"),
        ({"snapshot_every": 0}, "got snapshot_every=0, expected at least 1"),
        ({"replays": -1}, "got replays=-1, expected at least 0"),
    ],
    ids=str,
)
def test_an_option_out_of_its_range_is_refused_with_the_range(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(sk.UsageError, match=complaint):
        sk.MonitorConfig(**options)


@pytest.mark.parametrize(
    "options", [{"cadence": "often"}, {"cadence": 1.5}, {"replays": True}, {"budget": None}], ids=str
)
def test_an_option_of_another_kind_is_refused_with_the_kind(options: dict[str, Any]) -> None:
    with pytest.raises(sk.UsageError, match=r"MonitorConfig: got .*, expected a (whole )?number of at least"):
        sk.MonitorConfig(**options)


async def deferred() -> None:
    """A step that is done when somebody waits for it."""


def generated() -> Iterator[None]:
    """A step that is done when somebody draws from it."""
    yield


class Awaited:
    """A trainer whose call is a coroutine."""

    async def __call__(self) -> None: ...


@pytest.mark.parametrize(
    "function",
    [torch.tensor(0.5), None, deferred, generated, partial(deferred), partial(partial(generated)), Awaited()],
    ids=["tensor", "None", "coroutine", "generator", "part", "part of a part", "call"],
)
def test_what_has_not_done_its_step_when_it_returns_is_refused(function: Any, tmp_path: Path, model: nn.Module) -> None:
    with (
        sk.attach(model, None, tmp_path / "run", config=QUIET) as monitor,
        pytest.raises(sk.UsageError, match=r"replayable: got .*, expected"),
    ):
        monitor.replayable(function)


def test_a_copy_of_whatever_holds_the_monitor_leaves_the_record_alone(tmp_path: Path, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sk.attach(model, optimizer, tmp_path / "run", config=QUIET) as monitor:
        for _ in range(3):
            trainer = copy.deepcopy({"model": model, "monitor": monitor})
            assert trainer["monitor"] is monitor
            del trainer
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()

    run = sk.open_run(tmp_path / "run")
    assert len(run.steps()) == 3
    assert run.damage == []


def test_the_report_is_found_although_the_script_has_changed_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: nn.Module
) -> None:
    monkeypatch.chdir(tmp_path)
    monitor = sk.attach(model, None, "run", config=sk.MonitorConfig(compact=False))
    assert monitor.report == Path("run/report.html")

    monkeypatch.chdir("/")
    monitor.close()

    assert monitor.report == tmp_path / "run" / "report.html"
    assert monitor.report.exists()


def test_an_option_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(sk.UsageError, match=r"got cadense, expected one of .*cadence"):
        QUIET.replace(cadense=3)


def test_the_presets_cost_more_and_record_more_in_this_order() -> None:
    assert list(PRESETS) == ["light", "default", "full"]
    assert PRESETS["light"].cadence > PRESETS["full"].cadence == 1
    assert sk.MonitorConfig.of(None) == PRESETS["default"] == sk.MonitorConfig()


def test_a_run_folder_that_holds_a_run_is_refused_and_left_as_it_was(tmp_path: Path, model: nn.Module) -> None:
    sk.attach(model, None, tmp_path / "run", config=QUIET).close()
    before = (tmp_path / "run" / "run.json").read_bytes()

    with pytest.raises(sk.RunFolderError, match=r"holds the run of .*resume=True"):
        sk.attach(model, None, tmp_path / "run", config=QUIET)

    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert hooks(model) == 0


def test_a_run_can_be_resumed_as_its_next_attempt(tmp_path: Path, model: nn.Module) -> None:
    sk.attach(model, None, tmp_path / "run", config=QUIET).close()

    sk.attach(model, None, tmp_path / "run", config=QUIET.replace(resume=True)).close()

    attempts = json.loads((tmp_path / "run" / "run.json").read_text())["attempts"]
    assert [entry["attempt"] for entry in attempts] == [0, 1]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, model: nn.Module) -> None:
    (tmp_path / "run").write_text("not a folder")

    with pytest.raises(sk.RunFolderError, match="expected one that can be written; choose another run_dir"):
        sk.attach(model, None, tmp_path / "run", config=QUIET)

    assert hooks(model) == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, model: nn.Module) -> None:
    tmp_path.chmod(0o500)

    with pytest.raises(sk.RunFolderError, match="expected one that can be written"):
        sk.attach(model, None, tmp_path / "run", config=QUIET)


def test_a_damaged_run_json_is_refused(tmp_path: Path, model: nn.Module) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")

    with pytest.raises(sk.RunFolderError, match="run folder"):
        sk.attach(model, None, tmp_path / "run", config=QUIET)


def test_without_a_run_folder_one_is_made_from_the_time(
    tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    monitors = [sk.attach(model, config=QUIET) for _ in range(2)]
    folders = {monitor.run_dir for monitor in monitors}
    for monitor in monitors:
        monitor.close()

    assert len(folders) == 2
    assert all(folder.parent == Path("runs") and (folder / "run.json").exists() for folder in folders)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(),
        lambda: nn.Linear(2, 2).requires_grad_(False),
        lambda: nn.Linear(2, 2, device="meta"),
        lambda: nn.LazyLinear(2),
        lambda: nn.Linear(2, 2).half(),
        lambda: nn.Linear(2, 2, dtype=torch.complex64),
        lambda: nn.EmbeddingBag(3, 2, sparse=True),
    ],
    ids=["empty", "frozen", "meta", "lazy", "half", "complex", "embedding"],
)
def test_every_kind_of_model_can_be_attached(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    with sk.attach(build(), None, tmp_path / "run", config=QUIET) as monitor:
        assert monitor.diagnosis is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_a_model_with_a_scripted_part_can_be_attached_and_trained(tmp_path: Path) -> None:
    model = nn.Sequential(torch.jit.script(nn.Linear(2, 3)), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    with sk.attach(model, optimizer, tmp_path / "run", config=QUIET) as monitor:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    assert monitor.step_index == 1
    modules = json.loads((tmp_path / "run" / "run.json").read_text())["modules"]
    assert [entry["name"] for entry in modules] == ["", "0", "1"]


def test_a_lazy_layer_trains_and_its_faults_are_told(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(batch: torch.Tensor) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    with sk.attach(model, optimizer, tmp_path / "run", config=QUIET, on_nonfinite="record") as monitor:
        watched = monitor.replayable(step)
        losses = [watched(torch.ones(3, 4)) for _ in range(2)]
        watched(torch.full((3, 4), torch.nan))

    assert losses[1] < losses[0]
    assert (monitor.diagnosis.origin.step, monitor.diagnosis.origin.phase) == (2, "data")
    assert hooks(model) == 0


def test_several_optimizers_are_watched(tmp_path: Path) -> None:
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    model = nn.ModuleList([one, two])
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.1), torch.optim.Adam(two.parameters(), lr=0.2)]

    def step() -> torch.Tensor:
        for part, optimizer in zip(model, optimizers, strict=True):
            optimizer.zero_grad()
            part(torch.ones(1, 1)).sum().backward()
            optimizer.step()
        return torch.zeros(())

    with sk.attach(model, optimizers, tmp_path / "run", config=QUIET) as monitor:
        monitor.replayable(step)()

    steps = sk.open_run(tmp_path / "run").steps()
    assert (steps["lr"][0], steps["lr/1"][0]) == (0.1, 0.2)
    assert monitor.step_index == 1


def test_closing_twice_is_harmless_and_the_ending_is_told(tmp_path: Path, model: nn.Module) -> None:
    monitor = sk.attach(model, None, tmp_path / "run", config=QUIET)

    monitor.close()
    monitor.close()

    assert sk.open_run(tmp_path / "run").ending == "completed"


def test_a_block_left_by_an_exception_ends_the_run_as_raised(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(KeyError), sk.attach(model, None, tmp_path / "run", config=QUIET):
        raise KeyError("lost")

    run = sk.open_run(tmp_path / "run")
    assert run.ending == "raised"
    assert "lost" in run.ending_facts["error"]


def test_what_the_caller_logs_is_in_the_record_with_the_step_it_belongs_to(tmp_path: Path, model: nn.Module) -> None:
    with sk.attach(model, None, tmp_path / "run", config=QUIET) as monitor:

        def train_step(value: float) -> torch.Tensor:
            monitor.log_loss(ce=torch.tensor(value), kl=0.5)
            monitor.log(accuracy=value / 2, task=int(value))
            return torch.tensor(value + 0.5)

        step = monitor.replayable(train_step)
        for value in (1.0, 2.0):
            step(value)
        monitor.log_event("guard", "acted", severity="warning", subject="loss", times=3)
        monitor.note(results={"class_il": 0.5})

    run = sk.open_run(tmp_path / "run")
    steps, events = run.steps(), run.events()
    assert list(steps["loss"]) == [1.5, 2.5]
    assert list(steps["loss/ce"]) == [1.0, 2.0]
    assert list(steps["accuracy"]) == [0.5, 1.0]
    assert list(steps["task"]) == [1, 2]
    assert list(events["kind"]) == ["task", "task", "guard"]
    assert run.meta["results"] == {"class_il": 0.5}


def test_the_optimizer_in_a_wrapper_is_followed(tmp_path: Path, model: nn.Module) -> None:
    outer = Outer(torch.optim.SGD(model.parameters(), lr=0.25))

    def step(batch: torch.Tensor) -> torch.Tensor:
        outer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        outer.step()
        return loss

    with sk.attach(model, outer, tmp_path / "run", config=QUIET, on_nonfinite="record") as monitor:
        watched = monitor.replayable(step)
        watched(torch.ones(3, 2))
        watched(torch.full((3, 2), torch.nan))

    assert (monitor.diagnosis.origin.step, monitor.diagnosis.origin.proof) == (1, "replayed")
    assert sk.open_run(tmp_path / "run").steps()["lr"].tolist() == [0.25, 0.25]


def test_an_optimizer_by_its_class_alone_is_refused(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(
        sk.UsageError, match=r"got a Outer that has not called Optimizer.__init__ as optimizer, expected"
    ):
        sk.attach(model, Outer(None), tmp_path / "run", config=QUIET)

    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "target",
    [
        "stabilitykit.watch.watch.Sentinel",
        "stabilitykit.watch.sentinel.Sentinel.follow",
        "stabilitykit.monitor.faults.is_finite",
    ],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_what_cannot_be_attached_to_is_left_as_it_was(
    target: str, resumed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.BatchNorm1d(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run_dir = tmp_path / "run"
    if resumed:
        sk.attach(model, optimizer, run_dir, config=QUIET).close()
    before = json.loads((run_dir / "run.json").read_text()) if resumed else None

    def fail(*_: object, **_options: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(target, fail)
        with pytest.raises(MemoryError):
            sk.attach(model, optimizer, run_dir, config=QUIET.replace(resume=resumed))

    assert hooks(model) + len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks) == 0
    assert run_dir.exists() == resumed
    assert not resumed or json.loads((run_dir / "run.json").read_text()) == before
    sk.attach(model, optimizer, run_dir, config=QUIET.replace(resume=resumed)).close()
