"""`python -m trainers.demo`: one run that goes non-finite by itself, the same run with the guards on, one screen.

Nothing is planted.  The first task has nothing to rehearse, so replay begins with the second and meets a network it
cannot train stably: at this rate and weight of the distillation term each update overshoots further than the last, and
the logits it stores are the next teachers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.rule import Rule

from stabilitykit.errors import NonFiniteError, StabilityKitError
from trainers import cli, flags, progress
from trainers.experiment import run
from trainers.results import Results

COMMAND = [
    *("--model", "causal-der", "--dataset", "seq-fmnist-mini", "--backbone", "resnet8", "--pool", "2"),
    *("--n_epochs", "2", "--lr", "0.5", "--alpha", "12", "--beta", "24", "--replay_warmup_tasks", "1"),
    *("--buffer_size", "500", "--record_every", "4", "--seed", "0"),
]


def fresh_folder(runs: Path, name: str) -> Path:
    """`runs/name`, or the first of `name-2`, `name-3`, ... that does not exist."""
    candidate, number = runs / name, 1
    while candidate.exists():
        number += 1
        candidate = runs / f"{name}-{number}"
    return candidate


def train(folder: Path, guards: str, console: Console) -> Results:
    """One of the two runs."""
    command = [*COMMAND, "--guards", guards, "--run_dir", str(folder)]
    console.print(f"$ python -m trainers {' '.join(command)}", style="bold", markup=False, highlight=False)
    config = cli.configure(flags.parse(command), ("python", "-m", "trainers", *command))
    return run(config, progress.for_stdout())


def before(folder: Path, console: Console) -> str:
    """Run unguarded; the verdict, empty when the run did not go non-finite."""
    try:
        train(folder, "none", console)
    except NonFiniteError as error:
        return str(error)
    return ""


def show(console: Console, verdict: str, results: Results, folders: tuple[Path, Path], seconds: float) -> None:
    """The last screen."""
    console.print(Rule("without guards", align="left"))
    console.print(verdict or "stayed finite on this machine, which was not expected", markup=False, highlight=False)
    console.print(Rule("with guards", align="left"))
    console.print(
        f"finished: {results.num_steps} steps, {results.num_skipped} skipped, last loss {results.last_loss:.3g}, "
        f"{results.guards['clip']} gradients clipped\n"
        f"Class-IL {results.class_il:.2f} %, Task-IL {results.task_il:.2f} % (chance: 10 % and 50 %)",
        highlight=False,
    )
    console.print(Rule(f"reports, after {seconds:.0f} s", align="left"))
    for folder in folders:
        console.print(str(folder / "report.html"), markup=False, highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Both runs and the screen; 0 when the first died and the second lived."""
    parser = argparse.ArgumentParser(prog="python -m trainers.demo", description="A run that dies, and what saves it.")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the two run folders go")
    runs = parser.parse_args(argv).runs
    console, started = Console(), time.monotonic()
    torch.set_num_threads(1)  # the same bits whatever the number of cores
    folders = fresh_folder(runs, "demo-before"), fresh_folder(runs, "demo-after")
    try:
        verdict = before(folders[0], console)
        console.print(
            "it went non-finite; now the same with all eight guards, as the guide sets them"
            if verdict
            else "it stayed finite"
        )
        results = train(folders[1], "guide", console)
    except StabilityKitError as error:
        print(f"python -m trainers.demo: {error}", file=sys.stderr)
        return 1 if isinstance(error, NonFiniteError) else 2
    show(console, verdict, results, folders, time.monotonic() - started)
    return 0 if verdict else 1


if __name__ == "__main__":
    sys.exit(main())
