"""The command line's flags: Mammoth's names where Mammoth has them, the stability guide's for the guards."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn, get_args

from stabilitykit.errors import UsageError
from trainers.guarding import GuardMode

Values = Mapping[str, object]

# What `--guards` stands for: the flags of each guard when it is off, and when it stands by, without changing what a
# healthy run computes.
GUARDS: Mapping[str, tuple[Values, Values]] = {
    "lr": ({"use_lr_decay": "off"}, {"use_lr_decay": "hold"}),
    "precision": ({"amp_scope": "replay"}, {"amp_scope": "step"}),
    "freeze_bn": ({"freeze_bn": "off"}, {"freeze_bn": "hold"}),
    "buffer": ({"sanitise_buffer": False}, {"sanitise_buffer": True, "buffer_audit_every": 50}),
    "isolation": ({"isolate_causal": False}, {"isolate_causal": True}),
    "checks": ({"validate_step": False}, {"validate_step": True, "on_nonfinite": "rollback"}),
    "clip": ({"clip_grad": 0.0}, {"clip_grad": None}),
    "replay_weights": ({"adaptive_replay_weights": "off"}, {"adaptive_replay_weights": "hold"}),
}
# What the stability guide prescribes beyond that, to healthy runs as well.
PRESCRIBED: Mapping[str, Values] = {
    "lr": {"use_lr_decay": "on", "lr": 0.005, "optim_wd": 0.0001},
    "precision": {"mixed_precision": "fp32"},
    "freeze_bn": {"freeze_bn": "on"},
    "clip": {"clip_grad": 1.0},
    "replay_weights": {"adaptive_replay_weights": "on"},
}
# Its fixes by number: the first four are its quick ones.
BY_GUIDE: Mapping[str, tuple[str, ...]] = {"guide": tuple(GUARDS), "quick": tuple(GUARDS)[:4]}
# Mammoth's `--dataset_config`.
DATASET_CONFIGS: Mapping[str, Values] = {
    "xder": {
        "lr_scheduler": "multisteplr",
        "lr_milestones": [35, 45],
        "sched_multistep_lr_gamma": 0.2,
        "batch_size": 32,
        "n_epochs": 50,
    },
    "5tasks": {"num_tasks": 5},
    "10tasks": {"num_tasks": 10},
    "20tasks": {"num_tasks": 20},
}
IGNORED = (
    "--nowand",
    "--wandb_entity",
    "--wandb_project",
    "--wandb_name",
    "--num_workers",
    "--results_path",
    "--disable_log",
    "--enable_other_metrics",
)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line: what came, what was expected."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage.

        Raises:
            UsageError: always.
        """
        if unknown := re.fullmatch(r"unrecognized arguments: (\S+).*", message):
            flag = unknown[1].split("=")[0]
            close = difflib.get_close_matches(flag, self._option_string_actions, 1)
            hint = f"did you mean {close[0]}?" if close else "see python -m trainers --help"
            raise UsageError(f"got {flag!r}, expected a known flag; {hint}")
        raise UsageError(message.removeprefix("argument "))


def switch(text: str) -> bool:
    """0 or 1."""
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 0 or 1")
    return text == "1"


def mode(text: str) -> str:
    """How a guard stands: 0, 1 or hold."""
    found = {"0": "off", "1": "on"}.get(text, text)
    if found not in get_args(GuardMode):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 0, 1 or hold")
    return found


def limit(text: str) -> float | None:
    """A number; None for hold: a limit that follows the run."""
    return None if text == "hold" else number(text)


def whole(text: str) -> int:
    """A whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number") from None


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number") from None


def precision(text: str) -> str:
    """The guide's 0 and 1, or a format's name."""
    return {"0": "fp32", "1": "bf16"}.get(text, text)


def build_parser() -> Parser:
    """Every flag, with its default."""
    parser = Parser(
        prog="python -m trainers",
        description="Train Causal-DER or one of its baselines on a stream of tasks, watched by stabilitykit. "
        "`python -m trainers sweep --help`: many methods and seeds at once.",
        allow_abbrev=False,
    )
    _add_run(parser)
    _add_training(parser)
    _add_replay(parser)
    _add_causal(parser)
    _add_guards(parser)
    ignored = parser.add_argument_group("accepted and ignored, for commands written for Mammoth")
    for flag in IGNORED:
        ignored.add_argument(flag, nargs="?", help="ignored", metavar="X", dest="ignored")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of `argv`; `--guards` and `--dataset_config` move the defaults, so that explicit flags win.

    Raises:
        UsageError: a flag or value that cannot be right.
    """
    parser = build_parser()
    first = parser.parse_known_args(list(argv))[0]
    if first.dataset_config:
        parser.set_defaults(**DATASET_CONFIGS[first.dataset_config])
    if first.guards:
        parser.set_defaults(**guard_defaults(first.guards))
    return parser.parse_args(list(argv))


