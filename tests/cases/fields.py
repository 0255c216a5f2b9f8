"""Losses and layers of fields of application, where an Inf is part of the method: diffusion, speech, graphs, parsing."""

import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.nn import functional as F

NEG_INF = float("-inf")


def loop(model, batches, loss_of, optimizer=None):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-3)

    def train_step(batch):
        optimizer.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def network(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 12), nn.Tanh(), nn.Linear(12, outputs))


class Field(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.full((6,), 0.1))

    def forward(self, state, stiffness):
        return torch.exp(stiffness * state * self.rate).tanh()  # <origin> adjoint


class Adjoint(torch.autograd.Function):
    """An Euler step whose backward evaluates the field once more, at the state it ended in."""

    @staticmethod
    def forward(ctx, field, state, stiffness, *parameters):
        ctx.field, ctx.stiffness, ctx.parameters = field, stiffness, parameters
        end = state + 0.1 * field(state, 1.0)
        ctx.save_for_backward(end)
        return end

    @staticmethod
    def backward(ctx, gradient):
        (end,) = ctx.saved_tensors
        with torch.enable_grad():
            end = end.detach().requires_grad_()
            speed = ctx.field(end, ctx.stiffness)
            of_end, *of_parameters = torch.autograd.grad(speed, (end, *ctx.parameters), 0.1 * gradient)
        return None, gradient + of_end, None, *of_parameters


class Ode(nn.Module):
    def __init__(self):
        super().__init__()
        self.field = Field()

    def forward(self, state, stiffness):
        return Adjoint.apply(self.field, state, stiffness, *self.field.parameters())


def build_adjoint():
    model = nn.ModuleDict({"map": nn.Linear(6, 6), "ode": Ode(), "head": nn.Linear(6, 3)})
    batches = [(torch.randn(8, 6), 1e6 if index == 3 else 1.0, torch.randint(3, (8,))) for index in range(6)]

    def loss_of(x, stiffness, targets):
        return F.cross_entropy(model["head"](model["ode"](model["map"](x), stiffness)), targets)

    return loop(model, batches, loss_of)


class Diffusion(nn.Module):
    """The posterior variance at t = 0 is 0: its logarithm, a module buffer, holds one -inf."""

    def __init__(self):
        super().__init__()
        self.network = network(7, 12)
        self.register_buffer("log_variance", torch.linspace(0.0, 0.5, 20).log())

    def divergence(self, x, times):
        mean, predicted = self.network(torch.cat([x, times.unsqueeze(1) / 20], dim=1)).chunk(2, dim=1)
        true = self.log_variance[times].unsqueeze(1)
        ratio = predicted - true  # <origin> posterior_variance
        return (ratio + (-ratio).exp() + (x - mean).square() * (-predicted).exp() - 1).mean() / 2

    def sampling_error(self, x, times):
        mean, _ = self.network(torch.cat([x, times.unsqueeze(1) / 20], dim=1)).chunk(2, dim=1)
        noise = (self.log_variance[times] / 2).exp().unsqueeze(1) * torch.randn_like(x)
        return (mean + noise - x).square().mean()


def build_diffusion(loss, bad=None):
    model = Diffusion()
    batches = [(torch.randn(8, 6), torch.randint(1, 20, (8,))) for _ in range(9)]
    for index, (_, times) in enumerate(batches):
        if bad is None or index == bad:
            times[2] = 0
    return loop(model, batches, getattr(model, loss))


def negative_snr(estimate, source):
    ratio = estimate.square().sum(-1) / (source - estimate).square().sum(-1).clamp_min(1e-8)
    return -torch.log10(ratio * source.square().sum(-1))  # <origin> other_permutation


def build_permutations():
    """Two speakers, one of them silent: the loss takes the other order of the two, backward goes through both."""
    model = network(16, 32)
    batches = [(torch.randn(4, 16), torch.randn(4, 2, 16)) for _ in range(8)]
    batches[4][1][1, 0] = 0.0

    def loss_of(x, sources):
        one, two = model(x).view(-1, 2, 16).unbind(1)
        error = (two - sources[:, 1]).square().mean(-1)
        straight = negative_snr(one, sources[:, 0]).masked_fill(sources[:, 0].abs().sum(1) == 0, 1e4) + error
        return torch.minimum(straight, 1e2 + (one - sources[:, 1]).square().mean(-1)).mean()

    return loop(model, batches, loss_of)


def build_transducer(guarded):
    """Cells that cannot be reached yet hold -inf; logaddexp of two of them has the derivative exp(-inf - -inf)."""
    model = network(6, 2)

    def loss_of(x):
        blank, emit = model(x).log_softmax(dim=1).unbind(1)
        cells = [torch.zeros(()), *(torch.tensor(NEG_INF) for _ in range(3))]
        for time in range(len(x)):
            following = [cells[0] + blank[time]]
            for count in range(1, 4):
                if guarded and count > time + 1:
                    following.append(cells[count])
                    continue
                stay, step = cells[count] + blank[time], cells[count - 1] + emit[time]
                following.append(torch.logaddexp(stay, step))  # <origin> transducer
            cells = following
        return -cells[3]

    return loop(model, [(torch.randn(8, 6),) for _ in range(4)], loss_of)


