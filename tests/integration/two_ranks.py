"""One of two ranks that train one model: `python two_ranks.py RANK FOLDER` prints what came of it as JSON."""

import json
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import stabilitykit as sk

NUM_STEPS, BAD_STEP = 12, 7
PATIENCE = timedelta(seconds=8)


def train(rank: int, watch: Callable[[nn.Module, torch.optim.Optimizer], sk.Monitor] | None) -> nn.Module:
    """A model after all steps; at the bad one, rank 1's batch overflows a variance, its loss stays finite."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the option's next name is yet to be made
        model = DistributedDataParallel(network, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    monitor = watch(model, optimizer) if watch is not None else None
    train_step = step if monitor is None else monitor.replayable(step)
    torch.manual_seed(rank)
    for index in range(NUM_STEPS):
        batch = torch.randn(4, 8)
        if index == BAD_STEP and rank == 1:
            batch = batch * 1e25
        train_step(batch)
    if monitor is not None:
        monitor.close()
    return model


def main() -> None:
    """Train without a monitor, then with one."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=PATIENCE, init_method=f"file://{folder}/store")
    config = sk.MonitorConfig(report=False, compact=False)
    monitors = []

    def watch(model: nn.Module, optimizer: torch.optim.Optimizer) -> sk.Monitor:
        run_dir = folder / f"rank-{rank}"
        monitors.append(sk.attach(model, optimizer, run_dir, config=config, on_nonfinite="record"))
        return monitors[0]

    bare = train(rank, None)
    watched = train(rank, watch)
    found = monitors[0].diagnosis
    same = all(
        torch.equal(one.nan_to_num(), other.nan_to_num())
        for one, other in zip(bare.state_dict().values(), watched.state_dict().values(), strict=True)
    )
    origin = None if found is None else [found.origin.step, found.origin.proof]
    print(json.dumps({"steps": monitors[0].step_index, "as_bare": same, "origin": origin}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
