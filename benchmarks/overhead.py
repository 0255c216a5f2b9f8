"""What watching a step costs: CPU time of a watched step over that of the bare one, for each preset and its peers.

    python -m benchmarks.overhead [mlp transformer resnet] [--rounds 15] [--only default full]

The variants take turns: a round is a handful of steps of each, and the ratio is taken within the round, so that a busy
machine slows both sides.  Printed are the median over the rounds and, since a recorded step is rarer than a round, the
ratio of the whole.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import stabilitykit as sk
from stabilitykit.config import PRESETS, MonitorConfig

Batch = tuple[Tensor, Tensor]
Step = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Workload:
    """A model, its optimizer and batches.

    Attributes:
        steps: of one round.
    """

    title: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    batch: Callable[[], Batch]
    steps: int


class Block(nn.Module):
    """A pre-norm Transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.qkv(self.before_attention(x)).view(batch, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.projection(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.before_mlp(x))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """A basic block of a ResNet."""

    def __init__(self, given: int, width: int) -> None:
        super().__init__()
        stride = 1 if given == width else 2
        self.body = nn.Sequential(
            nn.Conv2d(given, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Identity() if given == width else nn.Conv2d(given, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.body(x) + self.shortcut(x))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))


def _transformer() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(512, 256), *(Block(256) for _ in range(4)), nn.LayerNorm(256), nn.Linear(256, 512)
    )


