"""Several backwards before one update: within a step, and over several steps."""

import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.nn.functional import cross_entropy


class Distance(nn.Module):
    def forward(self, left, right):
        return (left - right).square().sum(dim=1).sqrt()  # <origin>


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.distance = Distance()

    def forward(self, left, right):
        return self.distance(self.embed(left), self.embed(right))


def pairs(count, bad=None):
    batches = [(torch.randn(4, 6), torch.randn(4, 6)) for _ in range(count)]
    if bad is not None:
        batches[bad][1][2] = batches[bad][0][2]
    return batches


def build_within():
    model = Siamese()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    parts = pairs(32, 22)  # step 5, its third part
    batches = [parts[first : first + 4] for first in range(0, 32, 4)]

    def train_step(batch):
        optimizer.zero_grad()
        total = 0.0
        for left, right in batch:
            loss = model(left, right).mean() / len(batch)
            loss.backward()
            total += loss.item()
        optimizer.step()
        return total

    return Loop(model, optimizer, batches, train_step)


def build_over_steps(bad):
    """zero_grad and the update come every fourth call; the bad micro-batch is in between."""
    model = Siamese()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [(index, *pair) for index, pair in enumerate(pairs(14, bad))]

    def train_step(batch):
        index, left, right = batch
        loss = model(left, right).mean() / 4
        loss.backward()
        if index % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return Loop(model, optimizer, batches, train_step)


def build_clipped_over_steps():
    """The same with a clip before the update, and momentum."""
    model = Siamese()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batches = [(index, *pair) for index, pair in enumerate(pairs(14, 8))]

    def train_step(batch):
        index, left, right = batch
        if index % 4 == 0:
            optimizer.zero_grad(set_to_none=False)
        loss = model(left, right).mean() / 4
        loss.backward()
        if index % 4 == 3:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return {"loss": loss}

    return Loop(model, optimizer, batches, train_step)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x):
        hidden = self.body(x).relu()
        return self.one(hidden), self.two(hidden).squeeze(1)


def build_discarded():
    """Bad micro-batches are found by hand and their gradients thrown away: no fault."""
    model = Siamese()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [(index, *pair) for index, pair in enumerate(pairs(14, 6))]

    def train_step(batch):
        index, left, right = batch
        loss = model(left, right).mean() / 4
        loss.backward()
        if not all(parameter.grad.isfinite().all() for parameter in model.parameters()):
            optimizer.zero_grad()
        if index % 4 == 3 and model.embed[0].weight.grad is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return Loop(model, optimizer, batches, train_step)


def build_scaled():
    """A GradScaler that skips, over accumulated steps, and that nobody told the tool about: no fault."""
    model = Shared()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=4)
    batches = [(index, torch.randn(8, 6), torch.randint(3, (8,))) for index in range(24)]

    def train_step(batch):
        index, inputs, targets = batch
        with torch.autocast("cpu", dtype=torch.float16):
            logits, extra = model(inputs)
        loss = cross_entropy(logits.float(), targets) + extra.float().square().mean()
        scaler.scale(loss / 2).backward()
        if index % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return loss.detach()

    return Loop(model, optimizer, batches, train_step)


def build_two_losses():
    """Two backwards over one graph; no fault."""
    model = Shared()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(8)]

    def train_step(batch):
        inputs, targets = batch
        optimizer.zero_grad()
        logits, extra = model(inputs)
        first, second = cross_entropy(logits, targets), extra.square().mean()
        first.backward(retain_graph=True)
        kept = [parameter.grad.clone() for parameter in model.body.parameters()]
        second.backward()
        for parameter, gradient in zip(model.body.parameters(), kept, strict=True):
            parameter.grad = 0.5 * (parameter.grad + gradient)
        optimizer.step()
        return first, second

    return Loop(model, optimizer, batches, train_step)


