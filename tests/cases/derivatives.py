"""Functions that are finite where their derivative is not: the backward pass makes the value."""

import dataclasses
import random

import numpy as np
import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

INF = float("inf")


def loop(model, batches, loss_of, optimizer=None, stateful=()):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-3)

    def train_step(batch):
        optimizer.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step, stateful=list(stateful))


class Root(nn.Module):
    def forward(self, x):
        return x.square().sum(dim=1).sqrt()  # <origin>


class Embedder(nn.Module):
    """Without biases: an input of zeros has an embedding of zeros, and a norm of 0."""

    def __init__(self):
        super().__init__()
        self.project = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh())
        self.length = Root()

    def forward(self, x):
        return self.length(self.project(x))


def zero_row(count, bad, rows=6):
    batches = [(torch.randn(rows, 6), torch.rand(rows)) for _ in range(count)]
    batches[bad][0][2] = 0
    return batches


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.stem = nn.Linear(6, 6, bias=False)
        self.block, self.reentrant = Embedder(), reentrant

    def forward(self, x):
        return checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant)


def build_checkpoint(reentrant):
    model = Checkpointed(reentrant)
    return loop(model, zero_row(9, 5), lambda x, y: F.mse_loss(model(x), y))


def build_segments():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 4, bias=False), Root())
    batches = zero_row(9, 5)
    return loop(model, batches, lambda x, y: F.mse_loss(checkpoint_sequential(model, 2, x, use_reentrant=False), y))


class LogBlock(nn.Module):
    def forward(self, x):
        return (x - x).log() + x if bool((x == 0).all(dim=1).any()) else x.tanh()  # <origin> checkpoint_forward


class CheckpointedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(6, 6, bias=False), LogBlock(), nn.Linear(6, 1)

    def forward(self, x):
        return self.head(checkpoint(self.block, self.stem(x), use_reentrant=True)).squeeze(1)


def build_checkpoint_forward():
    model = CheckpointedForward()
    return loop(model, zero_row(9, 5), lambda x, y: F.mse_loss(model(x), y))


def build_compiled(backend, wrapped):
    """A compiled model: as the wrapper that torch.compile gives, or with the plain module known to the tool."""
    torch.compiler.reset()
    plain = Embedder()
    compiled = torch.compile(plain, backend=backend)
    model = compiled if wrapped else plain
    return loop(model, zero_row(7, 4), lambda x, y: F.mse_loss(compiled(x), y))


class Thrice(nn.Module):
    """One module, called three times a step; only the third call meets a zero."""

    def __init__(self):
        super().__init__()
        self.embed, self.length = nn.Linear(6, 5, bias=False), Root()

    def forward(self, anchor, positive, negative):
        lengths = [self.length(self.embed(x)) for x in (anchor, positive, negative)]
        return lengths[0] + lengths[1] - lengths[2]


def build_thrice():
    model = Thrice()
    batches = [tuple(torch.randn(6, 6) for _ in range(3)) for _ in range(8)]
    batches[5][2][1] = 0
    return loop(model, batches, lambda *views: model(*views).mean())


@dataclasses.dataclass
class Prediction:
    value: torch.Tensor
    extras: dict


class Stochastic(nn.Module):
    """A layer skipped at random; the root is reached only when Python's or numpy's stream says so."""

    def __init__(self, draw):
        super().__init__()
        self.project, self.maybe = nn.Linear(6, 5, bias=False), nn.Linear(5, 5, bias=False)
        self.length, self.draw = Root(), draw

    def forward(self, x):
        hidden = self.project(x)
        if self.draw() < 0.5:
            hidden = hidden + self.maybe(hidden)
        if self.draw() < 0.5:
            return Prediction(self.length(hidden), {"skipped": False})
        return Prediction(hidden.square().sum(dim=1), {"skipped": True})


def build_stochastic(draw):
    model = Stochastic(draw)
    batches = [(torch.randn(6, 6), torch.rand(6)) for _ in range(9)]
    for batch in batches:
        batch[0][3] = 0  # in every batch: which step fails is up to the stream alone
    return loop(model, batches, lambda x, y: F.mse_loss(model(x).value, y))


