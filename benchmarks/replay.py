"""What a diagnosis costs beside the step it explains.

python -m benchmarks.replay [--repeats 5]

CPU time is `process_time`, one thread, medians; bare and watched steps take turns.  Memory is the kernel's own high
mark of a child process (`VmHWM`, reset before the step through `/proc/self/clear_refs`), less what the process held
before the model was built; `MALLOC_MMAP_THRESHOLD_` makes freed tensors go back at once, so that a mark is what was
held together.  It counts everything: activations, copies of the state, Python objects.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import stabilitykit as sk

Q = {"report": False, "compact": False}
LIMITS = {"replay": 60.0, "memory": 3.0}


@dataclass
class Workload:
    """A model with a step; `gate` is 1, and 0 where the step is to go bad, at `place`."""

    model: nn.Module
    stem: Callable[[Tensor], Tensor]
    rest: Callable[[Tensor], Tensor]
    batch: Tensor
    place: str = "forward"

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.good, self.bad = torch.ones(()), torch.zeros(())

    def step(self, batch: Tensor, gate: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        first = self.stem(batch)
        loss = self.rest(first).square().mean()
        edge = (first.square().mean() * gate).sqrt()  # its derivative is Inf where the gate is 0
        loss = loss / gate if self.place == "forward" else loss + 1e-3 * edge
        loss.backward()
        self.optimizer.step()
        return loss


def mlp(place: str) -> Workload:
    model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    return Workload(model, model[0], model[1:], torch.randn(64, 784), place)


def transformer(place: str) -> Workload:
    block = nn.TransformerEncoderLayer(256, 4, 1024, 0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(block, 4, enable_nested_tensor=False)

    def rest(h: Tensor) -> Tensor:
        for layer in model.layers[1:]:
            h = layer(h)
        return h

    return Workload(model, model.layers[0], rest, torch.randn(1, 256, 256), place)


class BasicBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        through = self.second_norm(self.second(self.first_norm(self.first(h)).relu()))
        return (through + self.shortcut(h)).relu()


def resnet(place: str) -> Workload:
    blocks = [BasicBlock(16, 16, 1), BasicBlock(16, 32, 2), BasicBlock(32, 64, 2), BasicBlock(64, 128, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), *blocks, *head)
    return Workload(model, model[0], model[1:], torch.randn(16, 3, 32, 32), place)


WORKLOADS: Mapping[str, Callable[[str], Workload]] = {"MLP": mlp, "Transformer": transformer, "ResNet": resnet}


@contextmanager
def watched(work: Workload, config: sk.MonitorConfig) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """The workload's step with a monitor on it."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"config": config, "on_nonfinite": "skip"}
        with sk.attach(work.model, work.optimizer, Path(folder) / "run", **options) as monitor:
            yield monitor.replayable(work.step)


def seconds(function: Callable[[], object]) -> float:
    """CPU time of one call."""
    started = time.process_time()
    function()
    return time.process_time() - started


def bare_seconds(work: Workload, steps: int = 15) -> float:
    """Median CPU time of a healthy step that nobody watches."""
    times = [seconds(lambda: work.step(work.batch, work.good)) for _ in range(steps + 3)]
    return statistics.median(times[3:])


def faulty_seconds(name: str, place: str, config: sk.MonitorConfig, healthy: int) -> float:
    """CPU time of the call whose step goes bad: its first run, the replay, the diagnosis."""
    work = WORKLOADS[name](place)
    with watched(work, config) as step:
        for _ in range(healthy):
            step(work.batch, work.good)
        return seconds(lambda: step(work.batch, work.bad))


# Memory: in a child process.


def resident(field: str) -> float:
    """`VmRSS` or `VmHWM` of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_of(function: Callable[[], object]) -> float:
    """High-water mark of one call, in MB."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    function()
    return resident("VmHWM")


def measure_memory(name: str, place: str, usual: bool) -> dict[str, float]:
    """Peaks, above an idle process, of a bare step, of a healthy watched one, and of calls that are diagnosed: the
    first one watched, and one after two snapshots, whose run-up is run again as well.
    """
    with watched(mlp(place), sk.MonitorConfig(**Q)) as step:  # whatever is loaded at first use is loaded
        for gate in (torch.ones(()), torch.ones(()), torch.zeros(())):
            step(torch.randn(64, 784), gate)
    gc.collect()
    idle = resident("VmRSS")
    work = WORKLOADS[name](place)
    for _ in range(2):
        work.step(work.batch, work.good)
    peaks = {"bare": peak_of(lambda: work.step(work.batch, work.good)) - idle}
    with watched(work, sk.MonitorConfig(**Q)) as step:
        for _ in range(12):
            step(work.batch, work.good)
        peaks["healthy"] = peak_of(lambda: step(work.batch, work.good)) - idle
        if usual:
            peaks["diagnosed"] = peak_of(lambda: step(work.batch, work.bad)) - idle
    if not usual:
        with watched(work, sk.MonitorConfig(**Q)) as step:
            peaks["diagnosed"] = peak_of(lambda: step(work.batch, work.bad)) - idle
    return peaks


def memory(name: str, place: str, run_up: str) -> dict[str, float]:
    """`measure_memory` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.replay", "--memory-of", name, place, run_up]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rows(repeats: int) -> Iterator[tuple[str, dict[str, float]]]:
    """One row a workload and place."""
    single, usual = sk.MonitorConfig(**Q, snapshot_every=1), sk.MonitorConfig(**Q)
    for name in WORKLOADS:
        for place in ("forward", "backward"):
            bare = bare_seconds(WORKLOADS[name](place))
            alone = statistics.median(faulty_seconds(name, place, single, 0) for _ in range(repeats))
            run_up = statistics.median(faulty_seconds(name, place, usual, 15) for _ in range(repeats))
            peaks, more = memory(name, place, "alone"), memory(name, place, "run-up")
            yield (
                f"{name}, {place}",
                {
                    "step ms": 1e3 * bare,
                    "replay": alone / bare,
                    "with run-up": run_up / bare,
                    "step MB": peaks["bare"],
                    "watched": peaks["healthy"] / peaks["bare"],
                    "memory": peaks["diagnosed"] / peaks["bare"],
                    "with run-up ": more["diagnosed"] / more["bare"],
                },
            )


def main() -> int:
    """Print the table; 1 where a limit does not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print(json.dumps(measure_memory(*options.memory_of[:2], options.memory_of[2] == "run-up")))
        return 0
    broken = []
    print("| workload, fault | step ms | replay | with run-up | step MB | watched | memory | with run-up |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, row in rows(options.repeats):
        print(f"| {name} | " + " | ".join(f"{value:.3g}" for value in row.values()) + " |", flush=True)
        broken += [f"{name}: {key} {row[key]:.3g} > {limit}" for key, limit in LIMITS.items() if row[key] > limit]
    print("times of the step's own CPU time and peak memory; limits:", LIMITS)
    print("\n".join(broken))
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
