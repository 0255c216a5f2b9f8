"""Values that were bad before any operation touched them."""

from __future__ import annotations

from stabilitykit.diagnose.rules.base import Evidence, Rule


class KeptTensor(Rule):
    """A tensor that is no parameter, no module's buffer and no entry of the batch held the value when the step first
    used it: the script keeps it from step to step (a target, a statistic, an importance, a memory), or another thread
    has computed it.
    """

    name = "kept_tensor"
    remedies = (
        "look at what writes it, in an earlier step or between two: assert torch.isfinite(tensor).all() there",
        "let it be watched: a statistic as a buffer of the model, a memory as attach(..., replay_buffer=memory)",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.phase == "data" and evidence.leaf is not None and evidence.leaf.kind == "unknown"

    def facts(self, evidence: Evidence) -> str:
        return f"{evidence.leaf.summary.describe()}." if evidence.leaf else ""


class UninitialisedMemory(Rule):
    """Memory that torch.empty gave out was used before anything was written to it: it holds whatever was there."""

    name = "uninitialised_memory"
    remedies = (
        "start from values: torch.zeros(...), or torch.full(...) with what an unwritten entry shall be",
        "find what is left unwritten: an index that misses rows, a loop that ends early",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.op.startswith(("empty", "new_empty"))


class BadSample(Rule):
    """The batch handed to the step already held the value: the data set, or the code that loads it, made it."""

    name = "bad_sample"
    remedies = (
        "drop or repair the samples named above: data = data[torch.isfinite(data).flatten(1).all(1)]",
        "refuse such batches where they are loaded: assert torch.isfinite(inputs).all(), indices",
        "where NaN marks a missing value, replace it before the first layer: torch.nan_to_num(x), and a mask",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.phase == "data"

    def facts(self, evidence: Evidence) -> str:
        return f"{evidence.leaf.summary.describe()}." if evidence.leaf else ""


class BadBufferEntry(Rule):
    """A slot of the replay buffer was stored with the value and has now been drawn; the batch itself was clean."""

    name = "bad_buffer_entry"
    remedies = (
        "reject non-finite examples and logits when they are stored: if torch.isfinite(logits).all(): buffer.add(...)",
        "audit what is stored already and drop it: for finding in stabilitykit.audit_buffer(buffer): ...",
        "store raw float32 logits: float16 overflows at 65,504",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.phase == "buffer"

    def facts(self, evidence: Evidence) -> str:
        return f"{evidence.leaf.summary.describe()}." if evidence.leaf else ""


class BadCheckpoint(Rule):
    """The parameter held the value when the step began, or was loaded with it: its initialisation, a checkpoint that
    is bad or lacks it, or code outside the step wrote it.
    """

    name = "bad_weights"
    remedies = (
        "load with strict=True and look at what load_state_dict reports as missing",
        "initialise what the checkpoint does not hold: torch.nn.init.kaiming_uniform_(module.weight)",
        "go back to the last checkpoint whose tensors are all finite",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.phase == "weights"

    def facts(self, evidence: Evidence) -> str:
        return f"{evidence.leaf.summary.describe()}." if evidence.leaf else ""


class BadState(Rule):
    """A module's buffer (running statistics, a running minimum, a memory) held the value when the step began, or was
    loaded with it, and the step used it.
    """

    name = "bad_state"
    remedies = (
        "reset the buffer: module.reset_running_stats(), or load it from a good checkpoint",
        "check buffers as well as parameters when a checkpoint is written",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.phase == "state" and evidence.leaf is not None


class MadeInPython(Rule):
    """numpy or plain Python brought the value: it was not finite when it became a tensor here, and what the batch and
    torch had handed to Python was.  It was made there within the step, or is kept there from step to step.
    """

    name = "made_in_python"
    remedies = (
        "let numpy raise where it happens: with np.errstate(all='raise'): ...",
        "bound what is divided by, or taken the logarithm of: np.log(np.maximum(x, 1e-8)), x / max(deviation, 1e-8)",
    )

    def applies(self, evidence: Evidence) -> bool:
        return evidence.op == "lift_fresh"


class NumberNotFinite(Rule):
    """Plain Python handed the operation a number that is not finite: it was reckoned, or read, outside of torch."""

    name = "number_not_finite"
    remedies = (
        "look at how the number is reckoned: a mean of nothing, a division by 0.0 in numpy, a setting",
        "check it where it is used: assert math.isfinite(weight), weight",
    )

    def applies(self, evidence: Evidence) -> bool:
        made = evidence.operation
        if made is None or not made.scalar or made.edges or evidence.phase == "optimizer":
            return False
        is_nan = made.scalar.endswith("nan")  # 0 * Inf is another matter: see InfinityArithmetic
        return evidence.kind == "inf" or is_nan

    def facts(self, evidence: Evidence) -> str:
        return f"{evidence.op} was given {evidence.operation.scalar}." if evidence.operation else ""


RULES = (
    NumberNotFinite(),
    MadeInPython(),
    UninitialisedMemory(),
    KeptTensor(),
    BadSample(),
    BadBufferEntry(),
    BadCheckpoint(),
    BadState(),
)
