"""Where the time of watching a step goes: reading memory, statistics, Python, the log.

    python -m benchmarks.breakdown [mlp transformer resnet] [--preset full] [--rounds 6]

The pieces are wrapped in clocks of this thread's CPU time, each without what it calls in turn. The floor of a piece is
what the machine takes to read the piece's tensors once from memory. What is left over is the user's own step, slower
where watching has pushed its data out of the caches and by torch's calls of the hooks.
"""

from __future__ import annotations

import argparse
import functools
import pkgutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.overhead import WORKLOADS, Runner, Workload, preset
from stabilitykit.config import PRESETS, MonitorConfig
from stabilitykit.containers import tensors_of

STEP = "the step itself"
READING = ("statistics", "norms of every step", "copies and updates")
PIECES = {
    STEP: ("benchmarks.overhead.Runner.plain_step",),
    "statistics": ("stabilitykit.watch.rows.measure", "stabilitykit.watch.rows.measure_each"),
    "norms of every step": (
        "stabilitykit.watch.gradients.GradientTracker._norms",
        "stabilitykit.watch.writes.ParameterNorms._measure",
    ),
    "copies and updates": (
        "stabilitykit.watch.parameters.merge",
        "stabilitykit.watch.parameters.ParameterWatch._update",
    ),
    "snapshots": ("stabilitykit.snapshot.TrainingState.capture",),
    "the log": ("stabilitykit.record.Recorder.write",),
    "Python between": (
        "stabilitykit.monitor.Monitor._replayable_step",
        "stabilitykit.watch.watch.Watch.unseen",
        "stabilitykit.watch.modules.ModuleWatch.record",
    ),
}


class Clock:
    """Adds up the time in functions, less that of the clocked functions they call.

    Attributes:
        seconds: by piece.
        num_bytes: of the tensors that the functions of a piece were given, while `counting`.
    """

    def __init__(self) -> None:
        self.seconds, self.num_bytes = Counter[str](), Counter[str]()
        self.counting = False
        self._inner = [0.0]

    def around(self, function: Callable[..., Any], piece: str) -> Callable[..., Any]:
        """`function`, clocked."""

        @functools.wraps(function)
        def clocked(*args: Any, **kwargs: Any) -> Any:
            if self.counting:
                given = [entry for entry in args if isinstance(entry, torch.Tensor | list | tuple | dict)]
                self.num_bytes[piece] += sum(tensor.nbytes for _, tensor in tensors_of(given))
            started = time.thread_time()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.thread_time() - started
                self.seconds[piece] += spent - self._inner.pop()
                self._inner[-1] += spent

        return clocked


@contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """While it lasts, the functions of the pieces are clocked."""
    with ExitStack() as stack:
        for piece, names in PIECES.items():
            for name in names:
                stack.enter_context(patch(name, clock.around(pkgutil.resolve_name(name), piece)))
        yield


def bandwidth() -> float:
    """Bytes a second at which one thread reads memory that is in no cache."""
    wide = torch.ones(1 << 26)
    started = time.thread_time()
    wide.sum()
    return wide.nbytes / (time.thread_time() - started)


def print_breakdown(workload: Workload, config: MonitorConfig, rounds: int) -> None:
    """A line a piece: microseconds a step, what that is of the bare step, and the floor."""
    bare, clock = Runner(workload), Clock()
    with clocked(clock):
        runner = Runner(workload)
        with preset(config)(runner):
            for entry in (bare, runner):
                entry.run(2 * workload.steps)
                entry.seconds.clear()
            clock.counting = True
            runner.step(next(runner.batches))
            clock.counting = False
            clock.seconds.clear()
            for _ in range(rounds):
                bare.run(workload.steps)
                runner.run(workload.steps)
    base = sum(bare.seconds) / (rounds * workload.steps)
    spent = {piece: seconds / (rounds * workload.steps) for piece, seconds in clock.seconds.items()}
    spent["remainder"] = spent.pop(STEP) - base
    print(f"\n{workload.title}\n{'':24}{'us/step':>10}{'of bare':>9}{'MB':>8}{'floor us':>10}")
    print(f"{'bare step':24}{1e6 * base:10.0f}{1:9.1%}")
    speed = bandwidth()
    for piece in (*list(PIECES)[1:], "remainder"):
        line = f"{piece:24}{1e6 * spent.get(piece, 0.0):10.0f}{spent.get(piece, 0.0) / base:9.1%}"
        read = clock.num_bytes[piece] if piece in READING and config.cadence == 1 else 0  # as at every step
        print(line + (f"{read / 1e6:8.1f}{1e6 * read / speed:10.0f}" if read else ""))
    print(f"{'all':24}{1e6 * sum(spent.values()):10.0f}{sum(spent.values()) / base:9.1%}   {speed / 1e9:.1f} GB/s")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", choices=[[], *WORKLOADS], help="default: all")
    parser.add_argument("--preset", choices=PRESETS, default="full")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for key in options.workloads or WORKLOADS:
        print_breakdown(WORKLOADS[key], PRESETS[options.preset], options.rounds)


if __name__ == "__main__":
    main()
