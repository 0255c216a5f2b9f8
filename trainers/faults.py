"""Faults with known truth, planted into a run of the trainer: what a campaign throws at the guards.

A fault strikes at a step: it changes the batch the step is about to get, the state the step begins with, or the step's
own arithmetic.  The last kind is told by the batch, so that a step that is run again is struck again.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from trainers.batch import Batch

if TYPE_CHECKING:
    from trainers.trainer import Trainer

# Where numbers that are too large, but finite, may first overflow: none of it is more true than the rest.
OVERFLOW = frozenset({"forward", "backward", "state", "weights", "optimizer", "clip"})
NUM_SLOTS = 6  # of a replay buffer, spoilt together so that one of them is drawn soon
GARBAGE = 1e30
MARGIN = 12  # steps that a run has left after a strike, to notice it and to recover


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What a right diagnosis says; what cannot be said in advance is left open.

    Attributes:
        first: step at which the fault strikes.
        last: last step at which it may first show.
        phases: any of these is right.
        tensor: parameter, module buffer or input it is about, empty where that is open.
        samples: rows of the batch or slots of the buffer, of which at least one must be named, empty where open.
    """

    first: int
    last: int
    phases: frozenset[str]
    tensor: str = ""
    samples: frozenset[int] = frozenset()


class Fault:
    """The base of all: strikes before step `step` of a run, and for `lasts` steps."""

    name: ClassVar[str]
    guard: ClassVar[str] = "checks"  # the guard that is there for it
    lasts: ClassVar[int] = 1
    needs_batch_norm: ClassVar[bool] = False

    def __init__(self, trainer: Trainer, step: int, draws: random.Random) -> None:
        self.trainer, self.step, self.draws = trainer, step, draws
        self.network, self.method = trainer.network, trainer.step.method
        self.optimizer, self.buffer = trainer.step.optimizer, trainer.step.method.buffer
        self.truth = self.expect({"forward"})
        self.now = -1
        self.struck: list[Tensor] = []
        self._batches = trainer.stream.batches

    @classmethod
    def steps(cls, starts: Sequence[int], total: int) -> Sequence[int]:
        """Steps at which it can strike, given the first step of each task."""
        return [step for step in range(6, total - MARGIN) if step not in starts]

    def expect(self, phases: set[str] | frozenset[str], *, within: int = 0, **truth: Any) -> Truth:
        """The truth of a strike that shows within so many steps."""
        return Truth(first=self.step, last=self.step + within, phases=frozenset(phases), **truth)

    def plant(self) -> None:
        """Set it up in a trainer that has not begun."""
        self.trainer.stream.batches = self._deliver  # type: ignore[method-assign]

    def strike(self, batch: Batch) -> Batch:
        """Do it, before the step that gets `batch`; the batch the step gets."""
        return batch

    def is_struck(self, batch: Batch) -> bool:
        """Whether the step of `batch` is one whose arithmetic goes wrong."""
        return any(torch.equal(batch.indices, indices) for indices in self.struck)

    def _deliver(self, session: int, epoch: int, skip: int = 0) -> Iterator[Batch]:
        for batch in self._batches(session, epoch, skip):
            self.now += 1
            if self.step <= self.now < self.step + self.lasts:
                self.struck.append(batch.indices)
                yield self.strike(batch)
            else:
                yield batch