def guard_names(given: str) -> tuple[str, ...]:
    """The guards that `--guards GIVEN` puts on, in the guide's order.

    Raises:
        UsageError: one of them is none.
    """
    chosen = {"all": tuple(GUARDS), "none": (), **BY_GUIDE}.get(given, tuple(given.split(",")))
    for name in chosen:
        if name not in GUARDS:
            choices = f"all, guide, quick, none, or a list of {', '.join(GUARDS)}"
            raise UsageError(f"--guards: got {name!r}, expected {choices}")
    return tuple(name for name in GUARDS if name in chosen)


def guard_defaults(given: str) -> dict[str, object]:
    """What `--guards GIVEN` sets: the guards named as they stand by, or as the guide prescribes; all others off."""
    chosen = guard_names(given)
    found = {flag: value for name, states in GUARDS.items() for flag, value in states[name in chosen].items()}
    if given in BY_GUIDE:
        found |= {flag: value for name in chosen for flag, value in PRESCRIBED.get(name, {}).items()}
    return found


def _add_run(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--model", default="causal-der", help="causal-der, derpp, der, er, sgd (lower bound) or joint (upper bound)")
    add("--joint", default=False, type=switch, help="1: as --model joint")
    add("--dataset", default="seq-fmnist-mini", help="seq-fmnist-mini (embedded), seq-fmnist, seq-mnist, seq-cifar10, "
        "seq-cifar100, perm-mnist, rot-mnist")  # fmt: skip
    add("--num_tasks", default=0, type=whole, help="divide the classes into so many tasks, 0 for the dataset's own")
    add("--permute_classes", default=False, type=switch, help="1: the seed decides the order of the classes")
    add("--validation", default=0.0, type=number, help="test on this percentage of the training set, 0 on the test set")
    add("--base_path", default=Path("data"), type=Path, help="folder of the data sets that are not embedded")
    add("--download", default=False, type=switch, help="1: let torchvision download what is missing")
    add("--seed", default=0, type=whole, help="seeds everything")
    add("--run_dir", default=None, type=Path, help="run folder (runs/<model>-<dataset>-seed<seed>-<time>)")
    add("--checkpoint_every", default=500, type=whole, help="steps between checkpoints, 0 when a task ends only")
    add("--resume", default=None, type=Path, metavar="RUN_DIR", help="go on with a run from its last checkpoint")
    add("--monitor", default=True, type=switch, help="0: run bare, without stabilitykit's monitor")
    add("--stop_after", default=0, type=whole, help="end after so many tasks")
    add("--num_threads", default=0, type=whole, help="threads of one operation, 0 for PyTorch's choice")
    add("--device", default="cpu", choices=["cpu"], help="cpu")
    add("--non_verbose", default=False, type=switch, nargs="?", const=True, help="no progress")
    add("--dataset_config", choices=list(DATASET_CONFIGS), help="xder: 50 epochs of 32, lr x 0.2 at epochs 35 and 45; "
        "5tasks, 10tasks, 20tasks")  # fmt: skip


def _add_training(parser: Parser) -> None:
    group = parser.add_argument_group("network and optimizer")
    add = group.add_argument
    add("--backbone", default="resnet8", help="resnet8, reduced-resnet18, resnet18, convnet or mnistmlp")
    add("--norm", default="batch", help="batch or group")
    add("--pool", default=1, type=whole, help="average-pool the input by this factor first: 1, 2 or 4")
    add("--n_epochs", default=1, type=whole, help="per task")
    add("--batch_size", default=32, type=whole, help="of the stream")
    add("--drop_last", default=False, type=switch, help="1: leave out a last batch that is smaller")
    add("--optimizer", default="sgd", help="sgd, adam or adamw")
    add("--lr", default=0.03, type=number, help="base learning rate")
    add("--optim_wd", default=0.0, type=number, help="weight decay")
    add("--optim_mom", default=0.0, type=number, help="momentum of sgd")
    add("--optim_nesterov", default=False, type=switch, help="1: Nesterov's momentum")
    add("--lr_scheduler", choices=["multisteplr"], help="within a task")
    add("--lr_milestones", default=[], type=whole, nargs="+", help="epochs at which multisteplr acts")
    add("--sched_multistep_lr_gamma", default=0.1, type=number, help="its factor")


def _add_replay(parser: Parser) -> None:
    group = parser.add_argument_group("replay")
    add = group.add_argument
    add("--buffer_size", default=200, type=whole, help="slots")
    add("--minibatch_size", default=None, type=whole, help="samples a draw (the batch size)")
    add("--buffer_policy", default="reservoir", help="reservoir, class_balanced or importance (weighted reservoir)")
    add("--alpha", default=0.3, type=number, help="weight of the distillation towards stored logits")
    add("--beta", default=0.5, type=number, help="weight of the cross-entropy on replays")
    add("--kd", default="mse", help="mse or kl")
    add("--kd_temperature", default=2.0, type=number, help="of kl")
    add("--replay_draws", default=2, type=whole, help="1: both terms share a draw")
    add("--replay_warmup_tasks", default=0, type=whole, help="tasks without replay: 1 rehearses from the second on")
    add("--asymmetric_ce", default=False, type=switch, help="1: the cross-entropy on the stream leaves the classes of "
        "earlier tasks out (ER-ACE)")  # fmt: skip


def _add_causal(parser: Parser) -> None:
    group = parser.add_argument_group("causal-der")
    add = group.add_argument
    add("--use_causal_sampling", default=1, type=whole, help="importance of a sample: 0 none, 1 heuristic, 2 hybrid, "
        "3 interventional, 4 influence")  # fmt: skip
    add("--causal_weight", default=0.3, type=number, help="0 draws evenly, 1 by importance alone")
    add("--causal_warmup_tasks", default=2, type=whole, help="tasks over which that weight grows")
    add("--causal_balance", default="none", help="what importance decides among: none, all stored samples; class, "
        "those of a class, every class with the same share; past, as class without the present task's")  # fmt: skip
    add("--importance_refresh", default=25, type=whole, help="steps between scorings of the buffer (1, 4), 0 never")
    add("--causal_eval_interval", default=50, type=whole, help="steps between interventions (2, 3)")
    add("--causal_num_interventions", default=32, type=whole, help="candidates of each")
    add("--causal_hybrid_candidates", default=128, type=whole, help="slots of which 2 intervenes on the nearest")
    add("--causal_num_probes", default=64, type=whole, help="samples an effect is measured on")
    add("--true_micro_steps", default=1, type=whole, help="steps of an intervention")
    add("--true_temp_lr", default=0.0, type=number, help="their size, 0 for the optimizer's")
    add("--enable_causal_graph_learning", default=True, type=switch, help="0: no task graph when a task ends")
    add("--graph_order", default="temporal", help="temporal, or free: NOTEARS finds the order of the tasks")
    add("--graph_sparsity", default=0.1, type=number, help="weight of the graph's L1 penalty")
    add("--irm_weight", default=0.0, type=number, help="weight of the IRMv1 penalty over tasks")


def _add_guards(parser: Parser) -> None:
    standing = shown({name: on for name, (_, on) in GUARDS.items()})
    group = parser.add_argument_group("the eight guards")
    add = group.add_argument
    add(
        "--guards",
        help=f"all, or a list: {standing}: standing by, they leave a healthy run alone. guide: all eight, with the "
        f"numbers of the stability guide ({shown(PRESCRIBED)}); quick: its first four; none. Explicit flags win",
    )
    add("--use_lr_decay", default="off", type=mode, metavar="{0,1,hold}", help="1: cosine over tasks, floor 10 %%; "
        "hold: the run's own rate, put back whatever changes it")  # fmt: skip
    add("--mixed_precision", default="fp32", type=precision, help="0 or fp32, 1 or bf16, fp16")
    add(
        "--amp_scope", default="step", choices=["step", "replay"], help="replay: half precision in replay forwards only"
    )
    add(
        "--disable_amp",
        default=False,
        type=switch,
        nargs="?",
        const=True,
        help="float32 whatever --mixed_precision says",
    )
    add("--freeze_bn", default="off", type=mode, metavar="{0,1,hold}", help="1: freeze BatchNorm's statistics after "
        "the first task; hold: put them back where they go bad")  # fmt: skip
    add("--sanitise_buffer", default=True, type=switch, help="0: store whatever comes")
    add("--clamp_logits", default=0.0, type=number, help="clamp stored logits to this magnitude, 0 not at all")
    add("--buffer_audit_every", default=0, type=whole, help="steps between searches for bad slots, 0 never")
    add("--isolate_causal", default=True, type=switch, help="0: importance is scored in train mode")
    add("--validate_step", default=True, type=switch, help="0: no checks of inputs, loss, gradients, weights")
    add("--on_nonfinite", default="raise", help="raise, skip, rollback or record")
    add("--record_every", default=0, type=whole, help="steps between records of all tensors, 0 as a 2 %% budget allows")
    add("--max_skips", default=20, type=whole, help="steps lost in a row after which the run ends")
    add("--rollback_lr", default=1.0, type=number, help="share of the learning rate for 20 steps after a rollback")
    add("--clip_grad", default=0.0, type=limit, help="largest gradient norm, 0 for no clipping, hold for 4 times the "
        "largest of the last 100 steps")  # fmt: skip
    add("--adaptive_replay_weights", default="off", type=mode, metavar="{0,1,hold}", help="1: alpha, beta fall to "
        "50 %% by the last task; hold: put them back whatever changes them")  # fmt: skip


def shown(guards: Mapping[str, Values]) -> str:
    """Guards as the flags they stand for."""
    words = {True: "1", False: "0", None: "hold", "on": "1", "off": "0"}
    return "; ".join(
        f"{name} = " + " ".join(f"--{flag} {words.get(value, value)}" for flag, value in flags.items())  # type: ignore[call-overload]
        for name, flags in guards.items()
    )