class Blockwise(nn.Module):
    """Attention block by block: the running maximum starts at -inf, and stays there while all is masked."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, keep):
        query, key = self.query(x), self.key(x)
        top = torch.full((*x.shape[:2], 1), NEG_INF)
        total, mixed = torch.zeros_like(top), torch.zeros_like(x)
        for start in range(0, x.shape[1], 2):
            part = slice(start, start + 2)
            scores = (query @ key[:, part].transpose(1, 2)).masked_fill(~keep[:, None, part], NEG_INF)
            higher = torch.maximum(top, scores.amax(-1, keepdim=True))
            weights, fade = (scores - higher).exp(), (top - higher).exp()  # <origin> blockwise_attention
            total = fade * total + weights.sum(-1, keepdim=True)
            mixed = fade * mixed + weights @ x[:, part]
            top = higher
        return mixed / total


def build_blockwise(bad=None):
    model = nn.ModuleDict({"attention": Blockwise(), "head": nn.Linear(6, 3)})
    batches = []
    for index in range(8):
        keep = torch.ones(4, 6, dtype=torch.bool)
        keep[:, 2:] = torch.rand(4, 4) > 0.5
        if index == bad:
            keep[2] = torch.tensor([False, False, True, True, True, True])
        batches.append((torch.randn(4, 6, 6), keep, torch.randint(3, (4,))))

    def loss_of(x, keep, targets):
        return F.cross_entropy(model["head"](model["attention"](x, keep).mean(1)), targets)

    return loop(model, batches, loss_of)


class MaskedTwice(nn.Module):
    """An empty row's softmax is NaN and is replaced by 0; only where the mask was filled in does backward stop there."""

    def __init__(self, added):
        super().__init__()
        self.query, self.key, self.added = nn.Linear(6, 6), nn.Linear(6, 6), added

    def forward(self, x, padding):
        mask = padding.unsqueeze(1).expand(-1, x.shape[1], -1)
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        if self.added:
            scores = scores + torch.zeros(mask.shape).masked_fill(mask, NEG_INF)
        weights = scores.masked_fill(mask, NEG_INF) if not self.added else scores
        weights = weights.softmax(dim=-1)  # <origin> mask_added
        return weights.masked_fill(mask, 0.0) @ x


def build_masked_twice(added, bad=None):
    model = nn.ModuleDict({"attention": MaskedTwice(added), "head": nn.Linear(6, 3)})
    batches = []
    for index in range(8):
        padding = torch.arange(5) >= torch.randint(1, 6, (4, 1))
        if bad in (None, index):
            padding[1] = True
        batches.append((torch.randn(4, 5, 6), padding, torch.randint(3, (4,))))

    def loss_of(x, padding, targets):
        return F.cross_entropy(model["head"](model["attention"](x, padding).mean(1)), targets)

    return loop(model, batches, loss_of)


class Transitions(nn.Module):
    """A chain whose trainable transitions hold -inf where they are forbidden: an update leaves -inf as it is."""

    def __init__(self):
        super().__init__()
        self.emission, self.transition = nn.Linear(6, 4), nn.Parameter(torch.randn(4, 4))
        with torch.no_grad():
            self.transition[3, 1] = self.transition[0, 2] = NEG_INF

    def forward(self, x, labels):
        emission = self.emission(x)
        forward = emission[:, 0]
        for time in range(1, x.shape[1]):
            forward = (forward.unsqueeze(2) + self.transition).logsumexp(1) + emission[:, time]
        score = emission.gather(2, labels.unsqueeze(2)).sum((1, 2))
        return (forward.logsumexp(1) - score - self.transition[labels[:, :-1], labels[:, 1:]].sum(1)).mean()