ACCUMULATED = "https://github.com/espnet/espnet/pull/3283"
BACKWARD = {"phase": "backward", "kind": ("inf",), "module": ("distance",), "op": ("sqrt",)}


def build_hidden_micro_batch():
    """The second of three micro-batches holds one sample: its loss is NaN, the scaler skips, the last loss is fine."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    sizes = [(6, 1 if index == 5 else 6, 6) for index in range(8)]
    batches = [[(torch.randn(size, 5), torch.randint(3, (size,))) for size in step] for step in sizes]

    def train_step(batch):
        optimizer.zero_grad()
        for features, targets in batch:
            rewards = targets.float()
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)  # <origin> hidden_micro_batch
            losses = nn.functional.cross_entropy(model(features), targets, reduction="none")
            loss = (advantages * losses).mean() / len(batch)
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    return Loop(model, optimizer, batches, train_step, stateful=[scaler])


def build_growing_scale(half_loss):
    """The scale is raised every third step until a gradient, or the scaled loss itself, is too large for float16."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3, growth_factor=16.0)
    batches = [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(20)]

    def train_step(batch):
        features, targets = batch
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(features)
        loss = nn.functional.cross_entropy(logits.float(), targets)
        scaler.scale(loss.half() if half_loss else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    return Loop(model, optimizer, batches, train_step, stateful=[scaler])


CASES = [
    Case(
        id="hidden_micro_batch",
        title="A NaN loss in a micro-batch before the last, hidden by a GradScaler",
        source="https://github.com/lpiccinelli-eth/UniK3D/issues/16",
        truth=Truth(step=5, phase="forward", kind=("nan",), module=("",), op=("std",)),
        build=build_hidden_micro_batch,
    ),
    *(
        Case(
            id=f"healthy_growing_scale_{name}",
            title=f"A GradScaler that had settled raises its scale too far: {name}",
            source="https://github.com/NoamRosenberg/autodeeplab/issues/12",
            truth=Truth(healthy=True),
            build=build,
        )
        for name, build in (
            ("gradient", lambda: build_growing_scale(half_loss=False)),
            ("loss", lambda: build_growing_scale(half_loss=True)),
        )
    ),
    Case(
        id="accumulate_within_a_step",
        title="Four micro-batches in one step, the third makes the gradient infinite",
        source="https://github.com/unslothai/unsloth/issues/3129",
        truth=Truth(step=5, **BACKWARD),
        build=build_within,
    ),
    Case(
        id="accumulate_over_steps",
        title="The optimizer steps every fourth call; the second call after an update made the bad gradient",
        source=ACCUMULATED,
        truth=Truth(step=5, **BACKWARD),
        build=lambda: build_over_steps(5),
    ),
    Case(
        id="accumulate_last_micro_step",
        title="The same, in the call that also updates",
        source=ACCUMULATED,
        truth=Truth(step=7, **BACKWARD),
        build=lambda: build_over_steps(7),
    ),
    Case(
        id="accumulate_then_clip",
        title="A bad micro-batch three calls before clip and update",
        source="https://github.com/NVIDIA-NeMo/Speech/issues/11272",
        truth=Truth(step=8, **BACKWARD),
        build=build_clipped_over_steps,
    ),
    Case(
        id="healthy_discarded_micro_batch",
        title="A micro-batch with infinite gradients is thrown away before any update",
        source=ACCUMULATED,
        truth=Truth(healthy=True),
        build=build_discarded,
    ),
    Case(
        id="healthy_untold_scaler",
        title="A GradScaler that the tool is not told of skips steps over accumulated gradients",
        source="https://github.com/pytorch/pytorch/issues/40497",
        truth=Truth(healthy=True),
        build=build_scaled,
    ),
    Case(
        id="healthy_two_backwards",
        title="Two backwards over one graph, gradients put together by hand",
        source="https://github.com/WeiChengTseng/Pytorch-PCGrad/issues/7",
        truth=Truth(healthy=True),
        build=build_two_losses,
    ),
]
