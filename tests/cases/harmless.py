"""No fault in any of these: infinities that are kept, returned, scaled away or thrown away, and reach no weight."""

import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.autograd import grad
from torch.nn import functional as F

INF = float("inf")


def network(outputs=3):
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, outputs))


def labelled(count):
    return [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(count)]


def stepping(model, optimizer, batches, outcome, **more):
    """`outcome` gives the loss, and what the step returns once it was used."""

    def train_step(batch):
        optimizer.zero_grad()
        loss, returned = outcome(*batch)
        loss.backward()
        optimizer.step()
        return returned

    return Loop(model, optimizer, batches, train_step, **more)


class CausalAttention(nn.Module):
    """The mask is a persistent buffer, made anew whenever a longer sequence comes; the bias of distances is in it."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(5, 5), nn.Linear(5, 5)
        self.register_buffer("mask", torch.zeros(0, 0))

    def forward(self, x):
        length = x.size(1)
        if len(self.mask) < length:
            places = torch.arange(length)
            distances = -0.1 * (places[:, None] - places).abs()
            self.mask = distances + torch.full((length, length), -INF).triu(1)
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        return (scores + self.mask[:length, :length]).softmax(-1) @ x


def build_mask():
    model = nn.Sequential(CausalAttention(), nn.Linear(5, 3))
    batches = [(torch.randn(4, n, 5), torch.randint(3, (4, n))) for n in (3, 3, 5, 4, 6, 7, 7)]

    def outcome(x, y):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        return loss, loss

    return stepping(model, torch.optim.Adam(model.parameters(), lr=1e-3), batches, outcome)


class Policy(nn.Module):
    """Keeps its last logits, to be drawn by somebody else; illegal actions have -inf."""

    def __init__(self):
        super().__init__()
        self.body = network()
        self.register_buffer("last", torch.zeros(6, 3))

    def forward(self, x, illegal):
        logits = self.body(x).masked_fill(illegal, -INF)
        self.last.copy_(logits.detach())
        return logits


def build_policy():
    model = Policy()
    batches = [(x, y % 2, torch.tensor([False, False, index > 2])) for index, (x, y) in enumerate(labelled(8))]

    def outcome(x, y, illegal):
        logits = model(x, illegal)
        return F.cross_entropy(logits, y), logits

    return stepping(model, torch.optim.Adam(model.parameters(), lr=1e-3), batches, outcome)


def build_metrics():
    """The step returns a mean over nothing and a perplexity of inf, neither of them detached."""
    model = network()

    def outcome(x, y):
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        certain = logits[logits.abs() > 100].mean()
        return loss, {"loss": loss, "certain": certain, "perplexity": (1000 * loss).exp()}

    return stepping(model, torch.optim.SGD(model.parameters(), lr=0.1), labelled(8), outcome)


def build_probe():
    """A gradient that is only looked at, of a root at 0, and one of an infinite quantity."""
    model = network()

    def outcome(x, y):
        logits = model(x)
        root, ratio = (logits - logits).square().sum().sqrt(), (logits / logits.detach().mul(0)).sum()
        probes = [grad(entry, model[2].weight, retain_graph=True)[0].norm() for entry in (root, ratio)]
        loss = F.cross_entropy(logits, y)
        return loss, (loss, *probes)

    return stepping(model, torch.optim.SGD(model.parameters(), lr=0.1), labelled(8), outcome)


def build_two_scalers():
    """Two models, each with a GradScaler of its own; the first still skips while the second steps."""
    models = nn.ModuleList([network(), network()])
    optimizers = [torch.optim.Adam(model.parameters(), lr=1e-3) for model in models]
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**power) for power in (24, 20)]

    def train_step(batch):
        features, targets = batch
        for model, optimizer, scaler in zip(models, optimizers, scalers, strict=True):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                logits = model(30 * features)
            loss = F.cross_entropy(logits.float(), targets)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        return loss

    return Loop(models, optimizers[0], labelled(20), train_step, stateful=[optimizers[1], *scalers])


CASES = [
    Case(id=f"healthy_{identifier}", title=title, source=source, truth=Truth(healthy=True), build=build)
    for identifier, title, source, build in (
        (
            "growing_mask",
            "A causal mask in a persistent buffer, made when it is needed",
            "https://github.com/facebookresearch/xformers/issues/655",
            build_mask,
        ),
        (
            "kept_logits",
            "Masked logits are kept in a buffer and returned",
            "https://github.com/huggingface/transformers/pull/21435",
            build_policy,
        ),
        (
            "attached_metrics",
            "Metrics of NaN and inf that nobody has detached",
            "https://github.com/pytorch/pytorch/issues/29372",
            build_metrics,
        ),
        (
            "probed_gradients",
            "Gradients of NaN that are only looked at",
            "https://github.com/pytorch/pytorch/issues/2421",
            build_probe,
        ),
        (
            "two_scalers",
            "One of two GradScalers skips in a step in which the other does not",
            "https://github.com/NoamRosenberg/autodeeplab/issues/12",
            build_two_scalers,
        ),
    )
]
