"""What a DER++ step of `trainers` costs beside the three forwards and backwards it needs.

    python -m benchmarks.trainer_step [--steps 200] [--rounds 5]

A bare loop does nothing but three forwards, three losses, one backward and the optimizer's step, on tensors that lie
ready, other ones for each forward.  The trainer's own step does the same and also loads, augments, draws, checks and
stores.  Both run in turn, in blocks, on one thread; CPU time of this process, the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, mse_loss

from trainers.buffer import BufferConfig
from trainers.datasets import DatasetConfig
from trainers.experiment import ExperimentConfig, build_trainer
from trainers.networks import NetworkConfig
from trainers.progress import NoProgress
from trainers.trainer import Trainer
from trainers.watching import WatchConfig

SETTINGS = {
    "mnistmlp, 1x28x28, batch 64": ("seq-fmnist-mini", "mnistmlp", 1, 64),
    "resnet8, 3x16x16, batch 32": ("seq-cifar100", "resnet8", 2, 32),
    "reduced-resnet18, 3x32x32, batch 32": ("seq-cifar100", "reduced-resnet18", 1, 32),
}


def random_cifar100(folder: Path) -> None:
    """Images of the right shape: what they show does not change what a step costs."""
    images = np.random.default_rng(0).integers(0, 256, (20_000, 32, 32, 3), np.uint8)
    labels = np.arange(20_000) % 100
    arrays = {"train_images": images, "train_labels": labels, "test_images": images[:1000]}
    np.savez(folder / "cifar100.npz", **arrays, test_labels=labels[:1000])


def make_trainer(folder: Path, setting: tuple[str, str, int, int], name: str) -> Trainer:
    dataset, network, pool, batch = setting
    config = ExperimentConfig(
        run_dir=folder / name.replace("/", "-"),
        method="derpp",
        batch_size=batch,
        dataset=DatasetConfig(name=dataset, base_path=folder),
        network=NetworkConfig(name=network, pool=pool),
        buffer=BufferConfig(size=500, minibatch_size=batch),
        watch=WatchConfig(monitor=False),
    )
    return build_trainer(config, NoProgress())


def trainer_block(trainer: Trainer) -> Callable[[int], None]:
    """Steps as `Trainer.run_epoch` takes them, loading included."""
    trainer.begin_task(0)
    batches = iter(())

    def run(steps: int) -> None:
        nonlocal batches
        for _ in range(steps):
            batch = next(batches, None)
            if batch is None:
                batches = trainer.stream.batches(0, 0)
                batch = next(batches)
            trainer.count(batch, trainer.train_step(batch))

    return run


def bare_block(trainer: Trainer) -> Callable[[int], None]:
    """Three forwards, one backward, the optimizer's step, on the trainer's own network and batches."""
    network, optimizer = trainer.network, trainer.step.optimizer
    ready = cycle([(batch.inputs, batch.labels) for batch in trainer.stream.batches(0, 0)][:-1])
    teachers = torch.randn(trainer.stream.batch_size, network.classifier.out_features)

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            (inputs, labels), (first, _), (second, others) = next(ready), next(ready), next(ready)
            loss = cross_entropy(network(inputs), labels)
            loss = loss + 0.3 * mse_loss(network(first), teachers)
            loss = loss + 0.5 * cross_entropy(network(second), others)
            loss.backward()
            optimizer.step()

    return run


def cpu_milliseconds(block: Callable[[int], None], steps: int) -> float:
    started = time.process_time()
    block(steps)
    return 1e3 * (time.process_time() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="of the smallest network; larger ones take fewer")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread, CPU ms a step, median of {args.rounds} rounds")
    print(f"{'setting':38} {'bare':>8} {'trainer':>8} {'ratio':>6}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_cifar100(folder)
        for setting, options in SETTINGS.items():
            measure(make_trainer(folder, options, setting), setting, args.steps, args.rounds)


def measure(trainer: Trainer, setting: str, steps: int, rounds: int) -> None:
    """One line of the table."""
    own, bare = trainer_block(trainer), bare_block(trainer)
    own(20)  # fills the buffer
    steps = max(5, min(steps, int(steps * 2 / cpu_milliseconds(bare, 5))))
    pairs = [(cpu_milliseconds(bare, steps), cpu_milliseconds(own, steps)) for _ in range(rounds)]
    ratio = statistics.median(mine / theirs for theirs, mine in pairs)
    theirs, mine = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{setting:38} {theirs:8.2f} {mine:8.2f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
