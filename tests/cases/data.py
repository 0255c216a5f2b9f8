"""What the batch, the replay buffer or the parameters already hold when the step begins."""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

NAN, INF = float("nan"), float("inf")


def network(outputs=1):
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, outputs))


def loop(model, batches, loss_of, **more):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train_step(batch):
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step, **more)


def plain(count):
    return [(torch.randn(6, 5), torch.rand(6)) for _ in range(count)]


def build_targets():
    model, batches = network(), plain(8)
    batches[5][1][2] = NAN
    return loop(model, batches, lambda batch: F.mse_loss(model(batch[0]).squeeze(1), batch[1]))


def build_first_step():
    """The very first batch."""
    model, batches = network(), plain(4)
    batches[0][0][3, 1] = NAN
    return loop(model, batches, lambda batch: F.mse_loss(model(batch[0]).squeeze(1), batch[1]))


def build_late():
    """After 180 good steps."""
    model, batches = network(), plain(190)
    batches[180][0][3, 1] = INF
    return loop(model, batches, lambda batch: F.l1_loss(model(batch[0]).squeeze(1), batch[1]))


def build_weights_of_samples():
    """A dict with a weight for every sample; one of them is NaN."""
    model = network()
    batches = [{"x": x, "y": y, "weight": torch.rand(6), "ids": list(range(6))} for x, y in plain(8)]
    batches[6]["weight"][0] = NAN

    def loss_of(batch):
        each = F.mse_loss(model(batch["x"]).squeeze(1), batch["y"], reduction="none")
        return (each * batch["weight"]).mean()

    return loop(model, batches, loss_of)


@dataclasses.dataclass
class Sample:
    features: torch.Tensor
    targets: torch.Tensor
    name: str = ""


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def build_dataclass():
    model = network()
    batches = [Sample(*entry, name=f"batch {index}") for index, entry in enumerate(plain(8))]
    batches[4].features[1, 1] = INF

    def loss_of(batch):
        return F.mse_loss(model(batch.features).squeeze(1), batch.targets)

    return loop(model, batches, loss_of)


def build_named_tuple():
    """Nested: a named tuple in a list in a dict."""
    model = network()
    batches = [{"pairs": [Pair(*plain(1)[0]), Pair(*plain(1)[0])]} for _ in range(8)]
    batches[4]["pairs"][1].left[2] = NAN

    def loss_of(batch):
        return sum(F.mse_loss(model(pair.left).squeeze(1), pair.right) for pair in batch["pairs"])

    return loop(model, batches, loss_of)


class Table(Dataset):
    """Rows of a float64 table, as pandas gives them."""

    def __init__(self):
        generator = np.random.default_rng(3)
        self.values = generator.normal(size=(48, 6))
        self.values[29, 2] = np.nan

    def __len__(self):
        return len(self.values)

    def __getitem__(self, row):
        return self.values[row, :5], self.values[row, 5]


def build_table():
    model = network()
    batches = DataLoader(Table(), batch_size=6)
    return loop(model, batches, lambda batch: F.mse_loss(model(batch[0].float()).squeeze(1), batch[1].float()))


def build_numpy():
    """The batch is numpy and becomes a tensor inside the step, by way of float64."""
    model = network()
    batches = [{"x": x.double().numpy(), "y": y.double().numpy()} for x, y in plain(8)]
    batches[3]["x"][2, 0] = np.nan

    def loss_of(batch):
        features = torch.from_numpy(batch["x"]).to(torch.float32)
        return F.mse_loss(model(features).squeeze(1), torch.as_tensor(batch["y"], dtype=torch.float32))

    return loop(model, batches, loss_of)


def build_lists():
    """Python lists of numbers, made into a tensor inside the step."""
    model = network()
    batches = [(x, y.tolist()) for x, y in plain(8)]
    batches[5][1][1] = NAN

    def loss_of(batch):
        return F.smooth_l1_loss(model(batch[0]).squeeze(1), torch.tensor(batch[1]))

    return loop(model, batches, loss_of)


def build_number():
    """The weight of the batch is one Python number."""
    model = network()
    batches = [{"x": x, "y": y, "weight": 1.0} for x, y in plain(8)]
    batches[5]["weight"] = INF

    def loss_of(batch):
        return batch["weight"] * F.mse_loss(model(batch["x"]).squeeze(1), batch["y"])

    return loop(model, batches, loss_of)


def build_marker_then_real(bad):
    """Missing targets are NaN in every batch and masked; in one batch an input is NaN as well, and is not."""
    model, batches = network(), plain(9)
    for _, y in batches:
        y[::3] = NAN
    if bad:
        batches[6][0][4, 4] = NAN

    def loss_of(batch):
        features, targets = batch
        known = ~targets.isnan()
        return F.mse_loss(model(features).squeeze(1)[known], targets[known])

    return loop(model, batches, loss_of)