def _resnet() -> nn.Module:
    blocks = [Residual(given, width) for given, width in ((64, 64), (64, 128), (128, 256), (256, 512))]
    stem = (nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


WORKLOADS = {
    "mlp": Workload(
        "MLP 784-100-100-10, batch 64, AdamW",
        _mlp,
        _adamw,
        lambda: (torch.randn(64, 784), torch.randint(10, (64,))),
        steps=100,
    ),
    "transformer": Workload(
        "Transformer, 4 blocks of width 256, 256 tokens, AdamW",
        _transformer,
        _adamw,
        lambda: (torch.randint(512, (1, 256)), torch.randint(512, (1, 256))),
        steps=5,
    ),
    "resnet": Workload(
        "ResNet of four basic blocks, 32x32, batch 16, SGD with momentum",
        _resnet,
        lambda model: torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
        lambda: (torch.randn(16, 3, 32, 32), torch.randint(10, (16,))),
        steps=2,
    ),
}


class Runner:
    """One variant at work: its own model, the same batches as every other."""

    def __init__(self, workload: Workload) -> None:
        torch.manual_seed(0)
        self.model = workload.model()
        self.optimizer = workload.optimizer(self.model)
        self.batches = cycle([workload.batch() for _ in range(4)])
        self.step: Step = self.plain_step
        self.monitor: sk.Monitor | None = None
        self.settled: tuple[int, int] | None = None  # cadence, and steps between snapshots
        self.seconds: list[float] = []

    def plain_step(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad()
        logits = self.model(batch[0])
        loss = nn.functional.cross_entropy(logits.flatten(0, -2), batch[1].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def run(self, steps: int) -> None:
        """One round; its CPU seconds are kept."""
        started = time.process_time()
        for _ in range(steps):
            self.step(next(self.batches))
        self.seconds.append(time.process_time() - started)


@contextmanager
def bare(_runner: Runner) -> Iterator[None]:
    """Nobody watches."""
    yield


NEVER = 10**9
SENTINEL = PRESETS["light"].replace(
    cadence=NEVER, snapshot_every=NEVER, history_bytes=1 << 60, audit_every=0, replays=0,
    outputs=False, gradients=False, module_buffers=False,
)  # fmt: skip


def preset(config: MonitorConfig) -> Callable[[Runner], Any]:
    """Stabilitykit as a user attaches it, but for the child processes at the end."""
    config = config.replace(report=False, compact=False)

    @contextmanager
    def watched(runner: Runner) -> Iterator[None]:
        with tempfile.TemporaryDirectory() as folder:
            runner.monitor = sk.attach(runner.model, runner.optimizer, Path(folder) / "run", config=config)
            runner.step = runner.monitor.replayable(runner.plain_step)
            yield
            runner.settled = (runner.monitor._ledger.cadence, runner.monitor._history.interval)  # noqa: SLF001
            runner.monitor.close()

    return watched


@contextmanager
def anomaly_mode(runner: Runner) -> Iterator[None]:
    """`torch.autograd.detect_anomaly` around each step."""

    def step(batch: Batch) -> Tensor:
        with torch.autograd.set_detect_anomaly(True):
            return runner.plain_step(batch)

    runner.step = step
    yield


@contextmanager
def debug_underflow_overflow(runner: Runner) -> Iterator[None]:
    """transformers' tool: forward hooks that look at weights, inputs and outputs."""
    from transformers.debug_utils import DebugUnderflowOverflow

    DebugUnderflowOverflow(runner.model, max_frames_to_save=1)
    yield


@contextmanager
def naive_hooks(runner: Runner) -> Iterator[None]:
    """What a training script grows by itself: isnan, isinf, std and .item() on every output and gradient."""

    def look(tensor: Tensor) -> None:
        tensor.isnan().any().item(), tensor.isinf().any().item(), tensor.float().std().item()

    for module in runner.model.modules():
        module.register_forward_hook(lambda _module, _args, output: look(output.detach()))
    for parameter in runner.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda entry: look(entry.grad))  # type: ignore[no-untyped-call]
    yield


@contextmanager
def least(runner: Runner) -> Iterator[None]:
    """The least that can be done for the checks of every step: no module but this one, nothing general, no diagnosis.

    Random streams noted, norms of the parameters as the step finds them, of the gradients when backward ends and of the
    parameters it leaves; two transfers to the host, judged; a line of 200 bytes written; hooks that return at once.
    """
    parameters: list[Tensor] = list(runner.model.parameters())
    held: list[Tensor] = []
    after: list[float] = []

    def backward_ended() -> None:
        held.extend(torch._foreach_norm([entry.grad for entry in parameters if entry.grad is not None]))

    def accumulated(entry: Tensor) -> None:
        if entry is parameters[0]:  # the last of these networks' parameters to get its gradient
            torch.autograd.Variable._execution_engine.queue_callback(backward_ended)

    for module in runner.model.modules():
        module.register_forward_hook(lambda *_: None)
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]

    with tempfile.TemporaryFile(buffering=0) as log:

        def step(batch: Batch) -> Tensor:
            streams = torch.get_rng_state()
            touched = bool(after) and torch.stack(torch._foreach_norm(parameters)).tolist() != after
            held.clear()
            loss = runner.plain_step(batch)
            held.extend(torch._foreach_norm(parameters))
            *norms, value = torch.stack([*held, loss]).tolist()
            after[:] = norms[-len(parameters) :]
            if touched or not math.isfinite(math.hypot(value, *norms)) or not len(streams):
                raise ArithmeticError
            log.write(struct.pack("25d", time.time(), value, *norms[:2], *[math.nan] * 21))
            return loss

        runner.step = step
        yield


VARIANTS: dict[str, Callable[[Runner], Any]] = {
    "bare": bare,
    "checks at their least": least,
    "sentinel alone": preset(SENTINEL),
    **{name: preset(PRESETS[name]) for name in ("light", "default", "full")},
    "anomaly mode": anomaly_mode,
    "DebugUnderflowOverflow": debug_underflow_overflow,
    "naive hooks": naive_hooks,
}


def measure(workload: Workload, names: Sequence[str], rounds: int) -> dict[str, Runner]:
    """Run the variants in turn; those whose package is not installed are left out."""
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for name in names:
            runner = Runner(workload)
            try:
                stack.enter_context(VARIANTS[name](runner))
            except ImportError:
                continue
            runners[name] = runner
            runner.run(2 * workload.steps)  # caches, allocators, and the cadence finds its place
        for runner in runners.values():
            runner.seconds.clear()
        order = list(runners.values())
        for turn in range(rounds):
            gc.collect()
            for runner in order[turn % len(order) :] + order[: turn % len(order)]:
                runner.run(workload.steps)
        return runners


def print_table(workload: Workload, runners: dict[str, Runner]) -> None:
    """A line a variant: milliseconds a step, the ratios, and what the monitor settled on."""
    base = runners["bare"].seconds
    print(f"\n{workload.title}\n{'':24}{'ms/step':>9}{'median':>8}{'whole':>8}  cadence  snapshot every")
    for name, runner in runners.items():
        seconds = statistics.median(runner.seconds) / workload.steps
        median = statistics.median(mine / bare for mine, bare in zip(runner.seconds, base, strict=True))
        cadence, interval = ("" if entry in (None, NEVER) else str(entry) for entry in runner.settled or (None, None))
        whole = sum(runner.seconds) / sum(base)
        print(f"{name:24}{1e3 * seconds:9.2f}{median:8.3f}{whole:8.3f}{cadence:>9}{interval:>16}")


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", choices=[[], *WORKLOADS], help="default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="beside the bare step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ["bare", *(name for name in options.only if name != "bare")]
    for key in options.workloads or WORKLOADS:
        workload = WORKLOADS[key]
        print_table(workload, measure(workload, names, options.rounds))


if __name__ == "__main__":
    main()
