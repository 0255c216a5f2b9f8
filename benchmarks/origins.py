"""nanzoo's table: stabilitykit beside what people use today.

python -m benchmarks.origins [--markdown]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
TOOLS = {
    "loss check (`isfinite(loss)`)": "benchmarks.peers:LossCheck",
    "`torch.autograd.detect_anomaly`": "benchmarks.peers:DetectAnomaly",
    "transformers `DebugUnderflowOverflow`": "benchmarks.peers:DebugUnderflowOverflow",
    "stabilitykit": "benchmarks.nanzoo_adapter:StabilityKit",
}


def judged(adapter: str) -> list[dict[str, object]]:
    """Every case's marks under one tool."""
    spec = importlib.util.spec_from_file_location("nanzoo", HERE / "nanzoo" / "nanzoo.py")
    assert spec is not None
    assert spec.loader is not None
    harness = importlib.util.module_from_spec(spec)
    sys.modules["nanzoo"] = harness
    spec.loader.exec_module(harness)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "marks.json"
        with contextlib.redirect_stdout(io.StringIO()):
            harness.main(["--adapter", adapter, "--json", str(path), "--quiet"])
        rows: list[dict[str, object]] = json.loads(path.read_text())
    return rows


def main() -> int:
    """Print the table; 1 where stabilitykit misses an origin or raises a false alarm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    version = torch.__version__.split("+")[0]
    print(f"| tool (torch {version}, CPU, {options.threads} thread) | exact origin | false alarms |")
    print("|---|---|---|")
    missed: list[object] = []
    for name, adapter in TOOLS.items():
        if adapter.endswith("DebugUnderflowOverflow") and importlib.util.find_spec("transformers") is None:
            print(f"| {name} | not installed | |")
            continue
        rows = judged(adapter)
        faulty = [row for row in rows if not row["truth"]["healthy"]]  # type: ignore[index]
        healthy = [row for row in rows if row["truth"]["healthy"]]  # type: ignore[index]
        exact = sum(bool(row["exact"]) for row in faulty)
        alarms = sum(not row["exact"] for row in healthy)
        print(f"| {name} | {exact}/{len(faulty)} | {alarms}/{len(healthy)} |", flush=True)
        missed = [row["id"] for row in rows if not row["exact"]]
    if missed:
        print("missed:", ", ".join(map(str, missed)))
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