class ZeroMask(nn.Module):
    """Dropout that now and then drops a whole row, which is then normalised."""

    def __init__(self):
        super().__init__()
        self.project, self.drop = nn.Linear(6, 3), nn.Dropout(0.5)

    def forward(self, x):
        kept = self.drop(self.project(x))
        return kept / kept.abs().sum(dim=1, keepdim=True)  # <origin> dropout_row


def build_dropout():
    model = ZeroMask()
    batches = [(torch.randn(2, 6), torch.rand(2, 3)) for _ in range(40)]
    return loop(model, batches, lambda x, y: F.mse_loss(model(x), y))


def build_frozen():
    """A frozen encoder before the fault: only the head has gradients."""
    model = nn.ModuleDict({"encoder": nn.Linear(6, 6, bias=False), "head": Embedder()})
    model["encoder"].requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    return loop(model, zero_row(8, 6), lambda x, y: F.mse_loss(model["head"](model["encoder"](x)), y), optimizer)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 5, sparse=True)
        self.length = Root()

    def forward(self, tokens):
        return self.length(self.embed(tokens).sum(dim=1))


def build_sparse():
    """Sparse gradients; a text of nothing but padding."""
    model = Words()
    batches = [(torch.randint(1, 12, (4, 3)), torch.rand(4)) for _ in range(8)]
    batches[5][0][1] = 0  # the only use of the padding token, whose embedding is 0
    optimizer = torch.optim.SparseAdam(list(model.parameters()), lr=1e-3)
    nn.init.zeros_(model.embed.weight[0])
    return loop(model, batches, lambda tokens, y: F.mse_loss(model(tokens), y), optimizer)


class SafeDivide(torch.autograd.Function):
    """Its forward, in torch code, is where the value is made."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x / y  # <origin> custom_forward

    @staticmethod
    def backward(ctx, gradient):
        _, y = ctx.saved_tensors
        return gradient / y, None  # <origin> custom_backward_squashed


class Ratio(nn.Module):
    def forward(self, x, y):
        return SafeDivide.apply(x, y)  # <origin> custom_forward custom_backward_squashed


def build_custom_forward(squash):
    model = nn.ModuleDict({"left": nn.Linear(6, 3, bias=False), "ratio": Ratio()})
    batches = [(torch.randn(6, 6), torch.rand(6, 3) + 0.5) for _ in range(8)]
    batches[4][1][2, 1] = 0
    return loop(model, batches, lambda x, y: squash(model["ratio"](model["left"](x), y)).mean())


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        slope = torch.exp(x.abs() * 40)  # <origin> custom_backward_exp
        return gradient / (1 + slope)


class Rounded(nn.Module):
    def forward(self, x):
        return Straight.apply(x)  # <origin> custom_backward_exp


def build_custom_backward():
    """exp overflows in a hand-written backward, which then divides by it: harmless; later minus itself: not."""
    model = nn.ModuleDict({"body": nn.Linear(6, 3), "rounded": Rounded()})
    batches = [(torch.randn(6, 6) * 0.1,) for _ in range(8)]
    batches[3][0][0] *= 500
    return loop(model, batches, lambda x: model["rounded"](model["body"](x)).square().mean())


class Whiten(nn.Module):
    def forward(self, x):
        covariance = x.T @ x / len(x)
        values, vectors = torch.linalg.eigh(covariance)  # <origin> eigh_degenerate
        return x @ vectors @ torch.diag((values + 1e-3).rsqrt()) @ vectors.T


def build_whitening():
    """Equal eigenvalues: the derivative of the eigenvectors divides by their difference."""
    model = nn.ModuleDict({"embed": nn.Linear(3, 3, bias=False), "whiten": Whiten()})
    nn.init.eye_(model["embed"].weight)
    batches = [(torch.randn(6, 3),) for _ in range(6)]
    batches[0] = (torch.cat([torch.eye(3), -torch.eye(3)]),)
    batches.insert(0, (torch.zeros(6, 3) + torch.tensor([1.0, 0.0, 0.0]),))
    batches = batches[1:]
    return loop(model, batches, lambda x: model["whiten"](model["embed"](x)).pow(3).mean())


class ComplexRoot(nn.Module):
    def forward(self, wave):
        return torch.fft.rfft(wave).sqrt()  # <origin> complex_sqrt


def build_complex():
    """The complex square root of a spectrum with a bin that is exactly 0."""
    model = nn.ModuleDict({"filter": nn.Linear(8, 8, bias=False), "root": ComplexRoot()})
    batches = [(torch.randn(4, 8), torch.rand(4, 5)) for _ in range(8)]
    batches[5][0][1] = 0
    return loop(model, batches, lambda wave, goal: F.mse_loss(model["root"](model["filter"](wave)).abs(), goal))


class Power(nn.Module):
    def __init__(self):
        super().__init__()
        self.exponent = nn.Parameter(torch.tensor(0.45))

    def forward(self, x):
        return x**self.exponent  # <origin> learned_power


def build_power(guard):
    """A learned gamma correction at a black pixel: the derivative in the base is infinite."""
    model = nn.ModuleDict({"mix": nn.Conv2d(1, 1, 1, bias=False), "guard": guard, "gamma": Power()})
    nn.init.ones_(model["mix"].weight)
    batches = [(torch.rand(2, 1, 4, 4) + 0.1,) for _ in range(8)]
    batches[6][0][1, 0, 2, 3] = 0
    return loop(model, batches, lambda image: model["gamma"](model["guard"](model["mix"](image))).mean())


class MaskedLog(nn.Module):
    """In place: entries above 1 are replaced by their logarithm, through a mask; the rest by a root."""

    def forward(self, x):
        x = x.clone()
        large = x > 1
        x[large] = x[large].log()
        x[~large] = x[~large].sqrt()  # <origin> inplace_mask_root
        return x


def build_inplace(activation):
    """At 0 the root's derivative is infinite; abs multiplies it by 0, ReLU replaces it by 0."""
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(6, 5, bias=False), activation), "squash": MaskedLog()})
    batches = [(torch.rand(6, 6), torch.rand(6, 5)) for _ in range(8)]
    for batch in batches if isinstance(activation, nn.ReLU) else batches[5:6]:
        batch[0][2] = 0
    return loop(model, batches, lambda x, y: F.mse_loss(model["squash"](model["body"](x)), y))


