"""A run from its configuration: builds the parts, trains, leaves a run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stabilitykit.errors import UsageError
from stabilitykit.guards import BatchNormFreeze, GradientClip, Guards
from trainers.buffer import BufferConfig, ReplayBuffer
from trainers.checkpoint import read_checkpoint
from trainers.datasets import DatasetConfig, DatasetSpec, load
from trainers.guarding import GuardMode
from trainers.methods.causal_der import CausalConfig, CausalDer
from trainers.methods.derpp import Derpp
from trainers.methods.replaying import Der, Er
from trainers.methods.sgd import ReplayConfig, Sgd
from trainers.networks import Network, NetworkConfig, build_network
from trainers.optimisation import OptimizerConfig, Schedule, ScheduleConfig
from trainers.precision import Precision, PrecisionConfig
from trainers.progress import NoProgress, Progressing
from trainers.results import Results, claim_run_folder
from trainers.run_state import check_same_run, restore, restore_results, sole_owner
from trainers.seeding import generator, seed_everything
from trainers.step import TrainingStep
from trainers.stream import Stream, TaskSplit, Transform
from trainers.trainer import Trainer, TrainerConfig
from trainers.watching import Watch, WatchConfig, attach

METHODS: Mapping[str, type[Sgd]] = {
    "sgd": Sgd,
    "joint": Sgd,
    "er": Er,
    "der": Der,
    "derpp": Derpp,
    "causal-der": CausalDer,
}
MAX_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """Everything a run depends on; each part is checked by its owner."""

    method: str = "causal-der"
    seed: int = 0
    batch_size: int = 32
    drop_last: bool = False
    clip_norm: float | None = 0.0  # None: a limit that follows the run
    command: tuple[str, ...] = ()
    run_dir: Path
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    buffer: BufferConfig = field(default_factory=BufferConfig)
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    causal: CausalConfig = field(default_factory=CausalConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"--model: got {self.method!r}, expected one of {', '.join(METHODS)}")
        if not 0 <= self.seed <= MAX_SEED:
            raise UsageError(f"--seed: got {self.seed}, expected 0 to {MAX_SEED}")
        if self.batch_size < 1:
            raise UsageError(f"--batch_size: got {self.batch_size}, expected 1 or more")
        if self.clip_norm is not None and not 0 <= self.clip_norm < float("inf"):
            raise UsageError(f"--clip_grad: got {self.clip_norm}, expected 0 (off), hold or a positive norm")

    @property
    def num_tasks(self) -> int:
        """Tasks this run goes through."""
        return min(self.trainer.stop_after or self.dataset.spec.num_tasks, self.dataset.spec.num_tasks)

    @property
    def num_sessions(self) -> int:
        """Times it trains and then evaluates: a task each, or all of them jointly."""
        return 1 if self.method == "joint" else self.num_tasks

    def facts(self) -> dict[str, Any]:
        """The configuration as JSON can hold it."""
        facts: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return facts


def run(config: ExperimentConfig, progress: Progressing | None = None, *, resume: bool = False) -> Results:
    """Train as configured; `resume` goes on in the run folder from its last checkpoint.

    Raises:
        UsageError: data or options that cannot be right.
        RunFolderError: the run folder is in use, cannot be written, or holds nothing to go on with.
        NonFiniteError: a step went non-finite and the policy is to raise.
    """
    progress = progress or NoProgress()
    with ExitStack() as held:
        state = None
        if resume:
            held.enter_context(sole_owner(config.run_dir))
            state = read_checkpoint(config.run_dir)
            check_same_run(state["config"], config.facts())
            results = new_results(config)
            restore_results(results, state)
            if results.finished:
                return results
        trainer = build_trainer(config, progress, state)
        if not resume:
            held.enter_context(sole_owner(config.run_dir))
        return _fit(trainer, progress, config.run_dir.name)


def _fit(trainer: Trainer, progress: Progressing, title: str) -> Results:
    error: BaseException | None = None
    progress.start(title, trainer.num_steps(), trainer.results.num_steps)
    try:
        return trainer.fit()
    except BaseException as raised:
        error = raised
        raise
    finally:
        progress.stop()
        trainer.watch.close(error)


def build_trainer(config: ExperimentConfig, progress: Progressing, state: dict[str, Any] | None = None) -> Trainer:
    """Load the data, claim the run folder, put the parts together, and the state of an earlier attempt into them."""
    spec = config.dataset.spec
    train, test = (TaskSplit(split, spec, config.seed) for split in load(config.dataset, config.seed))
    if state is None:
        claim_run_folder(config.run_dir)
    seed_everything(config.seed)
    network = build_network(config.network, spec.shape, spec.num_classes)
    step = build_step(config, spec, network)
    stream = Stream(
        train,
        batch_size=config.batch_size,
        drop_last=config.drop_last,
        transform=Transform(spec, generator(config.seed, "stream augmentation")),
        order=generator(config.seed, "stream order"),
        joint_tasks=config.num_tasks if config.method == "joint" else 0,
    )
    results = new_results(config)
    if state is not None:
        restore_results(results, state)
    step.watch = build_watch(config, network, step, None if state is None else results.num_steps)
    trainer = Trainer(
        config.trainer,
        test=test,
        stream=stream,
        step=step,
        watch=step.watch,
        results=results,
        progress=progress,
        run_dir=config.run_dir,
        facts=config.facts(),
    )
    if state is not None:
        restore(trainer, state)
    return trainer


def build_watch(config: ExperimentConfig, network: Network, step: TrainingStep, resume_at: int | None) -> Watch:
    """Who watches, told what the run is."""
    watch = attach(
        network,
        step.optimizer,
        config.watch,
        run_dir=config.run_dir,
        seed=config.seed,
        buffer=step.method.buffer,
        scaler=step.precision.scaler,
        stateful=(step.method.transform, step.guards, step.method),
        resume_at=resume_at,
    )
    watch.note(config=config.facts())
    step.guards.listen(watch)
    return watch


def new_results(config: ExperimentConfig) -> Results:
    """The results of a run that has not begun."""
    return Results(
        method=config.method,
        dataset=config.dataset.name,
        seed=config.seed,
        command=list(config.command),
        num_tasks=config.num_tasks,
        num_sessions=config.num_sessions,
    )


def build_step(config: ExperimentConfig, spec: DatasetSpec, network: Network) -> TrainingStep:
    """The training step with everything it changes."""
    precision = Precision(config.precision)
    schedule = Schedule(config=config.schedule, base_lr=config.optimizer.lr, num_tasks=spec.num_tasks)
    buffer = ReplayBuffer(config.buffer, spec.shape, spec.num_classes, generator(config.seed, "buffer"))
    transform = Transform(spec, generator(config.seed, "replay augmentation"))
    buffer.preprocess = transform.normalise
    classes_of = None if spec.domain else spec.classes_of
    parts = (network, buffer, transform, precision, config.replay, spec.num_tasks, classes_of)
    method = build_method(config, schedule, parts)
    optimizer = config.optimizer.build(network)
    guards = Guards(
        learning_rate=schedule.guard(),
        precision=precision,
        batch_norm=batch_norm_guard(config.trainer.freeze_bn, network),
        buffer=buffer.sanitiser,
        isolation=method.isolation,
        validation=config.watch.guard(
            network,
            optimizer,
            stateful=(buffer, transform, method, precision.scaler),
            num_classes=spec.num_classes,
            run_dir=config.run_dir,
        ),
        clip=None if config.clip_norm == 0 else GradientClip(config.clip_norm),
        replay_weights=method.adaptive,
    )
    return TrainingStep(method, optimizer, schedule, precision, guards)


def batch_norm_guard(mode: GuardMode, network: Network) -> BatchNormFreeze | None:
    """Guard 3, where it is on."""
    return None if mode == "off" else BatchNormFreeze(network, after_task=0 if mode == "on" else None)


def build_method(config: ExperimentConfig, schedule: Schedule, parts: tuple[Any, ...]) -> Sgd:
    """The method by name."""
    kind = METHODS[config.method]
    if not issubclass(kind, CausalDer):
        return kind(*parts)
    return kind(
        *parts,
        causal=config.causal,
        generator=generator(config.seed, "causal"),
        lr=lambda batch: schedule.lr(batch.task, batch.epoch),
    )
