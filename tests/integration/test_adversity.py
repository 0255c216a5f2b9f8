"""Disks fill up, folders vanish, processes are forked, interrupted and ended: training is what it would have been.

Each time the one warning is there, and the run says what is missing from it.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from small_training import CONFIG, NUM_STEPS, Training, bare, batches
from torch.utils.data import DataLoader, TensorDataset

import stabilitykit as sk
from stabilitykit.record.folder import list_segments

PROGRAM = Path(__file__).with_name("small_training.py")
Act = Callable[[], object]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    folder.mkdir()
    try:
        subprocess.run(["mount", *options, str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting needs privileges that this process does not have")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=2m", "none") as folder:
        yield folder


def fill(disk: Path) -> None:
    with (disk / "filler").open("ab", buffering=0) as file, suppress(OSError):
        while file.write(bytes(4096)):
            pass


def train(run_dir: Path, actions: dict[int, Act], config: sk.MonitorConfig = CONFIG) -> tuple[list[bytes], list[str]]:
    """What a watched training was, with something done before some of its steps, and the warnings it gave."""
    training = Training()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor, step = training.attach(run_dir, config)
        for index, batch in enumerate(batches()):
            actions.get(index, lambda: None)()
            step(batch)
        monitor.close()
    return training.state(), [str(entry.message) for entry in caught if entry.category is RuntimeWarning]


def check_gap(run_dir: Path, reason: str) -> list[int]:
    """The steps that are missing; exactly these are told, in the events, in `damage` and in the report."""
    run = sk.open_run(run_dir)
    missing = sorted(set(range(NUM_STEPS)) - set(run.steps()["step"]))
    events = run.events()
    told = events[events["kind"] == "lost_rows"]
    assert [sentence for sentence in run.damage if reason in sentence] == told["message"].tolist()
    text = sk.write_report(run, run_dir / "report.txt", format="text").read_text()
    assert ("writes lost" in text) == bool(missing)
    spans = [f"step {missing[0]}:", f"steps {missing[0]} to {missing[-1]}:"] if missing else []
    assert len(told) == bool(missing)
    assert not missing or any(span in told["message"].iloc[0] for span in spans)
    return missing


def test_a_disk_that_is_full_from_any_frame_on_and_has_room_again_costs_the_steps_between(small_disk: Path) -> None:
    expected, costs = bare(), []
    for first in range(NUM_STEPS - 4):
        run_dir = small_disk / f"run-{first}"

        found, said = train(run_dir, {first: lambda: fill(small_disk), first + 4: (small_disk / "filler").unlink})

        assert found == expected
        missing = check_gap(run_dir, "No space left on device")
        assert len(said) == bool(missing)
        assert set(missing) <= set(range(first, first + 4))
        assert sk.open_run(run_dir).ending == "completed"
        costs.append(len(missing))
        shutil.rmtree(run_dir)
    assert min(costs) >= 2  # a page of the disk may still take a frame


def test_a_disk_that_stays_full_costs_the_rest_of_the_record_and_nothing_else(small_disk: Path) -> None:
    compacting = CONFIG.replace(compact=True)

    found, said = train(small_disk / "run", {6: lambda: fill(small_disk)}, compacting)

    assert found == bare()
    [warning] = said
    assert "No space left on device" in warning
    assert warning.endswith("; training goes on")
    run = sk.open_run(small_disk / "run")
    steps = run.steps()["step"].tolist()
    assert steps == list(range(len(steps)))
    assert 6 <= len(steps) < NUM_STEPS
    assert len(list_segments(small_disk / "run")) == 1  # there was no room for a part


def test_a_file_size_limit_is_a_full_disk_too(run_dir: Path) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(num_bytes: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))

    try:
        found, said = train(run_dir, {4: lambda: limit(6000), 12: lambda: limit(hard)})
    finally:
        limit(hard)

    assert found == bare()
    assert len(said) == 1
    assert check_gap(run_dir, "File too large")


def test_facts_noted_on_a_full_disk_are_written_when_there_is_room(small_disk: Path) -> None:
    training = Training()
    monitor, step = training.attach(small_disk / "run")
    step(torch.ones(2, 4))
    fill(small_disk)

    with pytest.warns(RuntimeWarning, match=r"run\.json .*No space left on device"):
        monitor.note(accuracy=0.5, text="x" * 10_000)

    (small_disk / "filler").unlink()
    monitor.close()
    assert sk.open_run(small_disk / "run").meta["accuracy"] == 0.5


def test_a_folder_that_becomes_read_only_costs_rows_until_it_is_writable(small_disk: Path) -> None:
    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    found, said = train(small_disk / "run", {0: lambda: remount("ro"), 5: lambda: remount("rw")})

    assert found == bare()
    assert len(said) == 1
    assert check_gap(small_disk / "run", "Read-only file system") == [0, 1, 2, 3, 4]


def test_a_read_only_folder_is_refused_when_the_monitor_is_attached(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    training = Training()

    with pytest.raises(sk.RunFolderError, match=r"Read-only file system.*expected one that can be written"):
        training.attach(small_disk / "run")

    assert not any(module._forward_hooks for module in training.model.modules())


@pytest.mark.parametrize("compact", [False, True])
def test_a_run_folder_that_is_removed_is_not_brought_back(run_dir: Path, compact: bool) -> None:
    config = CONFIG.replace(compact=compact, report=compact)

    found, said = train(run_dir, {5: lambda: shutil.rmtree(run_dir)}, config)

    assert found == bare()
    [warning] = said
    assert "deleted" in warning
    assert not run_dir.exists()


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    hogs: list[int] = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        with suppress(OSError):
            while True:
                hogs.append(os.dup(0))
        yield
    finally:
        for descriptor in hogs:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_without_free_file_descriptors_rows_are_lost_and_training_goes_on(run_dir: Path) -> None:
    exhausted = no_descriptors_left()

    found, said = train(run_dir, {0: exhausted.__enter__, 3: lambda: exhausted.__exit__(None, None, None)})

    assert found == bare()
    assert len(said) == 1
    assert check_gap(run_dir, "Too many open files") == [0, 1, 2]


def test_a_disk_that_fails_now_and_then_costs_those_steps(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    whole = os.writev
    actions = {
        5: lambda: monkeypatch.setattr(os, "writev", broken),
        8: lambda: monkeypatch.setattr(os, "writev", whole),
    }

    found, said = train(run_dir, actions)

    assert found == bare()
    assert len(said) == 1
    assert check_gap(run_dir, "Input/output error") == [5, 6, 7]


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_forked_data_loader_workers_see_a_monitor_and_leave_it_alone(run_dir: Path) -> None:
    def load() -> DataLoader[tuple[torch.Tensor, ...]]:
        data = TensorDataset(torch.cat(list(batches())))
        generator = torch.Generator().manual_seed(2)
        return DataLoader(data, 8, shuffle=True, num_workers=2, multiprocessing_context="fork", generator=generator)

    unwatched = Training()
    for (batch,) in load():
        unwatched.step(batch)
    watched = Training()
    monitor, step = watched.attach(run_dir)
    for (batch,) in load():
        step(batch)
    monitor.close()

    assert watched.state() == unwatched.state()
    run = sk.open_run(run_dir)
    assert run.steps()["step"].tolist() == list(range(NUM_STEPS))
    assert (run.damage, run.ending) == ([], "completed")


def test_an_interrupted_step_passes_through_and_the_next_one_is_what_it_would_have_been(run_dir: Path) -> None:
    def interrupt(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        raise KeyboardInterrupt

    def train_on(training: Training, step: Callable[[torch.Tensor], object]) -> list[bytes]:
        for index, batch in enumerate(batches()):
            if index == 6:
                with training.model[3].register_forward_hook(interrupt), pytest.raises(KeyboardInterrupt):
                    step(batch)
            step(batch)
        return training.state()

    unwatched = Training()
    expected = train_on(unwatched, unwatched.step)
    watched = Training()
    monitor, step = watched.attach(run_dir)
    found = train_on(watched, step)
    monitor.close()

    assert found == expected
    run = sk.open_run(run_dir)
    assert (run.ending, run.damage, monitor.diagnosis) == ("completed", [], None)
    assert run.steps()["loss"].notna().sum() == NUM_STEPS


def test_a_run_that_is_interrupted_says_so(run_dir: Path) -> None:
    training = Training()
    monitor, step = training.attach(run_dir)

    def interrupted() -> None:
        with monitor:
            step(torch.ones(2, 4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    run = sk.open_run(run_dir)
    assert (run.ending, run.ending_facts["error"]) == ("raised", "KeyboardInterrupt")
    assert run.steps()["step"].tolist() == [0]


def run_program(run_dir: Path, mode: str, ready: Callable[[subprocess.Popen[str]], object]) -> tuple[list[bytes], int]:
    """The losses a program printed, and how it ended; `ready` is called when it waits."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", str(PROGRAM), str(run_dir), mode]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        losses = []
        for line in process.stdout:
            if line == "ready\n":
                ready(process)
            else:
                losses.append(bytes.fromhex(line))
        assert process.stderr.read() == ""
    return losses, process.returncode


@pytest.mark.parametrize(("mode", "code"), [("wait", -signal.SIGTERM), ("exit", 7)])
def test_a_process_that_is_ended_without_a_word_leaves_every_step_it_had_done(
    run_dir: Path, mode: str, code: int
) -> None:
    losses, ended = run_program(run_dir, mode, subprocess.Popen.terminate)

    assert (losses, ended) == (bare()[: NUM_STEPS // 2], code)
    run = sk.open_run(run_dir)
    assert run.ending == "killed"
    assert run.steps()["step"].tolist() == list(range(NUM_STEPS // 2))
    assert run.damage == []


def test_a_forked_child_that_exits_does_not_close_its_parents_run(run_dir: Path) -> None:
    losses, ended = run_program(run_dir, "fork", lambda process: None)

    assert (losses, ended) == (bare()[:NUM_STEPS], 0)
    run = sk.open_run(run_dir)
    assert run.ending == "completed"
    assert run.steps()["step"].tolist() == list(range(NUM_STEPS))
