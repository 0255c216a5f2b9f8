"""How often the host waits for the device: counted on tensors that pretend to live on one.

Every read of such a tensor's values passes through its dispatch, so none can be missed, whatever it is called.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

import stabilitykit as sk
from stabilitykit.config import PRESETS

DEVICE = torch.device("xla", 0)  # a name that torch knows, and does not try to initialise
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item"}
TRANSFERS: list[str] = []
OURS = "/stabilitykit/"


class Remote(Tensor):
    """A tensor on a device, whose kernels happen to run on the host."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Remote:
        remote = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), dtype=inner.dtype, requires_grad=inner.requires_grad
        )
        remote.inner = inner
        return remote

    @property
    def device(self) -> torch.device:
        return DEVICE

    @property
    def is_cpu(self) -> bool:
        return False

    def cpu(self) -> Tensor:
        note_transfer("cpu")
        return self.inner

    def tolist(self) -> Any:
        note_transfer("tolist")
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in READS:
            note_transfer(name)
        args, kwargs = tree_map_only(Remote, lambda remote: remote.inner, (args, _at_home(kwargs or {})))
        return tree_map_only(Tensor, Remote, func(*args, **kwargs))


class Factories(TorchFunctionMode):
    """Makes what is asked for on the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        made = kwargs.get("device") == DEVICE and not any(isinstance(leaf, Remote) for leaf in tree_leaves(args))
        out = func(*args, **(_at_home(kwargs) if made else kwargs))
        return tree_map_only(Tensor, Remote, out) if made else out


def _at_home(kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs | {"device": torch.device("cpu")} if "device" in kwargs else kwargs


def note_transfer(name: str) -> None:
    frames = [frame for frame in traceback.extract_stack() if OURS in frame.filename]
    if frames:
        TRANSFERS.append(f"{name} at " + " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[:-4:-1]))


def on_device(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(Remote(parameter.detach().clone()))
        for name, buffer in module._buffers.items():
            module._buffers[name] = Remote(buffer.clone())
    return model


def network(num_layers: int) -> nn.Module:
    layers = [[nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()] for _ in range(num_layers)]
    return nn.Sequential(*[layer for group in layers for layer in group], nn.Linear(8, 3))


Place = Callable[[Tensor], Tensor]


def watched_run(model: nn.Module, place: Place, run_dir: Path, preset: str) -> list[list[str]]:
    """The transfers of each of eight steps, what attaching took left out."""
    config = PRESETS[preset].replace(report=False, compact=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step(inputs: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        for parameter in model.parameters():
            parameter.grad.mul_(0.5)  # as clipping does, so that gradients are measured twice
        optimizer.step()
        return loss.detach()

    batches = [(place(torch.randn(6, 8)), place(torch.randint(3, (6,)))) for _ in range(8)]
    counted = []
    with sk.attach(model, optimizer, run_dir, config=config) as monitor:
        replayable = monitor.replayable(step)
        for batch in batches:
            TRANSFERS.clear()
            replayable(*batch)
            counted.append(list(TRANSFERS))
    return counted


@pytest.fixture(autouse=True)
def factories(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tensor = torch.tensor

    def made_on_device(*args: Any, **kwargs: Any) -> Tensor:  # backward sets modes aside while it calls hooks
        return Remote(tensor(*args, **_at_home(kwargs))) if kwargs.get("device") == DEVICE else tensor(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", made_on_device)
    with Factories():
        yield


def test_a_run_on_the_device_is_recorded_as_the_same_run_on_the_host_is(tmp_path: Path) -> None:
    """The device is pretended; what is measured on it is not."""
    for place, name in ((Remote, "device"), (torch.clone, "host")):
        torch.manual_seed(0)
        model = network(2)
        watched_run(on_device(model) if place is Remote else model, place, tmp_path / name, "full")

    device, host = (sk.open_run(tmp_path / name) for name in ("device", "host"))
    assert set(device.events()["kind"]) == set()
    columns = ["name", "role", "numel", "zeros", "min", "max", "mean", "l2", "unsupported"]
    found, expected = (run.tensors()[columns] for run in (device, host))
    assert found.drop(columns=["mean", "l2"]).equals(expected.drop(columns=["mean", "l2"]))
    assert found[["mean", "l2"]].to_numpy() == pytest.approx(expected[["mean", "l2"]].to_numpy(), rel=1e-5, abs=1e-7)
    assert device.steps()["grad_norm"].tolist() == pytest.approx(host.steps()["grad_norm"].tolist())


@pytest.mark.parametrize("preset", PRESETS)
def test_a_deeper_network_takes_no_more_transfers(preset: str, tmp_path: Path) -> None:
    shallow, deep = (watched_run(on_device(network(depth)), Remote, tmp_path / str(depth), preset) for depth in (1, 6))

    assert [len(step) for step in shallow] == [len(step) for step in deep]
    assert not [entry for step in deep for entry in step if not entry.startswith(("tolist", "cpu"))]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_recorded_step_takes_few_transfers(preset: str, tmp_path: Path) -> None:
    """The sentinel's numbers, whether parameters were touched, the rows, the norm of the update."""
    steps = watched_run(on_device(network(3)), Remote, tmp_path, preset)

    assert max(map(len, steps)) <= 4, max(steps, key=len)


def test_a_step_that_is_not_recorded_takes_one_transfer_before_it_and_one_after(tmp_path: Path) -> None:
    """Whether someone wrote to a parameter must be known before the step, or its replay would start elsewhere."""
    steps = watched_run(on_device(network(3)), Remote, tmp_path, "light")

    assert [len(step) for step in steps[1:]] == [2] * 7


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda tensor: float(tensor.sum()), "_local_scalar_dense"),
        (lambda tensor: bool(tensor.any()), "_local_scalar_dense"),
        (lambda tensor: tensor[0].item(), "_local_scalar_dense"),
        (lambda tensor: torch.equal(tensor, tensor), "equal"),
        (lambda tensor: tensor.nonzero(), "nonzero"),
        (lambda tensor: tensor.cpu(), "cpu"),
        (lambda tensor: tensor.tolist(), "tolist"),
    ],
    ids=["float", "bool", "item", "equal", "nonzero", "cpu", "tolist"],
)
def test_whatever_reads_values_is_seen(
    read: Callable[[Tensor], Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.OURS", "/tests/")
    TRANSFERS.clear()

    read(Remote(torch.ones(2)))

    assert [entry.split()[0] for entry in TRANSFERS] == [name]
