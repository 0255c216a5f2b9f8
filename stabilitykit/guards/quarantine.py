"""Offending batches on disk, as safetensors: what a guard set aside can be looked at afterwards.  No pickle."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from stabilitykit.containers import tensors_of

MAX_BATCHES = 100  # of a run: a loader that is broken for good must not fill the disk


def set_aside(run_dir: Path, step: int, batch: object, sample_ids: Sequence[int]) -> str:
    """Write the tensors of a batch to `quarantine/step-<step>.safetensors`; the path below `run_dir`, "" if it failed.

    Args:
        run_dir: the run folder.
        step: number of the step.
        batch: tensors in any nesting; names of the file's entries are their paths.
        sample_ids: rows of the data set, kept in the file's metadata as JSON.
    """
    path = run_dir / "quarantine" / f"step-{step:06d}.safetensors"
    tensors = {
        f"{index}{name}": tensor.detach().cpu().clone().contiguous()
        for index, (name, tensor) in enumerate(tensors_of(batch))
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not tensors or len(list(path.parent.iterdir())) >= MAX_BATCHES:
            return ""
        save_file(tensors, path, metadata={"step": str(step), "sample_ids": json.dumps(list(sample_ids))})
    except OSError:
        return ""  # a full disk must not end a run that has just been saved
    return str(path.relative_to(run_dir))
