"""What can be said of a step that was not replayed, or whose replay does not show what the first run had shown."""

from __future__ import annotations

from dataclasses import replace

from torch import distributed, nn
from torch.nn.modules.batchnorm import _NormBase

from stabilitykit.diagnose.hooks import Passed, Symptoms
from stabilitykit.diagnose.storages import has_nan
from stabilitykit.errors import UsageError
from stabilitykit.schema import Diagnosis
from stabilitykit.watch.reading import Reading
from stabilitykit.watch.watch import Watch

Stored = tuple[str, tuple[int, ...]]
ONLY_COMPILED = (
    "The step was replayed eagerly and stayed finite: the value exists only in the compiled module. Compile with "
    "another backend to see whose it is, torch.compile(model, backend='aot_eager'), and report it with the batch."
)
ALONE = "run the step in a single process, with this rank's batch, to be told the operation and the source line"


def symptoms(watch: Watch, reading: Reading, stored: Stored = ("", ())) -> Symptoms:
    """The trail of the step that has just run and the sentinel's reading, in one."""
    inputs, outputs, gradients = ([Passed(*entry) for entry in trail] for trail in watch.trail())
    return Symptoms(
        inputs=inputs,
        outputs=outputs,
        output_gradients=gradients,
        before=watch.bad_before,
        stored=stored,
        losses=reading.bad_losses,
        gradients=reading.bad_gradients,
        clipped=reading.bad_clipped,
        parameters=reading.bad_parameters,
        buffers=reading.bad_buffers,
    )


def is_doubtful(reading: Reading, model: nn.Module, watch: Watch) -> bool:
    """Whether a step that cannot be replayed is to be told of.

    An Inf that only a module's buffer holds may be kept there on purpose, a mask or masked logits: it is let pass, and
    shows again where it does harm. A NaN, or a layer's running statistics, never are.
    """
    if not reading.bad_buffers or replace(reading, bad_buffers=()).suspicious:
        return reading.suspicious
    modules = dict(model.named_modules(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name in reading.bad_buffers:
        if isinstance(modules.get(name.rpartition(".")[0]), _NormBase) or name not in buffers or has_nan(buffers[name]):
            return True
    watch.acquit(reading, None)
    return False


def spans_processes() -> bool:
    """Whether this process is one of several in a collective: run again alone, its step would meet the others' next."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def refuse_to_act_alone(policy: str) -> None:
    """Refuse what takes this process's weights another way than the others'.

    Raises:
        UsageError: the policy undoes steps, and there are other processes.
    """
    if policy in ("skip", "rollback") and spans_processes():
        raise UsageError(
            f"attach: got on_nonfinite={policy!r} in one of {distributed.get_world_size()} processes, expected raise "
            "or record; a rank that undid a step alone would go apart from the others"
        )


def of_one_rank(diagnosis: Diagnosis) -> Diagnosis:
    """The same, with what would let the step be run again instead of the advice to wrap it."""
    return replace(diagnosis, remedies=(ALONE,))


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it runs through torch.compile."""
    return any(hasattr(entry, "_orig_mod") or entry._compiled_call_impl is not None for entry in model.modules())


def only_compiled(diagnosis: Diagnosis) -> Diagnosis:
    """The same, with the cause that the eager replay's silence points to."""
    return replace(diagnosis, rule="only_compiled", cause=f"{ONLY_COMPILED} {diagnosis.cause}")


def not_repeated(diagnosis: Diagnosis, failure: Exception | None, *, held: bool) -> Diagnosis:
    """The same, with what would let the step be run again instead of the advice to wrap it.

    Args:
        diagnosis: by hooks.
        failure: what kept it from being run again.
        held: the state was, so that it could be tried.
    """
    if failure is not None and not held:
        advice = f"the step was not run again: its state could not be copied ({type(failure).__name__}: {failure})"
        return replace(diagnosis, remedies=(advice,))
    went = f"raised {type(failure).__name__}: {failure}" if failure is not None else "went otherwise"
    advice = f"run again, the step {went}; name in attach(..., stateful=[...]) whatever else it changes and depends on"
    return replace(diagnosis, remedies=(advice,))
