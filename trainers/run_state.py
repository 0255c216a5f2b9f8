"""Everything a run changes, gathered and put back: what makes a resumed run go on bit for bit."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabilitykit.errors import RunFolderError, UsageError
from stabilitykit.random_states import RandomStates
from trainers.evaluation import Accuracies

if TYPE_CHECKING:
    from trainers.results import Results
    from trainers.trainer import Trainer

# Parts of a configuration that a resumed run may have otherwise: where things are, and who watches.
FREE = {"command", "run_dir", "watch", "dataset.base_path", "dataset.download", "trainer.checkpoint_every"}


PAIRS = ("before", "untrained")  # of the results, the fields that are Accuracies


@dataclass
class Position:
    """Where a run is: the next step takes batch `batch` of `epoch` of `session`."""

    session: int = 0
    epoch: int = 0
    batch: int = 0

    @property
    def within_session(self) -> bool:
        """Whether the session has begun."""
        return bool(self.epoch or self.batch)


def capture(trainer: Trainer, config: dict[str, Any]) -> dict[str, Any]:
    """The state of a run between two steps, with the configuration it belongs to."""
    trainer.results.cpu_seconds = trainer.cpu_seconds()
    random = RandomStates.capture()
    step, stream = trainer.step, trainer.stream
    return {
        "config": config,
        "position": asdict(trainer.position),
        "results": asdict(trainer.results) | {name: tuple(getattr(trainer.results, name)) for name in PAIRS},
        "network": dict(trainer.network.state_dict()),
        "frozen": step.guards.batch_norm is not None and step.guards.batch_norm.num_frozen > 0,
        "optimizer": step.optimizer.state_dict(),
        "scaler": step.precision.scaler.state_dict(),
        "guards": step.guards.state_dict(),
        "buffer": step.method.buffer.state_dict(),
        "method": step.method.state_dict(),
        "replay_transform": step.method.transform.state_dict(),
        "stream_transform": stream.transform.state_dict(),
        "stream_order": trainer.epoch_order if trainer.position.batch else stream.order.get_state(),
        "random": {entry.name: getattr(random, entry.name) for entry in fields(random)},
    }


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Put a captured state into a trainer that was just built from the same configuration."""
    step, stream = trainer.step, trainer.stream
    trainer.network.load_state_dict(state["network"])
    if state["frozen"] and step.guards.batch_norm is not None:
        step.guards.batch_norm.freeze()
    step.optimizer.load_state_dict(state["optimizer"])
    step.precision.scaler.load_state_dict(state["scaler"])
    step.guards.load_state_dict(state["guards"])
    step.method.buffer.load_state_dict(state["buffer"])
    step.method.load_state_dict(state["method"])
    step.method.transform.load_state_dict(state["replay_transform"])
    stream.transform.load_state_dict(state["stream_transform"])
    stream.order.set_state(state["stream_order"])
    trainer.position = Position(**state["position"])
    restore_results(trainer.results, state)
    trainer.started = time.process_time() - trainer.results.cpu_seconds
    RandomStates(**state["random"]).restore()


def restore_results(results: Results, state: dict[str, Any]) -> None:
    """Put back what the run had shown."""
    for name, value in state["results"].items():
        setattr(results, name, Accuracies(*value) if name in PAIRS else value)


def check_same_run(stored: dict[str, Any], given: dict[str, Any], where: str = "") -> None:
    """Refuse to go on under another configuration.

    Raises:
        UsageError: the first setting that differs.
    """
    for name in sorted(stored.keys() | given.keys()):
        path = f"{where}{name}"
        was, came = stored.get(name), given.get(name)
        if path in FREE or was == came:
            continue
        if isinstance(was, dict) and isinstance(came, dict):
            check_same_run(was, came, f"{path}.")
        elif name not in stored or name not in given:
            raise UsageError(
                f"--resume: got a checkpoint of another version of the trainer ({path} is not in both), "
                "expected one of this version; go on with that version, or begin a new run"
            )
        else:
            raise UsageError(f"--resume: got {path} {came}, expected the run's own {was}; leave the flag out")


@contextmanager
def sole_owner(run_dir: Path) -> Iterator[None]:
    """Hold a run folder against a second process; the system lets go when this one dies, however it does.

    Raises:
        RunFolderError: another process trains in it.
    """
    try:
        file = (run_dir / "lock").open("w")
    except OSError as error:
        raise RunFolderError(f"{run_dir}: {error.strerror}, expected a run folder that can be written") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunFolderError(f"{run_dir}: another process trains in it, expected none; wait for it") from error
        yield