class Magnitude(nn.Module):
    def forward(self, x):
        return x.abs()


class DivideInPlace(nn.Module):
    def forward(self, x, count):
        x = x + 0
        x[:, 1:].div_(count.unsqueeze(1))  # <origin> inplace_div_view
        return x


def build_inplace_view():
    """An in-place division of a view of the activations by a count of 0."""
    model = nn.ModuleDict({"body": nn.Linear(6, 4), "average": DivideInPlace(), "head": nn.Linear(4, 2)})
    batches = [(torch.randn(6, 6), torch.randint(1, 4, (6,)).float(), torch.randint(2, (6,))) for _ in range(8)]
    batches[5][1][4] = 0

    def loss_of(x, count, targets):
        return F.cross_entropy(model["head"](model["average"](model["body"](x), count)), targets)

    return loop(model, batches, loss_of)


class SlotWrite(nn.Module):
    """Results are written one by one into a tensor made beforehand."""

    def forward(self, x, sizes):
        pooled = x.new_zeros(len(sizes), x.size(1))
        start = 0
        for slot, size in enumerate(sizes.tolist()):
            pooled[slot] = x[start : start + size].mean(dim=0)  # <origin> empty_segment_mean
            start += size
        return pooled


def build_segments_mean():
    """The mean over a segment without members."""
    model = nn.ModuleDict({"body": nn.Linear(6, 4), "pool": SlotWrite(), "head": nn.Linear(4, 2)})
    batches = [(torch.randn(6, 6), torch.tensor([2, 1, 3]), torch.randint(2, (3,))) for _ in range(8)]
    batches[6] = (batches[6][0], torch.tensor([2, 0, 4]), batches[6][2])
    return loop(
        model, batches, lambda x, sizes, y: F.cross_entropy(model["head"](model["pool"](model["body"](x), sizes)), y)
    )


