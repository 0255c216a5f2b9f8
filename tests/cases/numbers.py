"""Values that go through plain Python or numpy on their way: read out of torch, made outside of it, or in the batch."""

import numpy as np
import torch
from nanzoo import Case, Loop, Truth
from torch import nn
from torch.nn import functional as F

NAN, INF = float("nan"), float("inf")


def network(outputs=3):
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, outputs))


def labelled(count):
    return [(torch.randn(6, 5), torch.randint(3, (6,))) for _ in range(count)]


def loop(model, batches, loss_of, **more):
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def train_step(batch):
        optimizer.zero_grad()
        loss = loss_of(*batch)
        loss.backward()
        optimizer.step()
        return loss

    return Loop(model, optimizer, batches, train_step, **more)


def build_temperature():
    """The last batch of an epoch holds one sample, whose deviation is read as a Python number."""
    model = network()
    batches = [(x[:1], y[:1]) if index == 5 else (x, y) for index, (x, y) in enumerate(labelled(8))]

    def loss_of(x, y):
        temperature = x.mean(1).std().item()  # <origin> number_read
        return F.cross_entropy(model(x) / temperature, y)

    return loop(model, batches, loss_of)


def build_weight():
    model = network()
    batches = [(x, y, torch.rand(6)) for x, y in labelled(8)]
    batches[5][2][:] = 0.0

    def loss_of(x, y, difficulty):
        hard = difficulty[difficulty > 0].mean()  # <origin> number_reckoned
        weight = 0.3 * float(hard) + 0.7
        return torch.tensor(weight) * F.cross_entropy(model(x), y)

    return loop(model, batches, loss_of)


def build_metric():
    """A metric over nothing is read in every step; the division that fails later has nothing to do with it."""
    model = network()
    batches = labelled(8)
    batches[5][0][2] = 0.0
    logged = []

    def loss_of(x, y):
        logged.append(x[:0].mean().item())
        logits = model(x) / x.abs().amax(1, keepdim=True)  # <origin> number_unrelated
        return F.cross_entropy(logits, y)

    return loop(model, batches, loss_of)


def build_augmented():
    """A logarithm of numpy's within the step, over a recording with a negative entry."""
    model = network()
    batches = [(x.abs() + 0.1, y) for x, y in labelled(8)]
    batches[4][0][3, 2] = -0.5

    def loss_of(x, y):
        with np.errstate(invalid="ignore"):
            logs = torch.from_numpy(np.log(x.numpy()))  # <origin> numpy_logarithm
        return F.cross_entropy(model(logs), y)

    return loop(model, batches, loss_of)


def build_round_trip():
    """A NaN of torch's goes through numpy, where an assignment is solved, and comes back."""
    model = network(1)
    batches = [(torch.randn(6, 5), torch.rand(6)) for _ in range(8)]
    batches[4][1][:] = 0.25

    def loss_of(x, y):
        scaled = (y - y.mean()) / y.std()  # <origin> numpy_round_trip
        order = np.sort(scaled.numpy())
        return F.mse_loss(model(x).squeeze(1), torch.as_tensor(order.copy()))

    return loop(model, batches, loss_of)


def build_arrays(value, convert):
    """A batch of numpy arrays, made tensors within the step."""
    model = network()
    batches = [({"x": np.float32(x.numpy()), "y": y.numpy()},) for x, y in labelled(8)]
    batches[4][0]["x"][2, 1] = value
    return loop(model, batches, lambda b: F.cross_entropy(model(convert(b["x"])), torch.as_tensor(b["y"])))


def build_array_markers():
    """Every batch has NaN where a reading is missing, and a mask of -inf made with numpy."""
    model = network()
    batches = [({"x": x.numpy(), "y": y},) for x, y in labelled(8)]
    for (batch,) in batches:
        batch["x"][1, 2] = NAN
    mask = np.array([0.0, 0.0, -np.inf], dtype="float32")

    def loss_of(batch):
        x = torch.from_numpy(batch["x"]).nan_to_num()
        return F.cross_entropy(model(x) + torch.from_numpy(mask), batch["y"] % 2)

    return loop(model, batches, loss_of)


FORWARD = {"phase": "forward", "kind": ("nan",), "module": ("",)}
ARRAYS = {
    "nan_copied": (NAN, torch.tensor),
    "inf_shared": (INF, torch.from_numpy),
    "inf_copied": (-INF, torch.tensor),
}
CASES = [
    Case(
        id="number_read",
        title="The deviation of one sample, read with item()",
        source="https://github.com/pytorch/pytorch/issues/29372",
        truth=Truth(step=5, **FORWARD, op=("std",)),
        build=build_temperature,
    ),
    Case(
        id="number_reckoned",
        title="A mean of nothing, read, reckoned with in Python and made a tensor again",
        source="https://github.com/pytorch/pytorch/issues/29372",
        truth=Truth(step=5, **FORWARD, op=("mean",)),
        build=build_weight,
    ),
    Case(
        id="number_unrelated",
        title="A division of 0 by 0 in a loop that reads a NaN metric in every step",
        source="https://github.com/mllam/neural-lam/issues/136",
        truth=Truth(step=5, phase="forward", kind=("inf", "nan"), module=("",), op=("div",)),
        build=build_metric,
    ),
    Case(
        id="numpy_logarithm",
        title="numpy's logarithm of a negative number within the step",
        source="https://github.com/NVIDIA-NeMo/Speech/issues/2246",
        truth=Truth(step=4, **FORWARD),
        build=build_augmented,
    ),
    Case(
        id="numpy_round_trip",
        title="A NaN that goes through numpy and comes back",
        source="https://github.com/KimythAnly/AGAIN-VC/issues/5",
        truth=Truth(step=4, **FORWARD, op=("div",)),
        build=build_round_trip,
    ),
    *(
        Case(
            id=f"array_{identifier}",
            title=f"A numpy array in the batch holds {arguments[0]}",
            source="https://github.com/ratschlab/DeepSpot/issues/9",
            truth=Truth(step=4, phase="data", kind=("nan" if arguments[0] != arguments[0] else "inf",), line=False),
            build=lambda arguments=arguments: build_arrays(*arguments),
        )
        for identifier, arguments in ARRAYS.items()
    ),
    Case(
        id="healthy_array_markers",
        title="numpy arrays with NaN for what is missing, and numpy's mask of -inf",
        source="https://github.com/WenjieDu/SAITS/issues/45",
        truth=Truth(healthy=True),
        build=build_array_markers,
    ),
]
