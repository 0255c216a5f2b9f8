"""`python -m trainers campaign`: many short runs, each with a random fault in it, and what the guards made of them."""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from stabilitykit.errors import UsageError
from trainers import flags
from trainers.binomial import exact_interval
from trainers.faults import FAULTS
from trainers.trial import BATCHES_PER_TASK, HEALTHY, NETS, Outcome, Spec, prepare_worker, run_trial

RECORD = "runs.jsonl"
NUM_SEEDS = 10  # of the networks and streams: each has a healthy twin, measured once
TASKS = (2, 3)  # 84 or 126 steps


@dataclass(frozen=True, kw_only=True)
class CampaignConfig:
    """What a campaign runs.

    Attributes:
        runs: runs with a fault.
        healthy: runs without one, for false alarms.
        guards: `all` or a list (standing by), `guide`, `quick` (the stability guide's eight, or first four, with its
            numbers), or `none`.
        faults: names from FAULTS.
        lr: base learning rate of every run.
        seed: draws faults, steps, networks.
        jobs: processes.
        out: folder of the record; runs found in it are not repeated.
    """

    runs: int
    healthy: int
    guards: str
    faults: tuple[str, ...]
    lr: float = 0.05
    seed: int
    jobs: int
    out: Path

    def __post_init__(self) -> None:
        for name in ("runs", "healthy"):
            if getattr(self, name) < 0:
                raise UsageError(f"--{name}: got {getattr(self, name)}, expected 0 or more")
        if self.jobs < 1:
            raise UsageError(f"--jobs: got {self.jobs}, expected 1 or more")

    def specs(self) -> list[Spec]:
        """Every run; the i-th is the same whatever the number of runs and the guards."""
        guards = flags.guard_names(self.guards)
        faulty = [draw(index, self.seed, self.faults, guards) for index in range(self.runs)]
        healthy = [draw(index, self.seed, (HEALTHY,), guards) for index in range(self.healthy)]
        by_guide = self.guards in flags.BY_GUIDE
        return [replace(spec, lr=self.lr, by_guide=by_guide) for spec in faulty + healthy]


def draw(index: int, seed: int, faults: Sequence[str], guards: tuple[str, ...]) -> Spec:
    """The run of that number."""
    draws = random.Random(f"{seed} {index} {','.join(faults)}")
    num_tasks, fault = draws.choice(TASKS), draws.choice(faults)
    net = draws.choice(NETS)
    step = -1
    if fault != HEALTHY:
        kind = FAULTS[fault]
        net = "convnet" if kind.needs_batch_norm else net
        starts = [task * BATCHES_PER_TASK for task in range(num_tasks)]
        step = draws.choice(kind.steps(starts, num_tasks * BATCHES_PER_TASK))
    run_seed = draws.randrange(NUM_SEEDS) if fault != HEALTHY else index
    return Spec(index=index, seed=run_seed, net=net, num_tasks=num_tasks, fault=fault, step=step, guards=guards)


