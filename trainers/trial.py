"""One trial of a campaign: a short run with a fault in it, judged against the truth and against its healthy twin."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from stabilitykit.errors import StabilityKitError
from stabilitykit.guards import all_finite
from trainers.buffer import BufferConfig
from trainers.experiment import ExperimentConfig, build_trainer
from trainers.faults import FAULTS, Fault, Truth
from trainers.flags import GUARDS
from trainers.guarding import GuardMode
from trainers.methods.causal_der import CausalConfig
from trainers.methods.sgd import ReplayConfig
from trainers.networks import NetworkConfig
from trainers.optimisation import OptimizerConfig, ScheduleConfig
from trainers.precision import PrecisionConfig
from trainers.progress import NoProgress
from trainers.trainer import Trainer, TrainerConfig
from trainers.watching import WatchConfig

HEALTHY = "healthy"
NETS = ("mnistmlp", "convnet")
BATCHES_PER_TASK = 42  # two epochs of 1,000 images in batches of 48; the second settles at a tenth of the rate
ALLOWED_LOSS = 3.0  # points of Class-IL accuracy


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a trial is; everything else follows from it."""

    index: int
    seed: int
    net: str
    num_tasks: int
    fault: str  # one of FAULTS, or `healthy`
    step: int  # before which the fault strikes
    guards: tuple[str, ...]
    by_guide: bool = False  # with the numbers that the stability guide prescribes
    lr: float = 0.05

    @property
    def twin(self) -> Spec:
        """The same run with nothing wrong."""
        return replace(self, index=-1, fault=HEALTHY, step=-1)


@dataclass(frozen=True, kw_only=True)
class Named:
    """What the run itself said was wrong, first of all: a diagnosis, or a guard's event."""

    step: int
    phase: str
    tensor: str = ""
    samples: tuple[int, ...] = ()
    source: str = ""


@dataclass(kw_only=True)
class Outcome:
    """How a trial went; one line of a campaign's record."""

    spec: Spec
    survived: bool = False
    class_il: float = 0.0
    task_il: float = 0.0
    twin_class_il: float = 0.0
    twin_task_il: float = 0.0
    detected: bool = False
    origin_correct: bool = False
    alarms: int = 0
    named: str = ""
    error: str = ""
    num_skipped: int = 0
    acted: dict[str, int] = field(default_factory=dict)
    cpu_seconds: float = 0.0

    @property
    def kept_accuracy(self) -> bool:
        """Whether it survived within ALLOWED_LOSS points of its healthy twin."""
        return self.survived and self.class_il >= self.twin_class_il - ALLOWED_LOSS

    def line(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self) | {"kept_accuracy": self.kept_accuracy})

    @classmethod
    def from_line(cls, text: str) -> Outcome:
        """What `line` wrote.

        Raises:
            ValueError, KeyError, TypeError: the line is torn.
        """
        body = json.loads(text)
        body.pop("kept_accuracy")
        spec = body.pop("spec")
        return cls(spec=Spec(**spec | {"guards": tuple(spec["guards"])}), **body)


class Witness:
    """Hears what the guards say, with the step at which they say it, and passes it on to the monitor."""

    def __init__(self, trainer: Trainer, clock: Callable[[], int]) -> None:
        self.clock, self.watch = clock, trainer.watch
        self.events: list[tuple[int, dict[str, Any]]] = []
        trainer.step.guards.listen(self)

    def __call__(self, kind: str, message: str, **data: Any) -> None:
        """Take note, unless the step is only run again."""
        if not getattr(self.watch, "replaying", False):
            self.events.append((self.clock(), data | {"message": message}))
        self.watch.log_event(kind, message, **data)

    def alarms(self, guard: str = "") -> list[tuple[int, dict[str, Any]]]:
        """Events that say something is wrong: warnings, and whatever guard 2 had to do when it was asked about."""
        routine = "" if guard != "precision" else guard
        return [event for event in self.events if event[1]["severity"] != "info" or event[1]["subject"] == routine]

    def first(self, guard: str) -> Named | None:
        """What was named first; a diagnosis says more than an event of the same step."""
        named = [
            Named(
                step=step,
                phase=str(data.get("phase", "")),
                tensor=str(data.get("tensor", "")),
                samples=tuple(data.get("rows") or data.get("slots") or ()),
                source=f"{data['subject']}: {data['message']}",
            )
            for step, data in self.alarms(guard)[:1]
        ]
        diagnosis = getattr(self.watch, "diagnosis", None)
        if diagnosis is not None:
            origin = diagnosis.origin
            found = Named(
                step=origin.step,
                phase=origin.phase,
                tensor=origin.tensor,
                samples=origin.samples,
                source=diagnosis.verdict,
            )
            named = [found] if not named or found.step <= named[0].step else named
        return named[0] if named else None


def is_right(named: Named, truth: Truth) -> bool:
    """Whether what was named is the truth, as far as the truth can be said."""
    if not truth.first <= named.step <= truth.last or named.phase not in truth.phases:
        return False
    if truth.tensor and named.tensor and named.tensor != truth.tensor:
        return False
    return not (truth.samples and named.samples) or bool(truth.samples & set(named.samples))


