"""Module buffers: codebooks, running statistics, observers, queues."""

import copy

import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.nn import functional as F

INF, NAN = float("inf"), float("nan")


def loop(model, batches, loss_of, after=lambda: None, optimizer=None):
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=1e-3)

    def train_step(batch):
        optimizer.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        optimizer.step()
        after()
        return loss

    return Loop(model, optimizer, batches, train_step)


class Codebook(nn.Module):
    """Nearest neighbours; the codes follow the means of their members, and a code without members divides by 0."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.register_buffer("codes", torch.randn(4, 3))
        self.register_buffer("sizes", torch.ones(4))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, x):
        nearest = torch.cdist(x, self.codes).argmin(dim=1)
        quantised = self.codes[nearest]
        with torch.no_grad():
            members = F.one_hot(nearest, 4).float()
            self.follow(members, x.detach())
        return x + (quantised - x).detach()

    def follow(self, members, x):
        if self.how == "in place":
            self.sizes.mul_(0.0).add_(members.sum(0))
            self.sums.mul_(0.0).add_(members.T @ x)
            self.codes.copy_(self.sums / self.sizes.unsqueeze(1))  # <origin> codebook_in_place
        elif self.how == "assigned":
            self.sizes = members.sum(0)
            self.sums = members.T @ x
            self.codes = self.sums / self.sizes.unsqueeze(1)  # <origin> codebook_assigned
        else:
            self.sizes = 0.9 * self.sizes + 0.1 * members.sum(0)
            self.sums = 0.9 * self.sums + 0.1 * members.T @ x
            self.codes = self.sums / self.sizes.clamp(min=1e-3).unsqueeze(1)


class Quantised(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.encoder, self.codebook, self.decoder = nn.Linear(5, 3), Codebook(how), nn.Linear(3, 5)
        self.codebook.codes.copy_(torch.tensor([[2.0, 0, 0], [-2.0, 0, 0], [0, 2.0, 0], [0, -2.0, 0]]))

    def forward(self, x):
        return self.decoder(self.codebook(self.encoder(x)))


def build_codebook(how):
    model = Quantised(how)
    with torch.no_grad():
        model.encoder.weight.zero_()
        model.encoder.weight[:3, :3] = torch.eye(3)
        model.encoder.bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    corners = torch.tensor([[2.0, 0, 0, 0, 0], [-2.0, 0, 0, 0, 0], [0, 2.0, 0, 0, 0], [0, -2.0, 0, 0, 0]])
    batches = []
    for index in range(12):
        chosen = corners[torch.arange(12) % (3 if index == 7 else 4)]  # once, the fourth cluster is empty
        batches.append((chosen + 0.1 * torch.randn(12, 5),))
    return loop(model, batches, lambda x: F.mse_loss(model(x), x), optimizer=optimizer)


class RunningScale(nn.Module):
    """The input is divided by a running variance that is assigned anew in each step."""

    def __init__(self):
        super().__init__()
        self.register_buffer("variance", torch.ones(5))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        with torch.no_grad():
            self.variance = 0.5 * self.variance + 0.5 * x.var(dim=0)  # <origin> running_variance_of_one
            self.count += 1
        return x / (x.abs().mean() + 1)


def build_running(bad):
    """A batch of one sample has no variance."""
    model = nn.ModuleDict({"scale": RunningScale(), "body": nn.Linear(5, 3)})
    batches = [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(10)]
    if bad:
        batches[6] = (torch.randn(1, 5), torch.randint(3, (1,)))
    return loop(model, batches, lambda x, y: F.cross_entropy(model["body"](model["scale"](x)), y))


class Meter(nn.Module):
    """A metric kept in buffers that are not part of the checkpoint; 0 / 0 until something was counted."""

    def __init__(self):
        super().__init__()
        self.register_buffer("correct", torch.zeros(()), persistent=False)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("accuracy", torch.zeros(()), persistent=False)
        self.register_buffer("best_loss", torch.tensor(INF))

    @torch.no_grad()
    def update(self, logits, targets, loss):
        rare = targets == 2
        self.correct += (logits.argmax(1) == targets)[rare].sum()
        self.seen += rare.sum()
        self.accuracy.copy_(self.correct / self.seen)
        self.best_loss.copy_(torch.minimum(self.best_loss, loss))

    def reset(self):
        self.correct.zero_()
        self.seen.zero_()
        self.best_loss.fill_(INF)


def build_meter():
    """Metrics that are 0 / 0, a best loss that starts at inf and is reset each epoch, under no_grad."""
    model = nn.ModuleDict({"body": nn.Linear(5, 3), "meter": Meter()})
    optimizer = torch.optim.Adam(model["body"].parameters(), lr=1e-3)
    batches = [(torch.randn(8, 5), torch.randint(2 + index % 2, (8,)), index % 4 == 0) for index in range(12)]

    def train_step(batch):
        inputs, targets, new_epoch = batch
        if new_epoch:
            model["meter"].reset()
        optimizer.zero_grad()
        logits = model["body"](inputs)
        loss = F.cross_entropy(logits, targets)
        loss.backward()
        optimizer.step()
        model["meter"].update(logits, targets, loss)
        with torch.no_grad():
            recall = model["meter"].correct / model["meter"].seen
        return {"loss": loss.detach(), "recall": recall, "perplexity": torch.exp(1000 * loss.detach())}

    return Loop(model, optimizer, batches, train_step)


class Observer(nn.Module):
    """A running range that starts anew with every epoch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("low", torch.full((4,), INF))
        self.register_buffer("high", torch.full((4,), -INF))

    def reset(self):
        self.low.fill_(INF)
        self.high.fill_(-INF)

    def forward(self, x):
        self.low.copy_(torch.minimum(self.low, x.detach().amin(0)))
        self.high = torch.maximum(self.high, x.detach().amax(0))
        return x