class Record:
    """Outcomes on disk, a line each, written as they come: a campaign that was stopped goes on where it was."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / RECORD
        self.outcomes: dict[Spec, Outcome] = {}
        if self.path.exists():
            self._read()

    def add(self, outcome: Outcome) -> None:
        """Write it down."""
        self.outcomes[outcome.spec] = outcome
        with self.path.open("a") as file:
            file.write(outcome.line() + "\n")

    def _read(self) -> None:
        lines = self.path.read_text().splitlines()
        for line in lines:
            try:
                outcome = Outcome.from_line(line)
            except (ValueError, KeyError, TypeError):
                continue  # torn by a kill: that run is repeated
            self.outcomes[outcome.spec] = outcome
        self.path.write_text("".join(outcome.line() + "\n" for outcome in self.outcomes.values()))


def execute(specs: Iterable[Spec], record: Record, jobs: int, done: Callable[[], None]) -> list[Outcome]:
    """Run what has not been run; the outcomes of all, in the order of `specs`."""
    wanted = list(specs)
    todo = [spec for spec in wanted if spec not in record.outcomes]
    twins = record.path.parent / "twins"
    # Spawned, not forked: a forked process would share locks with the threads of this one.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=prepare_worker) as pool:
        for future in _in_flight((pool.submit(run_trial, spec, twins) for spec in todo), 2 * jobs):
            record.add(future.result())
            done()
    return [record.outcomes[spec] for spec in wanted]


def _in_flight(futures: Iterator[Future[Outcome]], limit: int) -> Iterator[Future[Outcome]]:
    """Completed futures, with no more than `limit` submitted at a time: an interrupt has little to wait for."""
    waiting: set[Future[Outcome]] = set()
    while True:
        waiting |= set(itertools.islice(futures, limit - len(waiting)))
        if not waiting:
            return
        finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        yield from finished


def summarise(guards: str, outcomes: Sequence[Outcome]) -> dict[str, object]:
    """The campaign in one object; counts over the runs with a fault, false alarms over those without."""
    faulty = [outcome for outcome in outcomes if outcome.spec.fault != HEALTHY]
    healthy = [outcome for outcome in outcomes if outcome.spec.fault == HEALTHY]
    return {
        "guards": guards,
        "runs": len(faulty),
        "survived": sum(outcome.survived for outcome in faulty),
        "kept_accuracy": sum(outcome.kept_accuracy for outcome in faulty),
        "detected": sum(outcome.detected for outcome in faulty),
        "origin_correct": sum(outcome.origin_correct for outcome in faulty),
        "false_alarms": sum(outcome.alarms > 0 or not outcome.survived for outcome in healthy),
        "cpu_seconds": round(sum(outcome.cpu_seconds for outcome in outcomes), 1),
    }


def intervals(outcomes: Sequence[Outcome]) -> list[str]:
    """What the counts prove, a line each: exact 95 % limits."""
    faulty = [outcome for outcome in outcomes if outcome.spec.fault != HEALTHY]
    lines = []
    for name in MEASURED if faulty else ():
        count = sum(getattr(outcome, name) for outcome in faulty)
        low, high = exact_interval(count, len(faulty))
        lines.append(f"{name}: {count} of {len(faulty)}, 95 % limits {100 * low:.2f} to {100 * high:.2f} %")
    return lines


def table(outcomes: Iterable[Outcome], title: str) -> Table:
    """Outcomes by fault."""
    by_fault: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_fault.setdefault(outcome.spec.fault, []).append(outcome)
    shown = Table(title=title, title_justify="left")
    for column in ("fault", "runs", "survived", "kept", "detected", "named", "cpu s"):
        shown.add_column(column, justify="left" if column == "fault" else "right", no_wrap=True)
    for fault, rows in sorted(by_fault.items()):
        counts = Counter({name: sum(getattr(row, name) for row in rows) for name in MEASURED})
        seconds = sum(row.cpu_seconds for row in rows) / len(rows)
        shown.add_row(fault, str(len(rows)), *(str(counts[name]) for name in MEASURED), f"{seconds:.1f}")
    return shown


MEASURED = ("survived", "kept_accuracy", "detected", "origin_correct")


def main(argv: Sequence[str]) -> int:
    """Run a campaign; the last line of stdout is its summary as JSON."""
    config = parse(argv)
    specs, record = config.specs(), Record(config.out)
    console = Console(stderr=not sys.stdout.isatty())
    title = f"guards {config.guards}, seed {config.seed}"

    def progress() -> Table:
        known = [record.outcomes[spec] for spec in specs if spec in record.outcomes]
        return table(known, f"{title}: {len(known):,} of {len(specs):,}")

    with Live(progress(), console=console, refresh_per_second=1, transient=True) as live:
        outcomes = execute(specs, record, config.jobs, lambda: live.update(progress()))
    console.print(progress())
    for line in intervals(outcomes):
        console.print(line, highlight=False)
    print(json.dumps(summarise(config.guards, outcomes)), flush=True)
    return 0


def parse(argv: Sequence[str]) -> CampaignConfig:
    """The flags of the command."""
    parser = flags.Parser(prog="python -m trainers campaign", description=__doc__, allow_abbrev=False)
    add_common(parser)
    parser.add_argument("--runs", type=flags.whole, default=100, help="runs with a fault")
    parser.add_argument("--healthy", type=flags.whole, help="runs without one (a fifth of --runs)")
    parser.add_argument("--lr", type=flags.number, default=0.05, help="base learning rate of every run")
    parser.add_argument("--guards", default="all", help="all, guide, quick (its first four), none, or a list")
    args = parser.parse_args(list(argv))
    return CampaignConfig(
        runs=args.runs,
        healthy=args.runs // 5 if args.healthy is None else args.healthy,
        guards=args.guards,
        faults=fault_names(args.faults),
        lr=args.lr,
        seed=args.seed,
        jobs=args.jobs,
        out=args.out,
    )


def fault_names(given: str) -> tuple[str, ...]:
    """`all`, or a list.

    Raises:
        UsageError: no such fault.
    """
    names = tuple(FAULTS) if given == "all" else tuple(given.split(","))
    for name in names:
        if name not in FAULTS:
            raise UsageError(f"--faults: got {name!r}, expected all, or a list of {', '.join(FAULTS)}")
    return names


def add_common(parser: argparse.ArgumentParser) -> None:
    """Flags that campaign and ablation share."""
    parser.add_argument("--faults", default="all", help=f"all, or a list of {', '.join(FAULTS)}")
    parser.add_argument("--seed", type=flags.whole, default=0, help="draws faults, steps and networks")
    parser.add_argument("--jobs", type=flags.whole, default=2, help="processes, one thread each")
    parser.add_argument("--out", type=Path, required=True, help="folder of the record; what it holds is not repeated")
