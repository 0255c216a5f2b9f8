"""Fill reports/: run the demo, copy its reports, and write the table of reports/README.md from the run.json files.

python -m benchmarks.gallery
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
REPORTS = ROOT / "reports"
RUNS = Path("runs") / "gallery"
TITLES = {
    "demo-before": "Causal-DER without guards: goes non-finite by itself in the second task",
    "demo-after": "The same with the eight guards, as the stability guide sets them",
}
KEPT = ("schema_version", "name", "created", "command", "versions", "host", "device", "num_threads", "seed", "results")


def facts(folder: Path) -> dict[str, Any]:
    """The part of a run's facts that a reader of the gallery needs, with its ending and verdict."""
    meta = json.loads((folder / "run.json").read_text())
    kept = {key: meta[key] for key in KEPT if key in meta}
    kept["host"] = {key: value for key, value in meta["host"].items() if key != "machine"}
    ending = json.loads((folder / "ending.json").read_text())
    kept["ending"] = {key: ending[key] for key in ("ending", "step")}
    diagnosis = folder / "diagnosis.json"
    if diagnosis.exists():
        kept["verdict"] = json.loads(diagnosis.read_text())["verdict"]
    return kept


def add(folder: Path) -> None:
    """Copy one run's reports."""
    target = REPORTS / folder.name
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(  # exit code 1: there are findings
        [sys.executable, "-m", "stabilitykit", "report", str(folder), "--png"], cwd=ROOT, check=False
    )
    for name in ("report.html", "report.png"):
        shutil.copyfile(ROOT / folder / name, target / name)
    (target / "run.json").write_text(json.dumps(facts(ROOT / folder), indent=1) + "\n")


def table() -> str:
    """One row a run, from its run.json."""
    lines = ["| run | ending | what the report says | Class-IL | Task-IL | report |", "|---|---|---|---|---|---|"]
    for path in sorted(REPORTS.glob("*/run.json"), reverse=True):
        run = json.loads(path.read_text())
        results = run.get("results", {}) if "verdict" not in run else {}
        figures = [f"{results[key]:.1f} %" if key in results else "" for key in ("class_il", "task_il")]
        said = run.get("verdict", f"no non-finite value in {run['ending']['step'] + 1} steps")
        name = path.parent.name
        links = f"[HTML]({name}/report.html), [PNG]({name}/report.png), [facts]({name}/run.json)"
        title = TITLES.get(name, name)
        lines.append(f"| {title} | {run['ending']['ending']} | {said} | {figures[0]} | {figures[1]} | {links} |")
    return "\n".join(lines)


def main() -> int:
    """Run, copy, write."""
    shutil.rmtree(ROOT / RUNS, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "trainers.demo", "--runs", str(RUNS)], cwd=ROOT, check=True)
    for name in TITLES:
        add(RUNS / name)
    facts_of = json.loads((REPORTS / "demo-before" / "run.json").read_text())
    versions = ", ".join(f"{name} {version}" for name, version in facts_of["versions"].items())
    text = f"""# Reports of real runs

Made by `make reports`; this page is generated from the `run.json` files.

{table()}

Seed {facts_of["seed"]}; {versions}; {facts_of["host"]["platform"]}, {facts_of["host"]["cpu_count"]} cores, CPU.

![The unguarded run](demo-before/report.png)
"""
    (REPORTS / "README.md").write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
