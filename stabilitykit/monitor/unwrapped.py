"""What the hooks saw of a step that cannot be replayed, as the diagnosis by hooks wants it."""

from __future__ import annotations

from stabilitykit.diagnose.hooks import Passed, Symptoms
from stabilitykit.watch.sentinel import Reading
from stabilitykit.watch.watch import Watch

Stored = tuple[str, tuple[int, ...]]


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
