"""`python -m trainers ablate`: which guard stops which fault: each guard off, each alone, on the same runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
from jinja2 import Environment
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.live import Live

from stabilitykit.errors import UsageError
from trainers import flags
from trainers.campaign import Record, add_common, draw, execute, fault_names
from trainers.faults import FAULTS
from trainers.trial import Outcome, Spec

ALONE, WITHOUT = "only ", "without "
MEASURES = ("survived", "kept_accuracy", "detected", "origin_correct")
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Which guard stops which fault</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color-scheme: light dark }
 table { border-collapse: collapse } th, td { padding: .25rem .5rem; text-align: right; border: 1px solid #8884 }
 th:first-child { text-align: left } thead th { writing-mode: vertical-rl; text-align: left; vertical-align: bottom }
 td.full { background: #2a9d8f55 } td.part { background: #e9c46a55 } td.none { background: #d1495b33 }
</style>
<h1>Which guard stops which fault</h1>
<p>Runs of {{ repeats }} that survived and kept their accuracy (within 3 points of their healthy twin), for every set of
guards. A fault that nothing stops has an empty row; a guard that stops something alone has a full column there.</p>
<table><thead><tr><th>fault</th>{% for name in sets %}<th>{{ name }}</th>{% endfor %}</tr></thead>
{% for fault, row in rows.items() %}<tr><th>{{ fault }}</th>
{%- for kept in row %}
<td class="{{ 'full' if kept == repeats else 'part' if kept else 'none' }}">{{ kept }}</td>
{%- endfor -%}
</tr>
{% endfor %}</table>
<p>{{ command }}</p></html>
"""


def guard_sets() -> dict[str, tuple[str, ...]]:
    """Sets of guards by name: none, each alone, each left out, all."""
    names = tuple(flags.GUARDS)
    alone = {f"{ALONE}{name}": (name,) for name in names}
    without = {f"{WITHOUT}{name}": tuple(other for other in names if other != name) for name in names}
    return {"none": ()} | alone | without | {"all": names}


def specs(faults: Sequence[str], repeats: int, seed: int) -> list[Spec]:
    """Every fault under every set of guards; the same runs under each."""
    return [
        replace(draw(index, seed, (fault,), ()), guards=guards)
        for fault in faults
        for index in range(repeats)
        for guards in guard_sets().values()
    ]


def frame(outcomes: Iterable[Outcome]) -> pd.DataFrame:
    """A row a fault and set of guards: runs, and how many of them survived, kept their accuracy, were named right."""
    sets = {guards: name for name, guards in guard_sets().items()}
    rows = [
        {
            "fault": outcome.spec.fault,
            "guards": sets[outcome.spec.guards],
            "runs": 1,
            "cpu_seconds": outcome.cpu_seconds,
        }
        | {name: int(getattr(outcome, name)) for name in MEASURES}
        for outcome in outcomes
    ]
    return pd.DataFrame(rows).groupby(["fault", "guards"], sort=False, as_index=False).sum()


def pivot(data: pd.DataFrame) -> pd.DataFrame:
    """Kept accuracy, a row a fault, a column a set of guards, both in their order."""
    faults = [name for name in FAULTS if name in set(data["fault"])]
    wide = data.pivot_table(index="fault", columns="guards", values="kept_accuracy")
    return wide.reindex(index=faults, columns=list(guard_sets())).astype(int)


def heat_map(wide: pd.DataFrame, repeats: int) -> Figure:
    """Share of runs that kept their accuracy."""
    figure = Figure(figsize=(0.42 * len(wide.columns) + 3.5, 0.28 * len(wide) + 2.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(wide.to_numpy() / repeats, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(wide.columns)), list(wide.columns), rotation=90)
    axes.set_yticks(range(len(wide)), list(wide.index))
    runs = "the run" if repeats == 1 else f"share of {repeats} runs"
    axes.set_title(f"Which guard stops which fault: {runs} that kept its accuracy", loc="left")
    if repeats > 1:
        figure.colorbar(image, ax=axes, shrink=0.6)
    return figure


def page(wide: pd.DataFrame, repeats: int, command: str) -> str:
    """The table as one HTML file."""
    rows: Mapping[str, list[int]] = {str(fault): [int(n) for n in row] for fault, row in wide.iterrows()}
    template = Environment(autoescape=True).from_string(PAGE)
    return template.render(sets=list(wide.columns), rows=rows, repeats=repeats, command=command)


def write(folder: Path, outcomes: Sequence[Outcome], repeats: int, command: str) -> pd.DataFrame:
    """`ablation.parquet`, `ablation.png` and `ablation.html`."""
    data = frame(outcomes)
    wide = pivot(data)
    data.to_parquet(folder / "ablation.parquet", index=False)
    heat_map(wide, repeats).savefig(folder / "ablation.png", dpi=110)
    (folder / "ablation.html").write_text(page(wide, repeats, command))
    return wide


def main(argv: Sequence[str]) -> int:
    """Run the ablation; the last line of stdout is a summary as JSON."""
    parser = flags.Parser(prog="python -m trainers ablate", description=__doc__, allow_abbrev=False)
    add_common(parser)
    parser.add_argument("--repeats", type=flags.whole, default=2, help="runs of a fault under each set of guards")
    args = parser.parse_args(list(argv))
    faults = fault_names(args.faults)
    if args.repeats < 1 or args.jobs < 1:
        raise UsageError(f"got --repeats {args.repeats} --jobs {args.jobs}, expected 1 or more of each")
    wanted, record = specs(faults, args.repeats, args.seed), Record(args.out)
    console = Console(stderr=not sys.stdout.isatty())
    with Live("", console=console, refresh_per_second=1, transient=True) as live:
        outcomes = execute(
            wanted, record, args.jobs, lambda: live.update(f"{len(record.outcomes):,} of {len(wanted):,} runs")
        )
    wide = write(args.out, outcomes, args.repeats, f"python -m trainers ablate {' '.join(argv)}")
    kept = {name: int(wide[name].sum()) for name in wide.columns}
    seconds = round(sum(outcome.cpu_seconds for outcome in outcomes), 1)
    print(json.dumps({"runs_per_set": args.repeats * len(wide), "kept_accuracy": kept, "cpu_seconds": seconds}))
    return 0