def build_observer():
    """The range is reset at the end of an epoch, so it ends a step at inf."""
    model = nn.Sequential(nn.Linear(5, 4), Observer(), nn.Tanh(), nn.Linear(4, 3))
    batches = [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(12)]
    calls = torch.zeros(())

    def after():
        calls.add_(1)
        if int(calls) % 4 == 0:
            model[1].reset()

    made = loop(model, batches, lambda x, y: F.cross_entropy(model(x), y), after)
    made.stateful.append(calls)
    return made


class Nearest(nn.Module):
    """Distances start at inf; the smallest wins."""

    def __init__(self):
        super().__init__()
        self.register_buffer("prototypes", torch.full((6, 4), NAN))
        self.register_buffer("filled", torch.zeros(6, dtype=torch.bool))

    def forward(self, x, targets):
        distances = torch.full((len(x), 6), INF)
        if self.filled.any():
            distances[:, self.filled] = torch.cdist(x.detach(), self.prototypes[self.filled])
        nearest = distances.argmin(dim=1)
        slot = int(targets[0]) % 6
        self.prototypes[slot] = x[0].detach()
        self.filled[slot] = True
        return x + 0.1 * torch.nan_to_num(self.prototypes)[nearest]


def build_nearest():
    """Prototypes are NaN until their class was seen, one by one; distances to them stay inf."""
    model = nn.ModuleDict({"body": nn.Linear(5, 4), "near": Nearest(), "head": nn.Linear(4, 3)})
    batches = [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(12)]
    return loop(model, batches, lambda x, y: F.cross_entropy(model["head"](model["near"](model["body"](x), y)), y))


def build_teacher_statistics():
    """A teacher in train mode normalises a batch that overflowed in its own forward, under no_grad."""
    student = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model = nn.ModuleDict({"student": student, "teacher": copy.deepcopy(student).requires_grad_(False)})
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    batches = [(torch.randn(8, 5), torch.randint(2, (8,)), 1.0) for _ in range(10)]
    batches[6] = (batches[6][0], batches[6][1], 1e25)  # the variance of 1e25 overflows

    def loss_of(x, y, strength):
        with torch.no_grad():
            model["teacher"](x * strength)
        return F.cross_entropy(student(x), y)

    return loop(model, batches, loss_of, optimizer=optimizer)


