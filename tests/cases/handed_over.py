"""What a step is given and uses up, what it loads on the way, and what it raises when it looks at its loss."""

import copy
import io
import math
from collections import UserDict
from dataclasses import dataclass
from itertools import repeat

import numpy as np
import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

NAN, INF = float("nan"), float("inf")


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def labelled(count, size=8):
    return [(torch.randn(size, 6), torch.randint(3, (size,))) for _ in range(count)]


def unit(x):
    return x / x.norm(dim=1, keepdim=True)  # <origin> generator_batch loader_iterator consumed_list


def micro_batches(parts):
    yield from parts


def build_parts(hand_over, bad=True):
    """A step over micro-batches, of which one has a row of zeros in step 5."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [labelled(3, size=4) for _ in range(9)]
    if bad:
        batches[5][1][0][2] = 0.0

    def train_step(parts):
        optimizer.zero_grad()
        total = 0.0
        while parts:
            x, y = parts.pop() if isinstance(parts, list) else next(parts, (None, None))
            if x is None:
                break
            loss = F.cross_entropy(model(unit(x)), y)
            loss.backward()
            total += loss.item()
        optimizer.step()
        return total

    return Loop(model, optimizer, map(hand_over, batches), train_step)


def build_loader():
    """The step draws its batch from a loader's iterator, which is its argument in every step."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = TensorDataset(torch.randn(48, 6), torch.randint(3, (48,)))
    rows.tensors[0][21] = 0.0

    def train_step(draws):
        x, y = next(draws)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(unit(x)), y)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, repeat(iter(DataLoader(rows, batch_size=4)), 12), train_step)


def noisy(parts):
    for x, y in parts:
        yield x + 0.1 * torch.randn_like(x), y


def build_noisy():
    """Micro-batches from a generator that draws noise; dropout draws between them."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = [labelled(3, size=4) for _ in range(9)]
    batches[6][1][1].fill_(-100)

    def train_step(parts):
        optimizer.zero_grad()
        total = 0.0
        for x, y in parts:
            loss = F.cross_entropy(model(x), y)  # <origin> noisy_generator
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        return total

    return Loop(model, optimizer, map(noisy, batches), train_step)


@dataclass
class Item:
    x: torch.Tensor
    y: torch.Tensor


def build_written_back(make):
    """The step writes its standardised input back into the batch, whose row 3 is constant in step 5."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [{"x": x, "y": y} for x, y in labelled(9)]
    batches[5]["x"][3] = 1.0

    def train_step(batch):
        optimizer.zero_grad()
        entries = vars(batch) if isinstance(batch, Item) else batch
        x = entries["x"] - entries["x"].mean(1, keepdim=True)
        entries["x"] = x / x.std(1, keepdim=True)  # <origin> written_dict written_user_dict written_dataclass
        loss = F.cross_entropy(model(entries["x"]), entries["y"])
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, [make(batch) for batch in batches], train_step)


def build_load(what):
    """In step 6 the loop goes back to what it had stored in step 3, which has a NaN."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    stored = {}
    batches = [(*batch, index) for index, batch in enumerate(labelled(9))]

    def train_step(batch):
        x, y, index = batch
        if index == 3:
            stored.update(copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()}))
            stored["model"][what] = stored["model"].get(what, torch.zeros(1)) * NAN
            stored["optimizer"]["state"][4]["exp_avg"][0, 0] = NAN
        if index == 6 and what in stored["model"]:
            model.load_state_dict(stored["model"], strict=False)
            model.eval()
        if index == 6 and what == "moment":
            optimizer.load_state_dict(stored["optimizer"])
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


def build_restored():
    """After the update the best weights are put back, of which one was saved as inf."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    best = copy.deepcopy(model.state_dict())
    best["0.bias"][3] = INF
    batches = [(*batch, index == 4) for index, batch in enumerate(labelled(9))]

    def train_step(batch):
        x, y, worse = batch
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if worse:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(best[name])
        return loss

    return Loop(model, optimizer, batches, train_step)


def build_group():
    """The head joins the optimizer within the step, at a rate of 1 / 0."""
    model = network()
    optimizer = torch.optim.NAdam(model[0].parameters(), lr=1e-3)
    batches = [(*batch, index == 4) for index, batch in enumerate(labelled(9))]

    def train_step(batch):
        x, y, thaw = batch
        if thaw:
            optimizer.add_param_group({"params": model[2].parameters(), "lr": INF})
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()  # <origin> group_added
        return loss

    return Loop(model, optimizer, batches, train_step)


def build_teacher():
    """A teacher outside the model, loaded between two steps from a checkpoint with an inf."""
    model = network()
    teacher = network().requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def batches():
        for index, batch in enumerate(labelled(8)):
            if index == 5:
                teacher[2].weight[1, 1] = INF
            yield batch

    def train_step(batch):
        x, y = batch
        optimizer.zero_grad()
        with torch.no_grad():
            target = teacher(x)
        loss = F.cross_entropy(model(x), y) + F.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches(), train_step, stateful=[teacher])