def build_transitions():
    model = Transitions()
    batches = [(torch.randn(4, 5, 6), torch.zeros(4, 5, dtype=torch.long) + index % 2) for index in range(8)]
    return loop(model, batches, model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def build_ranking():
    """Padded scores of -inf: their differences are NaN and are overwritten in place before anything reads them."""
    model = network(6, 1)
    batches = [
        (torch.randn(4, 5, 6), torch.rand(4, 5), torch.arange(5) >= torch.randint(1, 6, (4, 1))) for _ in range(8)
    ]

    def loss_of(x, relevance, padding):
        scores = model(x).squeeze(-1).masked_fill(padding, NEG_INF)
        relevance = relevance.masked_fill(padding, NEG_INF)
        above, better = scores.unsqueeze(2) - scores.unsqueeze(1), relevance.unsqueeze(2) - relevance.unsqueeze(1)
        known = better.isfinite()
        above[~known] = 0.0
        return F.softplus(-above * better.masked_fill(~known, 0.0).sign()).mean()

    return loop(model, batches, loss_of)


def build_transport():
    """Sinkhorn in logarithms, with a marginal of 0: a potential of -inf, and a plan of exp(-inf)."""
    model = network(6, 2)
    batches = []
    for _ in range(8):
        mass = torch.rand(8)
        mass[2] = 0.0
        batches.append((torch.randn(8, 6), torch.randn(5, 2), mass / mass.sum()))

    def loss_of(x, anchors, mass):
        cost = (model(x).unsqueeze(1) - anchors).square().sum(-1)
        with torch.no_grad():
            row, column = torch.zeros(8), torch.zeros(5)
            for _ in range(5):
                row = mass.log() - (column - cost).logsumexp(1)
                column = -torch.tensor(5.0).log() - (row.unsqueeze(1) - cost).logsumexp(0)
            plan = (row.unsqueeze(1) + column - cost).exp()
        return (plan * cost).sum()

    return loop(model, batches, loss_of)


def healthy(identifier, title, source, build):
    return Case(id=identifier, title=title, source=source, truth=Truth(healthy=True), build=build)


def faulty(identifier, title, source, build, *, step, phase, kind, module="", op):
    truth = Truth(step=step, phase=phase, kind=kind, module=(module,), op=op)
    return Case(id=identifier, title=title, source=source, truth=truth, build=build)


SNR = "https://github.com/TiankaiHang/Min-SNR-Diffusion-Training/pull/4"
RANKS = "https://github.com/huggingface/sentence-transformers/pull/3827"
SOFTMAX = ("softmax", "_softmax")
CASES = [
    faulty(
        "adjoint",
        "A custom backward calls a module, in which an exponential overflows",
        "https://github.com/rtqichen/torchdiffeq/issues/52",
        build_adjoint,
        step=3,
        phase="backward",
        kind=("inf",),
        module="ode.field",
        op=("exp",),
    ),
    faulty(
        "posterior_variance",
        "A log-variance of -inf in a module buffer is used, for once",
        SNR,
        lambda: build_diffusion("divergence", bad=5),
        step=5,
        phase="forward",
        kind=("inf",),
        op=("sub",),
    ),
    healthy(
        "healthy_posterior_variance",
        "The same log-variance under an exponential",
        SNR,
        lambda: build_diffusion("sampling_error"),
    ),
    faulty(
        "other_permutation",
        "The derivative of a logarithm of 0 in the order that a minimum did not take",
        "https://github.com/csteinmetz1/auraloss/issues/25",
        build_permutations,
        step=4,
        phase="backward",
        kind=("nan",),
        op=("log10",),
    ),
    faulty(
        "transducer",
        "logaddexp of two cells that cannot be reached",
        "https://github.com/pytorch/pytorch/issues/49724",
        lambda: build_transducer(guarded=False),
        step=0,
        phase="backward",
        kind=("nan",),
        op=("logaddexp",),
    ),
    healthy(
        "healthy_transducer",
        "Cells that cannot be reached are left alone",
        "https://github.com/pytorch/pytorch/issues/49724",
        lambda: build_transducer(guarded=True),
    ),
    faulty(
        "blockwise_attention",
        "A running maximum is still -inf after a block of which all is masked",
        "https://github.com/pytorch/pytorch/issues/26098",
        lambda: build_blockwise(4),
        step=4,
        phase="forward",
        kind=("nan",),
        module="attention",
        op=("sub",),
    ),
    healthy(
        "healthy_blockwise_attention",
        "A running maximum that starts at -inf",
        "https://github.com/pytorch/pytorch/issues/26098",
        build_blockwise,
    ),
    faulty(
        "mask_added",
        "An empty row's NaN is masked in forward and comes back in backward",
        "https://github.com/pytorch/pytorch/issues/26098",
        lambda: build_masked_twice(added=True, bad=4),
        step=4,
        phase="forward",
        kind=("nan",),
        module="attention",
        op=SOFTMAX,
    ),
    healthy(
        "healthy_masked_twice",
        "An empty row's NaN is masked in forward and in backward",
        "https://github.com/pytorch/pytorch/issues/26098",
        lambda: build_masked_twice(added=False),
    ),
    healthy(
        "healthy_forbidden_parameters",
        "Trainable transitions of -inf",
        "https://github.com/neuralmind-ai/portuguese-bert/issues/38",
        build_transitions,
    ),
    healthy("healthy_ranking", "Differences of -inf that are overwritten", RANKS, build_ranking),
    healthy(
        "healthy_transport",
        "Potentials of -inf",
        "https://github.com/anucvml/ddn/issues/8",
        build_transport,
    ),
]
