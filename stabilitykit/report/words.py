"""A diagnosis's short words as sentences: how strong a proof is, what a phase covers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stabilitykit.schema import Phase, Proof

PROOF_WORDS: dict[Proof, str] = {
    "replayed": (
        "The step was put back and run once more, bit for bit the same, with every operation traced. The origin is the "
        "first operation on the way to the symptom whose inputs were all finite."
    ),
    "replayed-differs": (
        "The step was put back and run once more with every operation traced; it went wrong again, but not bit for bit "
        "as at first (something outside PyTorch differed), so another origin is possible, though unlikely."
    ),
    "hooks": (
        "The step was not run again. The origin is the first module, in execution order, whose inputs were finite and "
        "whose output was not; which operation inside it is to blame is not known."
    ),
    "record": (
        "The origin is read from recorded statistics alone: the first tensor that was not finite. What came between "
        "two recordings is not known."
    ),
}
PHASE_WORDS: dict[Phase, str] = {
    "data": "data: the batch, or a tensor kept outside the step, already held it",
    "buffer": "buffer: the replay buffer already held it",
    "weights": "weights: a parameter held it when the step began",
    "forward": "forward",
    "backward": "backward",
    "clip": "gradient clipping",
    "optimizer": "optimizer step",
    "state": "state: a module buffer, such as a running variance",
}


def source_of(file: str, line: int | None) -> str:
    """`file:line`, as much of it as is known."""
    return f"{file}:{line}" if file and line is not None else file
