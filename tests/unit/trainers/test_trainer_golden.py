"""The first 50 losses of a DER++ run, as text.  A change that should not touch the mathematics leaves them alone.

To write them anew after a change that should: `python -m tests.unit.trainers.test_trainer_golden`.
"""

import tempfile
from pathlib import Path

import pytest
import torch

from trainers.buffer import BufferConfig
from trainers.experiment import ExperimentConfig, build_trainer
from trainers.networks import NetworkConfig
from trainers.progress import NoProgress
from trainers.watching import WatchConfig

GOLDEN = Path(__file__).parents[2] / "golden" / "derpp.txt"
STEPS_A_TASK, NUM_TASKS = 25, 2


def losses(folder: Path) -> list[float]:
    """25 steps of the first task, 25 of the second."""
    torch.set_num_threads(1)
    config = ExperimentConfig(
        run_dir=folder,
        method="derpp",
        seed=0,
        network=NetworkConfig(name="mnistmlp"),
        buffer=BufferConfig(size=100, minibatch_size=32),
        watch=WatchConfig(monitor=False),
    )
    trainer = build_trainer(config, NoProgress())
    found = []
    for task in range(NUM_TASKS):
        trainer.begin_task(task)
        for batch, _ in zip(trainer.stream.batches(task, 0), range(STEPS_A_TASK), strict=False):
            found.append(float(trainer.train_step(batch)))
    return found


def test_fifty_losses_are_the_ones_on_file(tmp_path: Path) -> None:
    expected = [float(line) for line in GOLDEN.read_text().splitlines()]

    found = losses(tmp_path / "run")

    # Other processors have other kernels, which round otherwise; a change of the mathematics is far larger.
    assert found == pytest.approx(expected, rel=2e-4)


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        GOLDEN.write_text("".join(f"{loss!r}\n" for loss in losses(Path(scratch) / "run")))
