"""A training of milliseconds whose every bit is known; as a program, one that ends as its argument says.

    python small_training.py RUN_DIR (wait | exit | fork)

prints each step's loss as it is done.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import stabilitykit as sk

NUM_STEPS = 16
CONFIG = sk.MonitorConfig(report=False, compact=False, cadence=1)
State = list[bytes]


class Training:
    """A small network with dropout: losses, weights and random streams say whether anything was disturbed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.losses: list[Tensor] = []

    def attach(self, run_dir: Path, config: sk.MonitorConfig = CONFIG) -> tuple[sk.Monitor, Callable[[Tensor], object]]:
        """A monitor, and the step to call from now on."""
        monitor = sk.attach(self.model, self.optimizer, run_dir, config=config)
        return monitor, monitor.replayable(self.step)

    def step(self, batch: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.model(batch).square().mean()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.detach())
        return self.losses[-1]

    def state(self) -> State:
        tensors = (*self.losses, *self.model.parameters(), torch.get_rng_state())
        return [tensor.numpy(force=True).tobytes() for tensor in tensors]


def batches(num: int = NUM_STEPS) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(8, 4, generator=generator) for _ in range(num))


def bare(num: int = NUM_STEPS) -> State:
    """What the training is when nobody watches."""
    training = Training()
    for batch in batches(num):
        training.step(batch)
    return training.state()


def main(run_dir: Path, mode: str) -> None:
    training = Training()
    monitor, step = training.attach(run_dir)
    for index, batch in enumerate(batches()):
        if index == NUM_STEPS // 2:
            if mode == "fork" and os.fork() == 0:
                sys.exit(3)  # runs what is registered for the end of the program, in the child
            if mode == "exit":
                os._exit(7)
            if mode == "wait":
                print("ready", flush=True)
                time.sleep(60)
        step(batch)
        print(training.losses[-1].numpy().tobytes().hex(), flush=True)
    if mode == "fork":
        os.wait()
    monitor.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
