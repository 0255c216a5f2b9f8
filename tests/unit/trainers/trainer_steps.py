"""What trainer tests do with a trainer: build one, let it take steps."""

from collections.abc import Callable

from trainers.trainer import Trainer

MakeTrainer = Callable[..., Trainer]


def take_steps(trainer: Trainer, count: int, task: int = 0) -> list[float | None]:
    """So many steps of a task, which begins; their losses."""
    trainer.begin_task(task)
    losses: list[float | None] = []
    for batch, _ in zip(trainer.stream.batches(task, 0), range(count), strict=False):
        loss = trainer.train_step(batch)
        trainer.count(batch, loss)
        losses.append(None if loss is None else float(loss))
    return losses
