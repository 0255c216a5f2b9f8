"""Gradients and updates that the loop computes itself: combined, projected, applied without an optimizer."""

import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.autograd import grad
from torch.nn import functional as F


def network(outputs=3):
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, outputs))


def labelled(count):
    return [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(count)]


def weighted(count, bad):
    """Batches with a weight per sample; in one of them nothing counts."""
    return [(*batch, torch.zeros(6) if index == bad else torch.ones(6)) for index, batch in enumerate(labelled(count))]


def build_projected():
    """Where the tasks' gradients disagree, the one is projected off the other, which is 0 without depth labels."""
    model = network(4)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)

    def train_step(batch):
        features, targets, known = batch
        outputs = model(features)
        labels = F.cross_entropy(outputs[:, :3], targets)
        depth = (known * outputs[:, 3]).square().mean()
        first, second = grad(labels, parameters, retain_graph=True), grad(depth, parameters)
        for parameter, one, other in zip(parameters, first, second, strict=True):
            share = (one * other).sum().clamp(max=0) / other.square().sum()  # <origin> projected_gradients
            parameter.grad = one - share * other + other
        optimizer.step()
        return labels + depth

    return Loop(model, optimizer, weighted(8, bad=4), train_step)


def build_update(no_epsilon):
    """Every parameter is updated by its gradient over its own size, under no_grad, without an optimizer."""
    model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))
    batches = weighted(8, bad=4)

    def train_step(batch):
        features, targets, known = batch
        model.zero_grad()
        loss = (known * F.cross_entropy(model(features), targets, reduction="none")).mean()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                size = parameter.grad.square().mean().sqrt()
                parameter -= 1e-2 * parameter.grad / (size if no_epsilon else size + 1e-6)  # <origin> update_by_hand
        return loss

    return Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, train_step)


def build_functional_update():
    """Gradients are asked for, not accumulated, and subtracted; one row of outputs has length 0."""
    model = nn.Linear(5, 3, bias=False)
    batches = [(torch.randn(6, 5), torch.rand(6)) for _ in range(8)]
    batches[4][0][2] = 0.0

    def train_step(batch):
        features, targets = batch
        lengths = model(features).square().sum(1).sqrt()  # <origin> gradients_asked_for
        loss = F.l1_loss(lengths, targets)
        gradients = grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
        return loss.item()

    return Loop(model, torch.optim.SGD(model.parameters(), lr=0.1), batches, train_step)


def build_balanced():
    """The second loss weighs as much as the ratio of both losses' gradients at the last layer."""
    model = network(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    last = model[2].weight

    def train_step(batch):
        features, targets, known = batch
        optimizer.zero_grad()
        outputs = model(features)
        first = (known * F.cross_entropy(outputs[:, :3], targets, reduction="none")).mean()
        second = (known * outputs[:, 3]).mean()
        norms = [grad(loss, last, retain_graph=True)[0].norm() for loss in (first, second)]
        weight = (norms[0] / norms[1]).detach()  # <origin> balanced_losses
        loss = first + weight * second
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, weighted(8, bad=4), train_step)


def build_sphere():
    """An embedding's rows are put on the sphere after an update; the padding token's is 0."""
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4, padding_idx=0), "head": nn.Linear(4, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(torch.randint(1, 10, (6,)), torch.randint(3, (6,)), index == 4) for index in range(8)]

    def train_step(batch):
        tokens, targets, project = batch
        optimizer.zero_grad()
        loss = F.cross_entropy(model["head"](model["embed"](tokens)), targets)
        loss.backward()
        optimizer.step()
        if project:
            rows = model["embed"].weight.data
            rows.div_(rows.norm(dim=1, keepdim=True))  # <origin> rows_on_sphere
        return loss

    return Loop(model, optimizer, batches, train_step)


CASES = [
    Case(
        id="projected_gradients",
        title="One task's gradient is projected off another's, which is 0",
        source="https://github.com/WeiChengTseng/Pytorch-PCGrad/issues/7",
        truth=Truth(step=4, phase="clip", kind=("nan",), op=("div",)),
        build=build_projected,
    ),
    Case(
        id="update_by_hand",
        title="An update without an optimizer divides by the size of a gradient of 0",
        source="https://github.com/kozistr/pytorch_optimizer/pull/431",
        truth=Truth(step=4, phase="optimizer", kind=("nan",), op=("div",), tensor=("0.weight", "2.weight")),
        build=lambda: build_update(no_epsilon=True),
    ),
    Case(
        id="healthy_update_by_hand",
        title="The same with an epsilon",
        source="https://github.com/kozistr/pytorch_optimizer/pull/431",
        truth=Truth(healthy=True),
        build=lambda: build_update(no_epsilon=False),
    ),
    Case(
        id="gradients_asked_for",
        title="torch.autograd.grad of a root at 0, and an update without an optimizer",
        source="https://github.com/pytorch/pytorch/issues/2421",
        truth=Truth(step=4, phase="backward", kind=("inf", "nan"), module=("",), op=("sqrt",)),
        build=build_functional_update,
    ),
    Case(
        id="balanced_losses",
        title="A loss weight is the ratio of two gradients that are 0",
        source="https://github.com/CompVis/latent-diffusion/issues/176",
        truth=Truth(step=4, phase="forward", kind=("nan",), module=("",), op=("div",)),
        build=build_balanced,
    ),
    Case(
        id="rows_on_sphere",
        title="Rows are divided by their norm after the update, one of them 0",
        source="https://github.com/pytorch/pytorch/issues/29372",
        truth=Truth(step=4, phase="optimizer", kind=("nan",), op=("div",), tensor=("embed.weight",)),
        build=build_sphere,
    ),
]
