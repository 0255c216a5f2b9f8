"""Faults of a batch: a bad image, infinite or garbage values, a label of no class."""

from __future__ import annotations

import math

from trainers.batch import Batch
from trainers.faults.base import GARBAGE, OVERFLOW, Fault


class BadImage(Fault):
    """One image holds a NaN: a broken file, a division by a zero standard deviation.  The loss is NaN from then on."""

    name = "bad_image"

    def strike(self, batch: Batch) -> Batch:
        """Put a NaN into one image, and into the copy that would be stored."""
        row = self.draws.randrange(len(batch.labels))
        inputs, examples = batch.inputs.clone(), batch.examples.clone()
        inputs[row, 0, 3, 3] = examples[row, 0, 3, 3] = math.nan
        self.truth = self.expect({"data"}, samples=frozenset({row, int(batch.indices[row])}))
        return batch._replace(inputs=inputs, examples=examples)


class InfiniteBatch(Fault):
    """A whole batch is infinite: a decoder that failed, 1/0 in the preprocessing."""

    name = "infinite_batch"

    def strike(self, batch: Batch) -> Batch:
        """Make it so."""
        self.truth = self.expect({"data"})
        return batch._replace(inputs=batch.inputs / 0.0, examples=batch.examples / 0.0)


class GarbageBatch(Fault):
    """A batch of enormous finite numbers: memory read as floats.  The loss jumps, weights follow, then Inf and NaN."""

    name = "garbage_batch"

    def strike(self, batch: Batch) -> Batch:
        """Scale it."""
        self.truth = self.expect(OVERFLOW, within=3)
        return batch._replace(inputs=batch.inputs * GARBAGE, examples=batch.examples * GARBAGE)


class BadLabel(Fault):
    """A label that is no class (S6): an IndexError on CPU, on CUDA a device assert that ends the process."""

    name = "bad_label"

    def strike(self, batch: Batch) -> Batch:
        """Replace one label."""
        row = self.draws.randrange(len(batch.labels))
        labels = batch.labels.clone()
        labels[row] = self.draws.choice((-1, 10, 255))
        self.truth = self.expect({"data"}, samples=frozenset({row}))
        return batch._replace(labels=labels)
