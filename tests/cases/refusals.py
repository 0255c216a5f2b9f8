"""Code that raises because of a value that is not finite: the origin lies before the error."""

import numpy as np
import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.nn import functional as F


def loop(model, batches, loss_of):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def train_step(batch):
        optimizer.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def network(outputs):
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, outputs))


def assign(cost):
    """What an assignment solver does first."""
    cost = np.asarray(cost)
    if not np.isfinite(cost).all():
        raise ValueError("matrix contains invalid numeric entries")
    return cost.argmin(axis=1)


def build_matcher():
    """The gap between two intervals without width, relative to their width."""
    model = network(1)
    batches = [(torch.randn(8, 6), torch.rand(3) + 0.1, torch.ones(8)) for _ in range(8)]
    batches[4][1][1], batches[4][2][2] = 0.0, 0.0

    def loss_of(x, targets, weight):
        width = model(x).exp() * weight.unsqueeze(1)
        gap = (width - targets).abs() / (width + targets)  # <origin> matcher_refuses
        with torch.no_grad():
            taken = assign(gap.cpu())
        return gap[torch.arange(8), taken].mean()

    return loop(model, batches, loss_of)


class Buckets(nn.Module):
    """Each row's numbers in eight buckets between its least and its largest."""

    def forward(self, x):
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return ((x - low) / (high - low) * 7).long()  # <origin> embedding_refuses gather_refuses


def bucket_batches(bad=None):
    batches = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(9)]
    if bad is not None:
        batches[bad][0][3] = 1.5  # a constant row: 0 / 0, and a NaN is no index
    return batches


def build_embedding():
    parts = {"buckets": Buckets(), "embedding": nn.Embedding(8, 4), "head": nn.Linear(4, 3)}
    model = nn.ModuleDict(parts)

    def loss_of(x, targets):
        return F.cross_entropy(model["head"](model["embedding"](model["buckets"](x)).mean(1)), targets)

    return loop(model, bucket_batches(4), loss_of)


def build_gather():
    model = nn.ModuleDict({"buckets": Buckets(), "network": network(8)})

    def loss_of(x, targets):
        return (model["network"](x).gather(1, model["buckets"](x)) - targets.unsqueeze(1)).square().mean()

    return loop(model, bucket_batches(5), loss_of)


class RelativeBias(nn.Module):
    """A logarithmic bucket of each distance; that of the distance 0, log(0) made an integer, is not taken."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Embedding(8, 1)

    def forward(self, length):
        distance = (torch.arange(length).unsqueeze(0) - torch.arange(length).unsqueeze(1)).abs()
        far = (4 + torch.log2(distance.float() / 4) * 4).long().clamp(max=7)
        return self.bias(torch.where(distance < 4, distance, far)).squeeze(-1)


def build_relative_bias():
    model = nn.ModuleDict({"bias": RelativeBias(), "map": nn.Linear(6, 6), "head": nn.Linear(6, 3)})
    batches = [(torch.randn(4, 9, 6), torch.randint(3, (4,))) for _ in range(6)]

    def loss_of(x, targets):
        weights = (model["map"](x) @ x.transpose(1, 2) + model["bias"](9)).softmax(-1)
        return F.cross_entropy(model["head"]((weights @ x).mean(1)), targets)

    return loop(model, batches, loss_of)


def build_eigenvalues():
    model = nn.Linear(6, 4)
    batches = [(torch.randn(8, 6), torch.ones(8, 1)) for _ in range(8)]
    batches[4][1][:] = 0.0

    def loss_of(x, weight):
        hidden = model(x)
        covariance = (hidden * weight).T @ hidden / weight.sum()  # <origin> eigh_refuses
        return torch.linalg.eigh(covariance)[0].square().mean()

    return loop(model, batches, loss_of)


def refused(identifier, title, source, step, module, build):
    truth = Truth(step=step, phase="forward", kind=("nan",), module=(module,), op=("div",))
    return Case(id=identifier, title=title, source=source, truth=truth, build=build)


CASES = [
    refused(
        "matcher_refuses",
        "An assignment solver, given an array, raises at a cost that is NaN",
        "https://github.com/lyuwenyu/RT-DETR/issues/527",
        4,
        "",
        build_matcher,
    ),
    refused(
        "embedding_refuses",
        "A NaN becomes an integer, which an embedding refuses",
        "https://github.com/aliutkus/torchsearchsorted/issues/26",
        4,
        "buckets",
        build_embedding,
    ),
    refused(
        "gather_refuses",
        "A NaN becomes an integer, which gather refuses",
        "https://github.com/krrish94/nerf-pytorch/issues/22",
        5,
        "buckets",
        build_gather,
    ),
    refused(
        "eigh_refuses",
        "eigh raises at a covariance of NaN",
        "https://github.com/pytorch/pytorch/issues/64818",
        4,
        "",
        build_eigenvalues,
    ),
    Case(
        id="healthy_relative_bias",
        title="The logarithm of 0 becomes an integer that torch.where leaves out",
        source="https://github.com/huggingface/candle/pull/727",
        truth=Truth(healthy=True),
        build=build_relative_bias,
    ),
]