def build_known(loss_of_errors, guarded):
    """Unknown targets are NaN in every batch; in one batch no target is known."""
    model, batches = network(), plain(9)
    for index, (_, y) in enumerate(batches):
        y[torch.rand(6) < 0.3] = NAN
        y[0] = 0.5
        if index == 6:
            y.fill_(NAN)

    def loss_of(batch):
        features, targets = batch
        known = targets.isfinite()
        if guarded:
            errors = model(features).squeeze(1) - torch.nan_to_num(targets)
            return torch.where(known, errors.square(), 0.0).nansum() / known.sum().clamp(min=1)
        return loss_of_errors(model(features).squeeze(1) - targets, known)

    return loop(model, batches, loss_of)


def mean_of_known(errors, known):
    return errors[known].square().mean()  # <origin> mean_of_nothing


def nanmean(errors, _known):
    return errors.square().nanmean()


def writes_between(batches, at, write):
    """The batches, with `write()` called just before batch `at` is handed over."""
    for index, batch in enumerate(batches):
        if index == at:
            write()
        yield batch


def build_weight_written(through_data):
    """Somebody reloads a broken layer between two steps."""
    model = network()

    def write():
        if through_data:
            model[3].weight.data[0, 2] = NAN
        else:
            broken = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            broken["3.weight"][0, 2] = NAN
            model.load_state_dict(broken)

    batches = writes_between(plain(12), 7, write)
    return loop(model, batches, lambda batch: F.mse_loss(model(batch[0]).squeeze(1), batch[1]))


def build_weight_unused():
    """A weight that no step uses is NaN from the start: an expert that is never chosen. It reaches nothing."""
    model = nn.ModuleDict({"used": network(), "spare": nn.Linear(5, 1)})
    with torch.no_grad():
        model["spare"].weight.fill_(NAN)
    optimizer = torch.optim.SGD(model["used"].parameters(), lr=0.01)
    batches = plain(6)

    def train_step(batch):
        optimizer.zero_grad()
        loss = F.mse_loss(model["used"](batch[0]).squeeze(1), batch[1])
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step)


