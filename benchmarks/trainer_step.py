"""What a DER++ step of `trainers` costs beside the three forwards and backwards it needs, and what guards add to it.

    python -m benchmarks.trainer_step [--steps 200] [--rounds 5]

A bare loop does nothing but three forwards, three losses, one backward and the optimizer's step, on tensors that lie
ready, other ones for each forward.  DER++ at its least loads, augments, draws twice and stores as well, written by hand
for this one method, and checks nothing.  The trainer's own step, by default with guards 4 and 6, does the same and also
loads, augments, draws, checks and stores.  Then the same step under `--guards none`, under the five guards that never
write to a healthy step (with rollback, so that snapshots are part of it), and under all eight, in the first task.
All run in turn, in blocks, on one thread; CPU time of this process, medians over the rounds.
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

from trainers import flags
from trainers.cli import configure
from trainers.experiment import build_trainer
from trainers.progress import NoProgress
from trainers.trainer import Trainer

SETTINGS = {
    "mnistmlp, 1x28x28, batch 64": ("--backbone", "mnistmlp", "--batch_size", "64"),
    "resnet8, 3x16x16, batch 32": ("--dataset", "seq-cifar100", "--backbone", "resnet8", "--pool", "2"),
    "reduced-resnet18, 3x32x32, batch 32": ("--dataset", "seq-cifar100", "--backbone", "reduced-resnet18"),
}
GUARDED = {  # each beside the one it is compared with
    "least": ("bare", ()),
    "trainer": ("bare", ()),
    "none": ("", ("--guards", "none")),
    "five": ("none", ("--guards", "precision,freeze_bn,buffer,isolation,checks")),
    "all eight": ("none", ("--guards", "all")),
}
Block = Callable[[int], None]


def random_cifar100(folder: Path) -> None:
    """Images of the right shape: what they show does not change what a step costs."""
    images = np.random.default_rng(0).integers(0, 256, (20_000, 32, 32, 3), np.uint8)
    labels = np.arange(20_000) % 100
    arrays = {"train_images": images, "train_labels": labels, "test_images": images[:1000]}
    np.savez(folder / "cifar100.npz", **arrays, test_labels=labels[:1000])


def make_trainer(folder: Path, *options: str) -> Trainer:
    run_dir = tempfile.mkdtemp(dir=folder)
    fixed = ("--model", "derpp", "--buffer_size", "500", "--monitor", "0", "--checkpoint_every", "0")
    places = ("--base_path", str(folder), "--run_dir", f"{run_dir}/run")
    return build_trainer(configure(flags.parse([*fixed, *places, *options]), ()), NoProgress())


def trainer_block(trainer: Trainer) -> Block:
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


def bare_block(trainer: Trainer) -> Block:
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


def least_block(trainer: Trainer) -> Block:
    """DER++ as few calls as it takes: a reservoir of three columns, two draws, no checks, nothing noted."""
    network, optimizer, stream = trainer.network, trainer.step.optimizer, trainer.stream
    transform, buffer = trainer.step.method.transform, trainer.step.method.buffer
    columns = [buffer.storage[name] for name in ("examples", "labels", "logits")]
    size, seen = buffer.capacity, buffer.n_seen
    batches = iter(())

    def draw(count: int) -> list[torch.Tensor]:
        slots = torch.randperm(size)[:count]
        examples, labels, logits = (column.index_select(0, slots) for column in columns)
        return [transform(examples), labels, logits]

    def store(values: list[torch.Tensor]) -> None:
        nonlocal seen
        places = [int(chance * (seen + row + 1)) for row, chance in enumerate(torch.rand(len(values[0])).tolist())]
        taken = {place: row for row, place in enumerate(places) if place < size}
        seen += len(places)
        if taken:
            slots, rows = torch.tensor(list(taken)), torch.tensor(list(taken.values()))
            for column, value in zip(columns, values, strict=True):
                column.index_copy_(0, slots, value.index_select(0, rows))

    def run(steps: int) -> None:
        nonlocal batches
        for _ in range(steps):
            batch = next(batches, None)
            if batch is None:
                batches = stream.batches(0, 0)
                batch = next(batches)
            optimizer.zero_grad()
            logits = network(batch.inputs)
            loss = cross_entropy(logits, batch.labels)
            examples, _, teachers = draw(stream.batch_size)
            loss = loss + 0.3 * mse_loss(network(examples), teachers)
            examples, labels, _ = draw(stream.batch_size)
            loss = loss + 0.5 * cross_entropy(network(examples), labels)
            loss.backward()
            optimizer.step()
            store([batch.examples, batch.labels, logits.detach()])

    return run


def cpu_milliseconds(block: Block, steps: int) -> float:
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
    print(f"{'setting':36} {'bare':>7}" + "".join(f"{name:>10}{'ratio':>6}" for name in GUARDED))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_cifar100(folder)
        for setting, options in SETTINGS.items():
            trainers = {name: make_trainer(folder, *options, *guards) for name, (_, guards) in GUARDED.items()}
            print(f"{setting:36} " + measure(trainers, args.steps, args.rounds), flush=True)


def measure(trainers: dict[str, Trainer], steps: int, rounds: int) -> str:
    """One line of the table."""
    blocks = {name: trainer_block(trainer) for name, trainer in trainers.items()}
    for block in blocks.values():
        block(20)  # fills the buffer
    blocks["bare"], blocks["least"] = bare_block(trainers["trainer"]), least_block(trainers["least"])
    steps = max(3, min(steps, int(steps * 2 / cpu_milliseconds(blocks["bare"], 5))))
    found = [{name: cpu_milliseconds(block, steps) for name, block in blocks.items()} for _ in range(rounds)]
    cells = [f"{statistics.median(times['bare'] for times in found):7.2f}"]
    for name, (beside, _) in GUARDED.items():
        cells.append(f"{statistics.median(times[name] for times in found):10.2f}")
        cells.append(f"{statistics.median(times[name] / times[beside] for times in found):6.2f}" if beside else " " * 6)
    return "".join(cells)


if __name__ == "__main__":
    main()