class Trainer:
    """All that a run needs, the data set as well."""

    def __init__(self):
        self.model, self.rows, self.at = network(), labelled(9), 0
        self.rows[5][0][1, 1] = NAN

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def build_trainer():
    """The trainer itself is the step's argument; one of its rows has a NaN, and is used in step 5 only."""
    trainer = Trainer()
    optimizer = torch.optim.Adam(trainer.model.parameters(), lr=1e-3)

    def train_step(trainer):
        x, y = trainer.rows[trainer.at]
        trainer.at += 1
        optimizer.zero_grad()
        loss = F.cross_entropy(trainer.model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(trainer.model, optimizer, repeat(trainer, 9), train_step, stateful=[trainer])


class Diverged(Exception):
    """The user's own: neither a ValueError nor an ArithmeticError."""


def look(kind, model, x, loss):
    """Whether the loss is bad, as training loops ask it, and what they print before they raise."""
    if kind == "number" and not math.isfinite(loss.item()):
        raise Diverged(f"loss is {loss.item()}")
    if kind == "plain" and not math.isfinite(loss.item()):
        raise Exception("Loss is NaN, stopping training")
    if kind == "norms" and torch.isnan(loss) | torch.isinf(loss):
        norms = [
            f"{name} {entry.norm().item():.3f} {entry.abs().max():.3f}" for name, entry in model.named_parameters()
        ]
        raise Diverged(f"non-finite loss; {norms}")
    if kind == "saved" and not math.isfinite(float(loss)):
        torch.save({"x": x, "state": model.state_dict()}, io.BytesIO())
        raise Diverged("the batch was saved")
    if kind == "numpy" and not np.isfinite(loss.detach().numpy()):
        raise Diverged("non-finite loss")
    if kind == "bounds" and not (-1e6 < loss < 1e6):
        raise Diverged("out of bounds")


def build_raises(kind):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = [(*batch, torch.rand(8) + 0.1) for batch in labelled(9)]
    batches[6][2][4] = 0.0

    def train_step(batch):
        x, y, weights = batch
        optimizer.zero_grad()
        each = F.cross_entropy(model(x), y, reduction="none")
        logs = weights.log()  # <origin> raises_number raises_plain raises_norms raises_saved raises_numpy raises_bounds
        loss = (each * logs).mean()
        look(kind, model, x, loss)
        loss.backward()
        optimizer.step()
        return loss.item()

    return Loop(model, optimizer, batches, train_step)


MEGATRON = "https://github.com/NVIDIA/Megatron-LM/issues/6253"
RESUMED = "https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1382"
WRITTEN = "https://github.com/pytorch/pytorch/issues/40497"
DIVISION = {"step": 5, "phase": "forward", "kind": ("nan",), "module": ("",), "op": ("div",)}
CASES = [
    Case(
        id="generator_batch",
        title="The batch is a generator of micro-batches",
        source=MEGATRON,
        truth=Truth(**DIVISION),
        build=lambda: build_parts(micro_batches),
    ),
    Case(
        id="consumed_list",
        title="The step pops its micro-batches off the list that it is given",
        source=MEGATRON,
        truth=Truth(**DIVISION),
        build=lambda: build_parts(list),
    ),
    Case(
        id="healthy_generator_batch",
        title="Generators of good micro-batches",
        source=MEGATRON,
        truth=Truth(healthy=True),
        build=lambda: build_parts(micro_batches, bad=False),
    ),
    Case(
        id="loader_iterator",
        title="The step draws from a loader's iterator, the same in every step",
        source=MEGATRON,
        truth=Truth(**DIVISION),
        build=build_loader,
    ),
    Case(
        id="noisy_generator",
        title="A generator draws noise while the step draws dropout; one micro-batch has no labels",
        source=MEGATRON,
        truth=Truth(step=6, phase="forward", kind=("nan",), op=("nll_loss_forward", "cross_entropy_loss")),
        build=build_noisy,
    ),
    *(
        Case(
            id=f"written_{name}",
            title=f"The step writes its standardised input back into its batch, a {name}",
            source=WRITTEN,
            truth=Truth(**DIVISION),
            build=lambda make=make: build_written_back(make),
        )
        for name, make in (("dict", dict), ("user_dict", UserDict), ("dataclass", lambda batch: Item(**batch)))
    ),
    *(
        Case(
            id=f"loaded_{phase}",
            title=f"A checkpoint that is loaded within the step is bad: {what}",
            source=RESUMED,
            truth=Truth(step=6, phase=phase, kind=("nan",), tensor=(tensor,), line=False),
            build=lambda what=what: build_load(what),
        )
        for phase, what, tensor in (
            ("weights", "3.weight", "3.weight"),
            ("state", "1.running_var", "1.running_var"),
            ("optimizer", "moment", "3.weight"),
        )
    ),
    Case(
        id="best_restored",
        title="Best weights with an inf are put back after the update",
        source=RESUMED,
        truth=Truth(step=4, phase="weights", kind=("inf",), tensor=("0.bias",), line=False),
        build=build_restored,
    ),
    Case(
        id="group_added",
        title="A parameter group joins within the step, its learning rate inf",
        source="https://github.com/VainF/DeepLabV3Plus-Pytorch/issues/59",
        truth=Truth(step=4, phase="optimizer", kind=("inf", "nan"), op=("addcdiv",), tensor=("2.weight", "2.bias")),
        build=build_group,
    ),
    Case(
        id="teacher_loaded",
        title="A teacher that is no part of the model has a weight of inf",
        source=RESUMED,
        truth=Truth(step=5, phase="weights", kind=("inf",), line=False),
        build=build_teacher,
    ),
    Case(
        id="trainer_handed_over",
        title="The argument holds the data set, with a row that has a NaN, from the start",
        source=WRITTEN,
        truth=Truth(step=5, phase="data", kind=("nan",), line=False),
        build=build_trainer,
    ),
    *(
        Case(
            id=f"raises_{kind}",
            title=f"The loop looks at its loss and raises: {kind}",
            source="https://github.com/facebookresearch/habitat-lab/issues/2226",
            truth=Truth(step=6, phase="forward", kind=("inf",), module=("",), op=("log",)),
            build=lambda kind=kind: build_raises(kind),
        )
        for kind in ("number", "plain", "norms", "saved", "numpy", "bounds")
    ),
]
