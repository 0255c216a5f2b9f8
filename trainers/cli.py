"""`python -m trainers [sweep | campaign | ablate]`: flags in, exit code out.

0 done, 1 a step went non-finite (or a run of a sweep failed), 2 bad usage or data.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stabilitykit.errors import NonFiniteError, StabilityKitError, UsageError
from trainers import flags, progress
from trainers.buffer import BufferConfig
from trainers.checkpoint import read_checkpoint
from trainers.datasets import DatasetConfig
from trainers.experiment import ExperimentConfig, run
from trainers.methods.causal_der import CausalConfig
from trainers.methods.sgd import ReplayConfig
from trainers.networks import NetworkConfig
from trainers.optimisation import OptimizerConfig, ScheduleConfig
from trainers.precision import PrecisionConfig
from trainers.trainer import TrainerConfig
from trainers.watching import WatchConfig

COMMANDS = ("sweep", "campaign", "ablate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv and argv[0] in COMMANDS:
            return run_command(argv[0], argv[1:])
        train(argv)
    except NonFiniteError as error:
        print(f"python -m trainers: {error}", file=sys.stderr)
        return 1
    except StabilityKitError as error:
        print(f"python -m trainers: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("python -m trainers: interrupted", file=sys.stderr)
        return 130
    return 0


def run_command(name: str, argv: list[str]) -> int:
    """A command of its own module, loaded when it is asked for."""
    module = importlib.import_module(f"trainers.{name}")
    code: int = module.main(argv)
    return code


def train(argv: list[str]) -> None:
    """One run, from its first step or from a checkpoint."""
    args = flags.parse(argv)
    if args.resume:
        argv = resumed_flags(args.resume, argv)
        args = flags.parse(argv)
    config = configure(args, ("python", "-m", "trainers", *argv))
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    shown = progress.NoProgress() if args.non_verbose else progress.for_stdout()
    results = run(config, shown, resume=bool(args.resume))
    print(f"Class-IL {results.class_il:.2f} %, Task-IL {results.task_il:.2f} %: {config.run_dir / 'results.json'}")


def resumed_flags(run_dir: Path, argv: list[str]) -> list[str]:
    """The flags a run was started with, then those of this command, with the folder as it is named now."""
    command = read_checkpoint(run_dir)["config"]["command"]
    first = command[3:]  # after python -m trainers
    return [*first, *argv, "--run_dir", str(run_dir)]


def configure(args: argparse.Namespace, command: tuple[str, ...]) -> ExperimentConfig:
    """The flags as the parts' own configurations.

    Raises:
        UsageError: a value that cannot be right.
    """
    if args.num_threads < 0:
        raise UsageError(f"--num_threads: got {args.num_threads}, expected 0 (PyTorch's choice) or more")
    return ExperimentConfig(
        method="joint" if args.joint else args.model,
        seed=args.seed,
        batch_size=args.batch_size,
        drop_last=args.drop_last,
        clip_norm=args.clip_grad,
        command=command,
        run_dir=args.run_dir or default_run_dir(args),
        dataset=DatasetConfig(
            name=args.dataset,
            base_path=args.base_path,
            download=args.download,
            num_tasks=args.num_tasks,
            permute_classes=args.permute_classes,
            validation=args.validation,
        ),
        network=NetworkConfig(name=args.backbone, norm=args.norm, pool=args.pool),
        trainer=TrainerConfig(
            num_epochs=args.n_epochs,
            freeze_bn=args.freeze_bn,
            stop_after=args.stop_after,
            checkpoint_every=args.checkpoint_every,
        ),
        watch=WatchConfig(
            monitor=args.monitor,
            check=args.validate_step,
            on_nonfinite=args.on_nonfinite,
            record_every=args.record_every,
            max_skips=args.max_skips,
            rollback_lr=args.rollback_lr,
        ),
        **_replay(args),
        **_arithmetic(args),
    )


def default_run_dir(args: argparse.Namespace) -> Path:
    """runs/<model>-<dataset>-seed<seed>-<time>."""
    return Path("runs") / f"{args.model}-{args.dataset}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def _replay(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "buffer": BufferConfig(
            size=args.buffer_size,
            minibatch_size=args.batch_size if args.minibatch_size is None else args.minibatch_size,
            policy=args.buffer_policy,
            sanitise=args.sanitise_buffer,
            clamp_logits=args.clamp_logits,
            audit_every=args.buffer_audit_every,
        ),
        "replay": ReplayConfig(
            alpha=args.alpha,
            beta=args.beta,
            kd=args.kd,
            temperature=args.kd_temperature,
            draws=args.replay_draws,
            warmup_tasks=args.replay_warmup_tasks,
            asymmetric_ce=args.asymmetric_ce,
            adaptive=args.adaptive_replay_weights,
        ),
        "causal": CausalConfig(
            mode=args.use_causal_sampling,
            weight=args.causal_weight,
            warmup_tasks=args.causal_warmup_tasks,
            balance=args.causal_balance,
            refresh_every=args.importance_refresh,
            interval=args.causal_eval_interval,
            num_interventions=args.causal_num_interventions,
            hybrid_candidates=args.causal_hybrid_candidates,
            num_probes=args.causal_num_probes,
            micro_steps=args.true_micro_steps,
            step_size=args.true_temp_lr,
            irm_weight=args.irm_weight,
            graph=args.enable_causal_graph_learning,
            graph_order=args.graph_order,
            graph_sparsity=args.graph_sparsity,
            isolate=args.isolate_causal,
        ),
    }


def _arithmetic(args: argparse.Namespace) -> dict[str, Any]:
    milestones = tuple(args.lr_milestones) if args.lr_scheduler else ()
    return {
        "optimizer": OptimizerConfig(
            name=args.optimizer,
            lr=args.lr,
            weight_decay=args.optim_wd,
            momentum=args.optim_mom,
            nesterov=args.optim_nesterov,
        ),
        "schedule": ScheduleConfig(
            over_tasks=args.use_lr_decay, milestones=milestones, gamma=args.sched_multistep_lr_gamma
        ),
        "precision": PrecisionConfig(
            format="fp32" if args.disable_amp else args.mixed_precision, whole_step=args.amp_scope == "step"
        ),
    }