def configure(spec: Spec, run_dir: Path) -> ExperimentConfig:
    """The run of a trial, under its guards; the same learning rate whether guard 1 is on or off."""
    on = set(spec.guards)
    modes: dict[str, GuardMode] = {
        name: ("on" if spec.by_guide else "hold") if name in on else "off" for name in GUARDS
    }
    half = spec.fault == "unscaled_half"
    return ExperimentConfig(
        method="causal-der",
        seed=spec.seed,
        batch_size=48,
        run_dir=run_dir,
        clip_norm={"off": 0.0, "hold": None, "on": 1.0}[modes["clip"]],
        network=NetworkConfig(name=spec.net, pool=2),
        buffer=BufferConfig(minibatch_size=32, sanitise="buffer" in on, audit_every=50 if "buffer" in on else 0),
        replay=ReplayConfig(beta=1.0, adaptive=modes["replay_weights"]),
        causal=CausalConfig(warmup_tasks=1, refresh_every=10, isolate="isolation" in on),
        optimizer=OptimizerConfig(lr=spec.lr, momentum=0.5),
        schedule=ScheduleConfig(over_tasks=modes["lr"], milestones=(1,), gamma=0.1),
        precision=PrecisionConfig(format="fp16" if half else "fp32", whole_step="precision" in on),
        trainer=TrainerConfig(num_epochs=2, freeze_bn=modes["freeze_bn"], stop_after=spec.num_tasks),
        watch=WatchConfig(
            check="checks" in on,
            on_nonfinite="rollback" if "checks" in on else "record",
            snapshot_every=5,  # ten steps are a tenth of a run as short as this
            report=False,
        ),
    )


def run_trial(spec: Spec, twins: Path) -> Outcome:
    """Run a trial and judge it.

    Args:
        spec: what to run.
        twins: folder in which the results of healthy twins are kept.
    """
    outcome = train(spec)
    if spec.fault == HEALTHY:
        outcome.twin_class_il, outcome.twin_task_il = outcome.class_il, outcome.task_il
        return outcome
    twin = healthy_twin(spec.twin, twins)
    outcome.twin_class_il, outcome.twin_task_il = twin["class_il"], twin["task_il"]
    return outcome


def healthy_twin(spec: Spec, twins: Path) -> dict[str, float]:
    """Accuracies of the run with nothing wrong: looked up, or measured and kept."""
    guards = "-".join(spec.guards) + "-by-guide" * spec.by_guide
    path = twins / f"{guards or 'none'}_{spec.net}_{spec.num_tasks}_{spec.seed}_{spec.lr:g}.json"
    if path.exists():
        found: dict[str, float] = json.loads(path.read_text())
        return found
    outcome = train(spec)
    found = {"class_il": outcome.class_il, "task_il": outcome.task_il, "cpu_seconds": outcome.cpu_seconds}
    twins.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=twins, suffix=".tmp", delete=False) as file:
        file.write(json.dumps(found))
    Path(file.name).replace(path)
    return found


def train(spec: Spec) -> Outcome:
    """The run itself, in a folder that does not outlive it."""
    outcome = Outcome(spec=spec)
    folder = Path(tempfile.mkdtemp(prefix="trial-"))
    started = time.process_time()
    try:
        trainer = build_trainer(configure(spec, folder / "run"), NoProgress())
        fault = FAULTS.get(spec.fault, Fault)(trainer, spec.step, random.Random(f"{spec.seed} {spec.fault}"))
        fault.plant()
        witness = Witness(trainer, lambda: fault.now)
        try:
            results = trainer.fit()
            outcome.class_il, outcome.task_il = results.class_il, results.task_il
            outcome.survived = results.finished and all_finite([*trainer.network.state_dict().values()])
        except (StabilityKitError, RuntimeError, ValueError, IndexError) as error:  # the run died of its fault
            outcome.error = f"{type(error).__name__}: {error}"[:300]
        trainer.watch.close()
        outcome.num_skipped = trainer.results.num_skipped
        outcome.acted = trainer.step.guards.counts()
        judge(outcome, witness, fault)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    outcome.cpu_seconds = time.process_time() - started
    return outcome


def judge(outcome: Outcome, witness: Witness, fault: Fault) -> None:
    """What was noticed, and whether it was the truth."""
    guard = fault.guard if outcome.spec.fault != HEALTHY else ""
    named = witness.first(guard)
    outcome.alarms = len(witness.alarms(guard)) + (getattr(witness.watch, "diagnosis", None) is not None)
    outcome.detected = named is not None or bool(outcome.error)
    outcome.origin_correct = named is not None and outcome.spec.fault != HEALTHY and is_right(named, fault.truth)
    outcome.named = "" if named is None else f"step {named.step}, {named.phase}: {named.source}"[:300]


def prepare_worker() -> None:
    """One thread each: many processes share the cores."""
    torch.set_num_threads(1)