class LateBuffer(nn.Module):
    """A buffer that does not exist before the first call."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", None)

    def forward(self, x):
        if self.scale is None:
            self.scale = x.detach().abs().amax(dim=0)
        else:
            self.scale = 0.9 * self.scale + 0.1 * x.detach().abs().amax(dim=0)
        return x / self.scale  # <origin> late_buffer_zero


def build_late(bad):
    """A feature that is 0 in the first batch makes a scale of 0."""
    model = nn.Sequential(LateBuffer(), nn.Linear(5, 3))
    batches = [(torch.randn(8, 5), torch.randint(3, (8,))) for _ in range(8)]
    if bad:
        batches[0][0][:, 3] = 0
    return loop(model, batches, lambda x, y: F.cross_entropy(model(x), y))


STATE = "https://github.com/ZhangXInFD/SpeechTokenizer/issues/18"
CASES = [
    Case(
        id="codebook_in_place",
        title="A codebook's empty cluster, written in place",
        source=STATE,
        truth=Truth(step=7, phase="state", kind=("nan",), op=("div",), tensor=("codebook.codes",)),
        build=lambda: build_codebook("in place"),
    ),
    Case(
        id="codebook_assigned",
        title="A codebook's empty cluster; the buffer is assigned anew in each step",
        source=STATE,
        truth=Truth(step=7, phase="state", kind=("nan",), op=("div",), tensor=("codebook.codes",)),
        build=lambda: build_codebook("assigned"),
    ),
    Case(
        id="healthy_codebook",
        title="A codebook that follows its clusters with a floor",
        source=STATE,
        truth=Truth(healthy=True),
        build=lambda: build_codebook("floored"),
    ),
    Case(
        id="running_variance_of_one",
        title="A running variance, assigned anew, meets a batch of one",
        source="https://github.com/pytorch/pytorch/issues/29372",
        truth=Truth(step=6, phase="state", kind=("nan",), op=("var",), tensor=("scale.variance",)),
        build=lambda: build_running(bad=True),
    ),
    Case(
        id="healthy_assigned_buffers",
        title="Buffers that are assigned anew in each step",
        source="https://github.com/pytorch/pytorch/issues/29372",
        truth=Truth(healthy=True),
        build=lambda: build_running(bad=False),
    ),
    Case(
        id="teacher_running_variance",
        title="Only the teacher's running variance overflows, under no_grad",
        source="https://github.com/pytorch/pytorch/pull/178123",
        truth=Truth(step=6, phase="state", kind=("inf",), tensor=("teacher.1.running_var",), line=False),
        build=build_teacher_statistics,
    ),
    Case(
        id="late_buffer_zero",
        title="A buffer made in the first call divides by 0",
        source="https://github.com/mllam/neural-lam/issues/136",
        truth=Truth(step=0, phase="forward", kind=("nan",), module=("0",), op=("div",)),
        build=lambda: build_late(bad=True),
    ),
    Case(
        id="healthy_late_buffer",
        title="A buffer made in the first call",
        source="https://github.com/mllam/neural-lam/issues/136",
        truth=Truth(healthy=True),
        build=lambda: build_late(bad=False),
    ),
    Case(
        id="healthy_meter",
        title="Metrics of 0 / 0 under no_grad, and a best loss of inf",
        source="https://github.com/facebookresearch/mmf/issues/893",
        truth=Truth(healthy=True),
        build=build_meter,
    ),
    Case(
        id="healthy_observer_reset",
        title="A running range that is reset at the end of each epoch",
        source="https://github.com/pytorch/pytorch/pull/44956",
        truth=Truth(healthy=True),
        build=build_observer,
    ),
    Case(
        id="healthy_prototypes",
        title="Prototypes that are NaN until their class is seen, distances that start at inf",
        source="https://github.com/NVIDIA/Megatron-LM/issues/6253",
        truth=Truth(healthy=True),
        build=build_nearest,
    ),
]
