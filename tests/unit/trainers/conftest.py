from pathlib import Path

import pytest
from trainer_steps import MakeTrainer

from trainers.experiment import ExperimentConfig, build_trainer
from trainers.networks import NetworkConfig
from trainers.progress import NoProgress
from trainers.trainer import Trainer
from trainers.watching import WatchConfig


@pytest.fixture
def make(tmp_path: Path) -> MakeTrainer:
    """Trainers of small, bare runs, each in a folder of its own."""
    made: list[Trainer] = []

    def build(**options: object) -> Trainer:
        defaults: dict[str, object] = {
            "method": "derpp",
            "seed": 3,
            "network": NetworkConfig(pool=4),
            "watch": WatchConfig(monitor=False),
        }
        config = ExperimentConfig(run_dir=tmp_path / f"run-{len(made)}", **(defaults | options))
        made.append(build_trainer(config, NoProgress()))
        return made[-1]

    return build