class Memory:
    """A replay buffer with a generator of its own."""

    def __init__(self, rows):
        self.examples, self.labels = torch.randn(rows, 5), torch.randint(3, (rows,))
        self.logits = torch.randn(rows, 3)
        self.generator = torch.Generator().manual_seed(2)

    def draw(self, count):
        return torch.randint(len(self.labels), (count,), generator=self.generator)

    def state_dict(self):
        tensors = {name: getattr(self, name).clone() for name in ("examples", "labels", "logits")}
        return {**tensors, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        for name in ("examples", "labels", "logits"):
            getattr(self, name).copy_(state[name])
        self.generator.set_state(state["generator"])


def replaying(model, memory, draw, tensors):
    def loss_of(batch):
        features, targets = batch
        slots = draw()
        loss = F.cross_entropy(model(features), targets)
        again = model(tensors("examples")[slots])
        loss = loss + 0.5 * F.mse_loss(again, tensors("logits")[slots])
        return loss + 0.5 * F.cross_entropy(again, tensors("labels").index_select(0, slots))

    return loss_of


def build_slot_poisoned(through_numpy):
    """Between two steps a slot of the buffer is overwritten with NaN; it is drawn at once, since all slots are."""
    model, memory = network(3), Memory(16)

    def write():
        if through_numpy:
            memory.examples.numpy()[5, 1] = np.nan  # behind torch's back: no version counter moves
        else:
            memory.examples[5, 1] = NAN

    batches = writes_between([(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(12)], 8, write)
    draw = lambda: torch.randperm(16, generator=memory.generator)  # noqa: E731
    loss_of = replaying(model, memory, draw, lambda name: getattr(memory, name))
    return loop(model, batches, loss_of, stateful=[memory], replay_buffer=memory)


def build_slot_dict():
    """The buffer is a plain dict."""
    model = network(3)
    memory = {"examples": torch.randn(12, 5), "labels": torch.randint(3, (12,)), "logits": torch.randn(12, 3)}
    memory["logits"][7, 1] = INF
    generator = torch.Generator().manual_seed(4)
    batches = [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(20)]
    draw = lambda: torch.randint(12, (2,), generator=generator)  # noqa: E731
    loss_of = replaying(model, memory, draw, memory.__getitem__)
    return loop(model, batches, loss_of, stateful=[generator], replay_buffer=memory)


def build_slot_stored():
    """An output over a temperature of 0 is stored in one step; the next step draws it, and only there it does harm."""
    model, memory = network(3), Memory(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batches = [(torch.randn(6, 5), torch.randint(3, (6,)), 1.0 if index != 5 else 0.0) for index in range(12)]

    def train_step(batch):
        features, targets, temperature = batch
        optimizer.zero_grad()
        outputs = model(features)
        slots = memory.draw(8)
        loss = F.cross_entropy(outputs, targets) + F.mse_loss(model(memory.examples[slots]), memory.logits[slots])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            memory.logits.copy_((outputs / temperature)[:1].expand(8, 3))
        return loss

    return Loop(model, optimizer, batches, train_step, stateful=[memory], replay_buffer=memory)


def build_unused_slot():
    """A slot that is never drawn is NaN: an event at most."""
    model, memory = network(3), Memory(16)
    memory.logits[9] = NAN
    batches = [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(10)]
    draw = lambda: torch.randint(9, (4,), generator=memory.generator)  # noqa: E731
    loss_of = replaying(model, memory, draw, lambda name: getattr(memory, name))
    return loop(model, batches, loss_of, stateful=[memory], replay_buffer=memory)


def data(identifier, title, step, kind, build, source="https://github.com/ratschlab/DeepSpot/issues/9"):
    truth = Truth(step=step, phase="data", kind=(kind,), line=False)
    return Case(id=identifier, title=title, source=source, truth=truth, build=build)


def weights(identifier, title, build):
    source = "https://github.com/huggingface/transformers/issues/30953"
    truth = Truth(step=7, phase="weights", kind=("nan",), tensor=("3.weight",), line=False)
    return Case(id=identifier, title=title, source=source, truth=truth, build=build)


def replay(identifier, title, step, kind, build):
    source = "https://github.com/MorvanZhou/Reinforcement-learning-with-tensorflow/issues/54"
    truth = Truth(step=step, phase="buffer", kind=(kind,), line=False)
    return Case(id=identifier, title=title, source=source, truth=truth, build=build)


MISSING = "https://github.com/torchgeo/torchgeo/issues/3760"
CASES = [
    data("nan_target", "A regression target that is NaN", 5, "nan", build_targets, MISSING),
    data("nan_first_batch", "A NaN in the very first batch", 0, "nan", build_first_step),
    data("inf_after_180_steps", "An inf after 180 good steps", 180, "inf", build_late),
    data("nan_sample_weight", "A sample weight that is NaN, in a dict", 6, "nan", build_weights_of_samples),
    data("inf_in_dataclass", "An inf in a batch that is a dataclass", 4, "inf", build_dataclass),
    data("nan_in_nested_batch", "A NaN in a named tuple in a list in a dict", 4, "nan", build_named_tuple),
    data("nan_in_float64_table", "A NaN in a float64 table", 4, "nan", build_table),
    data("nan_in_numpy_batch", "A NaN in a numpy batch, made a tensor within the step", 3, "nan", build_numpy),
    data("nan_in_list_batch", "A NaN in a list of numbers, made a tensor within the step", 5, "nan", build_lists),
    data("inf_number_in_batch", "The batch's weight, a Python number, is inf", 5, "inf", build_number),
    data(
        "nan_beside_markers",
        "NaN marks missing targets in every batch; one batch has a NaN among its inputs",
        6,
        "nan",
        lambda: build_marker_then_real(bad=True),
        MISSING,
    ),
    Case(
        id="healthy_nan_markers",
        title="NaN marks missing targets, which are left out",
        source="https://github.com/janelia-cellmap/cellmap-segmentation-challenge/issues/162",
        truth=Truth(healthy=True),
        build=lambda: build_marker_then_real(bad=False),
    ),
    data(
        "nanmean_gradient",
        "nanmean leaves NaN targets out of the loss, but not out of its gradient: 0 * NaN",
        0,
        "nan",
        lambda: build_known(nanmean, guarded=False),
        MISSING,
    ),
    Case(
        id="mean_of_nothing",
        title="The mean over the known targets of a batch in which none is known",
        source=MISSING,
        truth=Truth(step=6, phase="forward", kind=("nan",), module=("",), op=("mean",)),
        build=lambda: build_known(mean_of_known, guarded=False),
    ),
    Case(
        id="healthy_nansum",
        title="nan_to_num, where and nansum over targets with NaN",
        source=MISSING,
        truth=Truth(healthy=True),
        build=lambda: build_known(mean_of_known, guarded=True),
    ),
    weights("weight_loaded", "A broken state dict is loaded between two steps", lambda: build_weight_written(False)),
    weights("weight_through_data", "A weight is written through .data", lambda: build_weight_written(True)),
    Case(
        id="healthy_unused_weight",
        title="A parameter that is NaN and never used",
        source="https://github.com/huggingface/transformers/issues/30953",
        truth=Truth(healthy=True),
        build=build_weight_unused,
    ),
    replay(
        "slot_poisoned", "A replay slot is overwritten between two steps", 8, "nan", lambda: build_slot_poisoned(False)
    ),
    replay(
        "slot_through_numpy",
        "A replay slot is overwritten through its numpy view",
        8,
        "nan",
        lambda: build_slot_poisoned(True),
    ),
    replay("slot_in_dict", "A replay buffer that is a dict", 1, "inf", build_slot_dict),
    replay("slot_stored", "A bad value is stored in one step and drawn in the next", 6, "inf", build_slot_stored),
    Case(
        id="healthy_unused_slot",
        title="A replay slot that is NaN and never drawn",
        source="https://github.com/MorvanZhou/Reinforcement-learning-with-tensorflow/issues/54",
        truth=Truth(healthy=True),
        build=build_unused_slot,
    ),
]