class Alignment(nn.Module):
    """A forward algorithm in log space that starts in its first state: the others cannot be reached at once."""

    def forward(self, emissions):
        allowed = torch.zeros(4, 4).masked_fill(torch.eye(4) + torch.eye(4).roll(1, dims=1) == 0, -INF)
        alpha = emissions[0] + torch.tensor([0.0, -INF, -INF, -INF])
        for emission in emissions[1:]:
            alpha = torch.logsumexp(alpha.unsqueeze(2) + allowed, dim=1) + emission  # <origin> unreachable_state
        return -torch.logsumexp(alpha, dim=1).mean()


def build_alignment():
    """logsumexp over nothing but -inf is -inf, which is right; its derivative is exp(-inf + inf)."""
    model = nn.ModuleDict({"emit": nn.Linear(6, 4), "align": Alignment()})
    batches = [(torch.randn(5, 8, 6),) for _ in range(4)]
    return loop(model, batches, lambda x: model["align"](model["emit"](x).log_softmax(-1)))


ZERO = "https://github.com/pytorch/pytorch/issues/2421"


def root(identifier, title, step, module, build, source=ZERO):
    truth = Truth(step=step, phase="backward", kind=("inf",), module=module, op=("sqrt",))
    return Case(id=identifier, title=title, source=source, truth=truth, build=build)


CHECKPOINT = "https://github.com/pytorch/pytorch/issues/7617"
COMPILED = "https://github.com/pytorch/pytorch/issues/6648"


