"""`python -m trainers sweep`: methods times seeds, in parallel, restartable, and the table at the end.

    python -m trainers sweep --out runs/sweep --seeds 0 1 2 --methods derpp er "causal-der --use_causal_sampling 4" \
        -- --dataset seq-fmnist-mini --backbone mnistmlp

What stands behind `--` is given to every run.  The same command again goes on where it was stopped: finished runs are
kept, others resumed from their checkpoints.  More methods and seeds may be added to a sweep, its flags may not change.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.live import Live
from rich.table import Table

from stabilitykit.errors import RunFolderError, UsageError
from stabilitykit.record.folder import replace_file
from stabilitykit.schema import plain
from trainers import cli, flags
from trainers.comparison import METRICS, Comparison, Difference, Spread, compare
from trainers.jobs import Job, Outcome, folder_name, plan, run_here, run_on_ray

SHOWN = {"class_il": "Class-IL %", "task_il": "Task-IL %", "forgetting": "forgetting %", "cpu_seconds": "CPU s"}
WIDE = 200  # columns of a table that goes into a file
COMPARED = {"class_il": "Class-IL vs", "task_il": "Task-IL vs", "forgetting": "forgetting vs"}


def main(argv: Sequence[str]) -> int:
    """Run a sweep; 0 when every run finished, 1 when some did not.

    Raises:
        UsageError: flags that cannot be right, of the sweep or of its runs.
        RunFolderError: the folder holds another sweep.
    """
    args = parse(argv)
    jobs = plan(args.methods, args.seeds, args.flags, args.out)
    for job in jobs:
        cli.configure(flags.parse(job.fresh_arguments()), ())  # refuses bad flags before anything is started
    claim(args.out, args.flags)
    left = [job for job in jobs if not job.finished]
    outcomes = run_on_ray(left, args.ray) if args.ray else run_here(left, args.jobs)
    with terminable(), closing(outcomes):
        failures = follow(jobs, outcomes)
    report(jobs, args.out, args.baseline or args.methods[0])
    for failure in failures:
        text = f"{failure.job.method}, seed {failure.job.seed}: exit code {failure.exit_code}: {failure.message}"
        print(f"python -m trainers sweep: {text}", file=sys.stderr)
    return 1 if failures else 0


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end the sweep as an exception does, so that its processes end with it."""

    def leave(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The sweep's own flags, and behind `--` those of every run, as `flags`."""
    own, _, common = _split(list(argv))
    parser = flags.Parser(
        prog="python -m trainers sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the sweep")
    add("--methods", nargs="+", required=True, help="models; with flags of their own in quotes")
    add("--seeds", nargs="+", type=flags.whole, default=[0, 1, 2, 3, 4], help="0 1 2 3 4")
    add("--jobs", type=flags.whole, default=len(os.sched_getaffinity(0)), help="processes at a time (a core each)")
    add("--ray", metavar="ADDRESS", help="run on a Ray cluster: its address, auto or local; pip install '.[ray]'")
    add("--baseline", help="the method others are compared with (the first)")
    args = parser.parse_args(own)
    args.flags = common
    if args.jobs < 1:
        raise UsageError(f"--jobs: got {args.jobs}, expected 1 or more")
    for name, given in (("methods", [folder_name(method) for method in args.methods]), ("seeds", args.seeds)):
        if len(set(given)) < len(given):
            raise UsageError(f"--{name}: got one twice, expected each once")
    if args.baseline is not None and args.baseline not in args.methods:
        raise UsageError(f"--baseline: got {args.baseline!r}, expected one of {', '.join(args.methods)}")
    return args


def _split(argv: list[str]) -> tuple[list[str], str, list[str]]:
    position = argv.index("--") if "--" in argv else len(argv)
    return argv[:position], "--", argv[position + 1 :]


def claim(out: Path, common: list[str]) -> None:
    """Make the folder a sweep's, or make sure that it is this one's.

    Raises:
        RunFolderError: it holds a sweep with other flags, or cannot be written.
    """
    path = out / "sweep.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if path.exists():
            held = json.loads(path.read_text())["flags"]
            if held != common:
                raise RunFolderError(
                    f"--out: {out} holds a sweep with {' '.join(held) or 'no flags'}, expected the same; name another"
                )
        else:
            replace_file(out, path, json.dumps({"flags": common}).encode())
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(f"--out: {out}: {error}, expected a folder that can be written; name another") from error


def follow(jobs: Sequence[Job], outcomes: Iterator[Outcome | None]) -> list[Outcome]:
    """Show the runs while they go on; those that failed."""
    failures: list[Outcome] = []
    console = Console()
    if not console.is_terminal:
        for ended in filter(None, outcomes):
            console.print(_line(ended), markup=False, highlight=False, soft_wrap=True)
            failures += [ended] if ended.exit_code else []
        return failures
    with Live(status(jobs, failures), console=console, refresh_per_second=2) as live:
        for outcome in outcomes:
            failures += [outcome] if outcome is not None and outcome.exit_code else []
            live.update(status(jobs, failures))
    return failures


def _line(outcome: Outcome) -> str:
    results = outcome.job.results()
    said = outcome.message if outcome.exit_code else f"Class-IL {_number(results.get('class_il')):.2f} %"
    return f"{outcome.job.method}, seed {outcome.job.seed}: {said}"


def status(jobs: Sequence[Job], failures: Sequence[Outcome]) -> Table:
    """The runs as they stand: a row a method, a column a seed."""
    failed = {outcome.job for outcome in failures}
    seeds = sorted({job.seed for job in jobs})
    table = Table("method", *(f"seed {seed}" for seed in seeds))
    for method in dict.fromkeys(job.method for job in jobs):
        cells = {job.seed: _cell(job, job in failed) for job in jobs if job.method == method}
        table.add_row(method, *(cells.get(seed, "") for seed in seeds))
    return table


def _cell(job: Job, failed: bool) -> str:
    results = job.results()
    if failed:
        return "failed"
    if not results:
        return "running" if job.folder.exists() else "-"
    accuracy = f"{_number(results.get('class_il')):.2f}"
    return accuracy if results["finished"] else f"{accuracy} ({results['tasks_seen']}/{results['num_tasks']})"


def report(jobs: Sequence[Job], out: Path, baseline: str) -> None:
    """Print the table; write every run as parquet, the comparison as JSON, the table as Markdown."""
    rows = [_row(job, results) for job in jobs if (results := job.results()).get("finished")]
    if not rows:
        return
    pq.write_table(pa.Table.from_pylist(rows), out / "runs.parquet")
    scores: dict[str, dict[int, dict[str, float]]] = {}
    for row in rows:
        scores.setdefault(row["method"], {})[row["seed"]] = {metric: row[metric] for metric in METRICS}
    compared = compare(scores, baseline)
    body = {"baseline": baseline, "runs": rows, "methods": [entry.body() for entry in compared]}
    replace_file(out, out / "summary.json", (json.dumps(plain(body), indent=1) + "\n").encode())
    lines = table_of(compared, baseline)
    replace_file(out, out / "table.md", markdown(lines).encode())
    shown = Table(*lines[0])
    for line in lines[1:]:
        shown.add_row(*line)
    console = Console()
    if not console.is_terminal:
        console.width = WIDE
    console.print(shown)


def _row(job: Job, results: dict[str, Any]) -> dict[str, Any]:
    metrics = {metric: _number(results.get(metric)) for metric in METRICS}
    return {"method": job.method, "seed": job.seed, **metrics, "run_dir": str(job.folder)}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float | str) else math.nan


def table_of(compared: Sequence[Comparison], baseline: str) -> list[list[str]]:
    """Header and rows."""
    header = ["method", "runs", *SHOWN.values(), *(f"{name} {baseline} [95 %]" for name in COMPARED.values())]
    rows = [
        [
            entry.method,
            str(entry.spreads["class_il"].num_runs),
            *(_spread(entry.spreads[metric]) for metric in SHOWN),
            *(_difference(entry.differences.get(metric)) for metric in COMPARED),
        ]
        for entry in compared
    ]
    return [header, *rows]


def _spread(entry: Spread) -> str:
    if not entry.num_runs:
        return "-"
    return f"{entry.mean:.2f}" if math.isnan(entry.sd) else f"{entry.mean:.2f} ± {entry.sd:.2f}"


def _difference(entry: Difference | None) -> str:
    if entry is None or not entry.num_pairs:
        return "-"
    limits = f" [{entry.low:+.2f}, {entry.high:+.2f}]" if entry.num_pairs > 1 else ""
    return f"{entry.mean:+.2f}{limits}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """The table for a document."""
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