class LossFault(Fault):
    """The base of faults in the loss: they change its terms in the steps they strike."""

    def plant(self) -> None:
        """Come between the method and its terms."""
        super().plant()
        original = self.method.losses

        def losses(batch: Batch, logits: Tensor, draws: Any) -> dict[str, Tensor]:
            terms = original(batch, logits, draws)
            return self.spoil(terms, logits) if self.is_struck(batch) else terms

        self.method.losses = losses  # type: ignore[method-assign]

    def spoil(self, terms: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """The terms as they come out wrong."""
        raise NotImplementedError


# Data.


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


# Weights and optimizer.


class NanWeight(Fault):
    """One weight is NaN: a bad checkpoint, a broken memory cell.  Every later batch has a NaN loss (S7)."""

    name = "nan_weight"

    def strike(self, batch: Batch) -> Batch:
        """Spoil one number of one parameter."""
        name, weight = self.draws.choice(list(self.network.named_parameters()))
        with torch.no_grad():
            weight.view(-1)[self.draws.randrange(weight.numel())] = math.nan
        self.truth = self.expect({"weights"}, tensor=name)
        return batch


class BitFlip(Fault):
    """The top exponent bit of a weight flips: 0.05 becomes 1.7e37.  A layer's output overflows, here or further on."""

    name = "bit_flip"

    def strike(self, batch: Batch) -> Batch:
        """Flip it in a weight that matters: one whose last gradient was among the largest."""
        weight = self.draws.choice([entry for entry in self.network.parameters() if entry.dim() > 1])
        small = (weight.abs() > 1e-3) & (weight.abs() < 0.9)
        gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
        slot = int((gradient.abs() * small).view(-1).argmax())
        with torch.no_grad():
            bits = weight.detach().view(torch.int32).view(-1)
            bits[slot] ^= 1 << 30
        self.truth = self.expect(OVERFLOW, within=3)
        return batch


class MomentumNan(Fault):
    """A NaN stays in the optimizer's momentum (S9): weights that were repaired are NaN again a step later."""

    name = "momentum_nan"

    def strike(self, batch: Batch) -> Batch:
        """Spoil the momentum of one parameter."""
        names = {id(entry): name for name, entry in self.network.named_parameters()}
        moving = [entry for entry, state in self.optimizer.state.items() if state.get("momentum_buffer") is not None]
        weight = self.draws.choice(moving)
        self.optimizer.state[weight]["momentum_buffer"].view(-1)[0] = math.nan
        self.truth = self.expect({"optimizer", "weights"}, within=1, tensor=names[id(weight)])
        return batch


class InfiniteRate(Fault):
    """The learning rate is infinite: a warm-up that divides by zero.  Every weight is Inf or NaN after the update."""

    name = "infinite_rate"
    guard = "lr"
    rate: ClassVar[float] = math.inf
    within: ClassVar[int] = 0

    def strike(self, batch: Batch) -> Batch:
        """Write it into the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.truth = self.expect({"optimizer"} if math.isinf(self.rate) else OVERFLOW, within=self.within)
        return batch


class ExplodingRate(InfiniteRate):
    """The learning rate is a thousand times too large from one step on: the loss overshoots, further each step."""

    name = "exploding_rate"
    rate = 1e3
    within = 40


class LostRate(InfiniteRate):
    """At a task boundary the optimizer is rebuilt with another learning rate (S14): no NaN, a worse network."""

    name = "lost_rate"
    rate = 5.0
    within = 40

    @classmethod
    def steps(cls, starts: Sequence[int], total: int) -> Sequence[int]:
        """The first step of any task but the first."""
        return [start for start in starts if 0 < start < total]


# The replay buffer.


class BufferFault(Fault):
    """The base of faults in stored samples: they show when one of the slots is drawn."""

    guard = "buffer"
    field: ClassVar[str] = "logits"
    value: ClassVar[float] = math.nan
    phases: ClassVar[frozenset[str]] = frozenset({"buffer"})

    def strike(self, batch: Batch) -> Batch:
        """Spoil some slots."""
        slots = self.draws.sample(range(len(self.buffer)), min(NUM_SLOTS, len(self.buffer)))
        stored = self.buffer.storage[self.field]
        for slot in slots:
            stored[slot].view(-1)[:3] = self.value
        known = frozenset(slots) if self.phases == {"buffer"} else frozenset()
        self.truth = self.expect(self.phases, within=10**6, samples=known)
        return batch


class BufferExample(BufferFault):
    """A stored image holds NaN.  Nothing happens until it is drawn; then the loss is NaN."""

    name = "buffer_example_nan"
    field = "examples"


class BufferLogits(BufferFault):
    """Stored logits hold NaN: the teacher of the distillation is none."""

    name = "buffer_logits_nan"


class BufferOverflow(BufferFault):
    """Logits stored as float16 have become Inf (O11), and with them the distillation term."""

    name = "buffer_logits_inf"
    value = math.inf


class BufferGarbage(BufferFault):
    """Stored logits are enormous but finite: their squared distance overflows, every time one of them is drawn."""

    name = "buffer_logits_garbage"
    value = GARBAGE
    phases = OVERFLOW | {"buffer"}


class BufferLabel(BufferFault):
    """A stored label is no class: an IndexError when it is drawn."""

    name = "buffer_label"
    field = "labels"
    value = 99


class NanSampling(Fault):
    """Sampling weights are NaN, from a softmax written as exp over sum (O10): torch.multinomial raises."""

    name = "nan_sampling_weights"
    guard = "buffer"

    def plant(self) -> None:
        """Come between the scores and the draw."""
        super().plant()
        original: Callable[[Batch], Tensor | None] = self.method.probabilities  # type: ignore[attr-defined]

        def probabilities(batch: Batch) -> Tensor | None:
            found = original(batch)
            return torch.full((len(self.buffer),), math.nan) if self.is_struck(batch) else found

        self.method.probabilities = probabilities  # type: ignore[attr-defined]
        self.truth = self.expect({"buffer", "forward"})


# The step's own arithmetic.


class SqrtAtZero(LossFault):
    """A norm of something that is zero: the loss is finite, the derivative of sqrt at 0 is not (O5)."""

    name = "sqrt_at_zero"

    def spoil(self, terms: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """Add it."""
        self.truth = self.expect({"backward"})
        return terms | {"norm": (logits * 0).square().sum().sqrt()}


class LogOfZero(LossFault):
    """An entropy written as p log p of a probability that is 0: -Inf, then NaN."""

    name = "log_of_zero"

    def spoil(self, terms: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """Add it."""
        share = torch.relu(logits * 0)
        return terms | {"entropy": (share * share.log()).sum()}


class ZeroOverZero(LossFault):
    """A mean over a mask that happens to be empty, 0/0: the loss is NaN, and every gradient with it."""

    name = "zero_over_zero"

    def spoil(self, terms: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """Add it."""
        mask = (logits > 1e6).float()
        return terms | {"masked": (logits * mask).sum() / mask.sum()}


class InfiniteGradient(LossFault):
    """Gradients are infinite although loss and activations are fine: a derivative that overflows."""

    name = "infinite_gradient"
    factor: ClassVar[float] = math.inf
    phases: ClassVar[frozenset[str]] = frozenset({"backward"})
    within: ClassVar[int] = 0

    def spoil(self, terms: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """Scale the gradient on its way through the logits."""
        self.truth = self.expect(self.phases, within=self.within)
        logits.register_hook(lambda gradient: gradient * self.factor)  # type: ignore[no-untyped-call]
        return terms


class NormOverflow(InfiniteGradient):
    """Finite gradients of 1e25, whose float32 norm is Inf (S11): clipping makes zeros of them, or the weights jump."""

    name = "gradient_norm_overflow"
    factor = 1e27
    phases = OVERFLOW
    within = 3


class ExplodingReplay(LossFault):
    """The replay terms weigh a million times too much for three steps: training overshoots, the teachers with it."""

    name = "exploding_replay"
    lasts = 3

    def spoil(self, terms: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """Scale them."""
        self.truth = self.expect(OVERFLOW, within=10)
        return {name: term if name == "ce" else 1e6 * term for name, term in terms.items()}


class DisconnectedLoss(LossFault):
    """The loss is a constant that asks for gradients (O6): the curve shows 1.0 and nothing is trained.  Silent."""

    name = "disconnected_loss"
    lasts = 4

    def spoil(self, terms: dict[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        """Put the constant there."""
        self.truth = self.expect({"backward"})
        return {"ce": torch.tensor(1.0, requires_grad=True)}


class SaturatingClamp(Fault):
    """Logits are clamped to +-10 in the loss path (S4), and all of them lie beyond: every gradient is 0.  Silent."""

    name = "saturating_clamp"

    def strike(self, batch: Batch) -> Batch:
        """Move the logits and clamp them, for good."""
        with torch.no_grad():
            self.network.classifier.bias.sub_(50)
        self.network.register_forward_hook(lambda *call: call[-1].clamp(-10, 10))
        self.truth = self.expect({"backward"})
        return batch


class UnscaledHalf(Fault):
    """float16 with a loss scale of one's own that nobody checks (S24): scaled gradients overflow, weights are NaN."""

    name = "unscaled_half"
    guard = "precision"
    scale: ClassVar[float] = 2.0**12

    def plant(self) -> None:
        """Scale by hand where no scaler does."""
        super().plant()
        self.truth = self.expect({"backward"}, within=2)
        precision = self.trainer.step.precision
        if precision.scaler.is_enabled():
            return

        def unscale(_optimizer: torch.optim.Optimizer) -> None:
            gradients = [entry.grad for entry in self.network.parameters() if entry.grad is not None]
            torch._foreach_div_(gradients, self.scale)

        def backward(loss: Tensor) -> None:
            torch.autograd.backward(loss * self.scale)

        vars(precision).update(stream=precision.replay, backward=backward, unscale=unscale)
        original = self.method.forward

        def forward(batch: Batch, draws: Any) -> Tensor:
            logits = original(batch, draws)
            if self.is_struck(batch) and logits.requires_grad:
                logits.register_hook(_overflow)  # type: ignore[no-untyped-call]
            return logits

        self.method.forward = forward  # type: ignore[method-assign]

    def strike(self, batch: Batch) -> Batch:
        """A scaler's scale has grown too far; without one the batch is one whose gradients are too large."""
        scaler = self.trainer.step.precision.scaler
        if scaler.is_enabled():
            scaler.load_state_dict(scaler.state_dict() | {"scale": 2.0**26})
        return batch


# BatchNorm and computations on the side.


class BatchNormPoison(Fault):
    """Running statistics are NaN (S8): the training loss stays finite, evaluation is at chance."""

    name = "batch_norm_poison"
    needs_batch_norm = True

    def strike(self, batch: Batch) -> Batch:
        """Spoil one layer's variance."""
        name, norm = self.draws.choice(_batch_norms(self.network))
        norm.running_var[0] = math.nan
        self.truth = self.expect({"state"}, tensor=f"{name}.running_var")
        return batch


class ThawedBatchNorm(Fault):
    """Frozen BatchNorm is put back to training and its statistics are reset (S1, S15): evaluation drifts.  Silent."""

    name = "thawed_batch_norm"
    guard = "freeze_bn"
    needs_batch_norm = True

    @classmethod
    def steps(cls, starts: Sequence[int], total: int) -> Sequence[int]:
        """After the first task, when there is something to thaw."""
        return [step for step in super().steps(starts, total) if step > starts[1]]

    def strike(self, batch: Batch) -> Batch:
        """What a library call that reconfigures layers does."""
        for _, norm in _batch_norms(self.network):
            norm.__class__ = nn.BatchNorm2d
            norm.train()
            norm.reset_running_stats()
        self.truth = self.expect({"state"})
        return batch


class LeakingHook(Fault):
    """A causal score runs in train mode, draws random numbers and leaves gradients behind (O8, O9, O25).  Silent."""

    name = "leaking_hook"
    guard = "isolation"

    def plant(self) -> None:
        """Come between the scoring and its inputs."""
        super().plant()
        self.truth = self.expect(OVERFLOW | {"buffer"}, within=30)
        original: Callable[[Any], Tensor] = self.method.inputs  # type: ignore[attr-defined]

        def inputs(slots: Any) -> Tensor:
            found = original(slots)
            if self.now >= self.step:
                self.leak(found)
            return found

        self.method.inputs = inputs  # type: ignore[attr-defined]

    def leak(self, images: Tensor) -> None:
        """Look at noisy copies of some images, carelessly."""
        self.network.train()
        with torch.enable_grad():
            noisy = images[:8] + 20 * torch.rand_like(images[:8])
            self.network(noisy).square().mean().backward()


def _overflow(gradient: Tensor) -> Tensor:
    return (gradient.half() * 2.0**16).to(gradient.dtype)


def _batch_norms(network: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)]


FAULTS: Mapping[str, type[Fault]] = {
    kind.name: kind
    for kind in (
        BadImage,
        InfiniteBatch,
        GarbageBatch,
        BadLabel,
        NanWeight,
        BitFlip,
        MomentumNan,
        InfiniteRate,
        ExplodingRate,
        LostRate,
        BufferExample,
        BufferLogits,
        BufferOverflow,
        BufferGarbage,
        BufferLabel,
        NanSampling,
        SqrtAtZero,
        LogOfZero,
        ZeroOverZero,
        InfiniteGradient,
        NormOverflow,
        ExplodingReplay,
        DisconnectedLoss,
        SaturatingClamp,
        UnscaledHalf,
        BatchNormPoison,
        ThawedBatchNorm,
        LeakingHook,
    )
}