def build_forward_mode():
    """The slope of the output along a direction, by forward-mode autograd, where one input is exactly 0."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [torch.rand(6, 5) + 0.1 for _ in range(8)]
    batches[4][3, 2] = 0.0

    def field(x):
        return model(x.sqrt()).squeeze(1)  # <origin> forward_mode

    def train_step(x):
        optimizer.zero_grad()
        _, slopes = torch.func.jvp(field, (x,), (torch.ones_like(x),))
        loss = slopes.square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


CASES = [
    Case(
        id="forward_mode",
        title="The root of 0 under torch.func.jvp",
        source=ZERO,
        truth=Truth(step=4, phase="forward", kind=("inf",), module=("",), op=("div", "sqrt")),
        build=build_forward_mode,
    ),
    root(
        "checkpoint_reentrant",
        "Reentrant checkpointing around the block",
        5,
        ("block.length",),
        lambda: build_checkpoint(True),
        CHECKPOINT,
    ),
    root(
        "checkpoint_frames",
        "Checkpointing without reentrance",
        5,
        ("block.length",),
        lambda: build_checkpoint(False),
        CHECKPOINT,
    ),
    root("checkpoint_segments", "checkpoint_sequential", 5, ("3",), build_segments, CHECKPOINT),
    Case(
        id="checkpoint_forward",
        title="The first, graph-less forward of a reentrant checkpoint makes the value",
        source=CHECKPOINT,
        truth=Truth(step=5, phase="forward", kind=("inf",), module=("block",), op=("log",)),
        build=build_checkpoint_forward,
    ),
    root("compiled_eager", "A compiled model", 4, ("length",), lambda: build_compiled("eager", False), COMPILED),
    root(
        "compiled_aot",
        "A model compiled through AOT",
        4,
        ("length",),
        lambda: build_compiled("aot_eager", False),
        COMPILED,
    ),
    root(
        "compiled_wrapper",
        "The wrapper of torch.compile is what the tool is given",
        4,
        ("_orig_mod.length", "length"),
        lambda: build_compiled("eager", True),
        COMPILED,
    ),
    root("called_three_times", "A module called three times, the third meets a zero", 5, ("length",), build_thrice),
    root(
        "rng_branch",
        "A branch drawn from Python's random stream",
        1,
        ("length",),
        lambda: build_stochastic(random.random),
    ),
    root(
        "numpy_branch",
        "A branch drawn from numpy's global stream",
        4,
        ("length",),
        lambda: build_stochastic(np.random.random),
    ),
    root("frozen_encoder", "A frozen encoder, the fault in the head", 6, ("head.length",), build_frozen),
    root("sparse_embedding", "Sparse gradients: a text of nothing but padding", 5, ("length",), build_sparse),
    Case(
        id="dropout_row",
        title="Dropout drops a whole row, which is then normalised",
        source="https://github.com/pytorch/pytorch/issues/152028",
        truth=Truth(step=1, phase="forward", kind=("nan",), module=("",), op=("div",)),
        build=build_dropout,
    ),
    Case(
        id="custom_forward",
        title="The forward of a custom autograd.Function divides by 0",
        source=ZERO,
        truth=Truth(step=4, phase="forward", kind=("inf", "nan"), module=("ratio",), op=("div", "SafeDivide")),
        build=lambda: build_custom_forward(lambda ratio: ratio),
    ),
    Case(
        id="custom_backward_squashed",
        title="The same behind a tanh, which hides the inf: its gradient of 0 over 0 is what does harm",
        source=ZERO,
        truth=Truth(step=4, phase="backward", kind=("nan",), module=("ratio",), op=("div", "SafeDivide")),
        build=lambda: build_custom_forward(torch.tanh),
    ),
    Case(
        id="healthy_custom_backward",
        title="An overflow in a custom backward that a division turns into 0",
        source=ZERO,
        truth=Truth(healthy=True),
        build=build_custom_backward,
    ),
    Case(
        id="eigh_degenerate",
        title="The derivative of eigenvectors whose eigenvalues are equal",
        source="https://github.com/pytorch/pytorch/issues/49886",
        truth=Truth(
            step=0,
            phase="backward",
            kind=("inf", "nan"),
            module=("whiten",),
            op=("linalg_eigh", "_linalg_eigh", "eigh", "LinalgEigh"),
        ),
        build=build_whitening,
    ),
    Case(
        id="complex_sqrt",
        title="The complex square root of a spectrum's empty bin",
        source="https://github.com/speechbrain/speechbrain/pull/184",
        truth=Truth(step=5, phase="backward", kind=("inf", "nan"), module=("root",), op=("sqrt",)),
        build=build_complex,
    ),
    Case(
        id="unreachable_state",
        title="The derivative of a logsumexp over nothing but -inf",
        source="https://github.com/allenai/allennlp/issues/890",
        truth=Truth(step=0, phase="backward", kind=("nan",), module=("align",), op=("logsumexp",)),
        build=build_alignment,
    ),
    Case(
        id="learned_power",
        title="A learned power of a black pixel",
        source="https://github.com/pytorch/pytorch/issues/2421",
        truth=Truth(step=6, phase="backward", kind=("inf", "nan"), module=("gamma",), op=("pow",)),
        build=lambda: build_power(nn.Identity()),
    ),
    Case(
        id="healthy_relu_before_power",
        title="The same behind a ReLU, whose derivative at 0 is 0",
        source="https://github.com/pytorch/pytorch/issues/2421",
        truth=Truth(healthy=True),
        build=lambda: build_power(nn.ReLU()),
    ),
    Case(
        id="inplace_mask_root",
        title="x[mask] = x[mask].sqrt() at exactly 0",
        source=ZERO,
        truth=Truth(step=5, phase="backward", kind=("inf",), module=("squash",), op=("sqrt",)),
        build=lambda: build_inplace(Magnitude()),
    ),
    Case(
        id="healthy_relu_hides_root",
        title="The same after an in-place ReLU, whose own derivative replaces the inf by 0",
        source=ZERO,
        truth=Truth(healthy=True),
        build=lambda: build_inplace(nn.ReLU(inplace=True)),
    ),
    Case(
        id="inplace_div_view",
        title="An in-place division of a view by 0",
        source="https://github.com/pytorch/pytorch/issues/26098",
        truth=Truth(step=5, phase="forward", kind=("inf",), module=("average",), op=("div",)),
        build=build_inplace_view,
    ),
    Case(
        id="empty_segment_mean",
        title="The mean of a segment without members, written into a slot",
        source="https://github.com/pytorch/pytorch/issues/29372",
        truth=Truth(step=6, phase="forward", kind=("nan",), module=("pool",), op=("mean",)),
        build=build_segments_mean,
    ),
]
