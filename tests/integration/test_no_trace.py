"""A run that is watched is bit for bit the run that is not, and nothing remains when the monitor is closed."""

from __future__ import annotations

import gc
import math
import random
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

import stabilitykit as sk
from stabilitykit.config import PRESETS

Batch = tuple[Tensor, Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo's own


class Workload:
    """A small training: a model, its optimizer, batches and what one step is."""

    scaler: Any = None
    num_classes = 3

    def __init__(self) -> None:
        self.model = self.network()
        self.optimizer: Optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.also: tuple[Optimizer, ...] = ()
        self.batches = [(self.inputs(), torch.randint(self.num_classes, (6,))) for _ in range(4)]

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))

    def inputs(self) -> Tensor:
        return torch.randn(6, 8)

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def step(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        return loss.detach()


class Convolutions(Workload):
    """BatchNorm, dropout, in-place activations."""

    def network(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.2),
            nn.Flatten(),
            nn.Linear(4 * 36, 16),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(16, 3),
        )

    def inputs(self) -> Tensor:
        return torch.randn(6, 1, 8, 8)


class Transformer(Workload):
    """Multi-head attention with a padding mask, layer norms, dropout; Adam."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def network(self) -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.1, batch_first=True)
        return nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2), "head": nn.Linear(8, 3)})

    def inputs(self) -> Tensor:
        return torch.randn(6, 5, 8)

    def loss(self, batch: Batch) -> Tensor:
        padding = torch.zeros(6, 5, dtype=torch.bool)
        padding[:, -1] = True
        hidden = self.model["encoder"](batch[0], src_key_padding_mask=padding)
        return nn.functional.cross_entropy(self.model["head"](hidden[:, 0]), batch[1])


class Recurrent(Workload):
    """A GRU returns a tuple, and its cell's weights are flattened."""

    def network(self) -> nn.Module:
        return nn.ModuleDict({"gru": nn.GRU(4, 8, num_layers=2, dropout=0.3), "head": nn.Linear(8, 3)})

    def inputs(self) -> Tensor:
        return torch.randn(5, 6, 4)

    def loss(self, batch: Batch) -> Tensor:
        outputs, _ = self.model["gru"](batch[0])
        return nn.functional.cross_entropy(self.model["head"](outputs[-1]), batch[1])


class Checkpointed(Convolutions):
    """Activation checkpointing runs the first half twice."""

    def loss(self, batch: Batch) -> Tensor:
        hidden = checkpoint(self.model[:4], batch[0], use_reentrant=False)
        return nn.functional.cross_entropy(self.model[4:](hidden), batch[1])


class CheckpointedReentrant(Workload):
    """The older way: the first run keeps no graph at all, the second runs inside backward."""

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(16, 3))

    def loss(self, batch: Batch) -> Tensor:
        hidden = checkpoint(self.model[:3], batch[0].clone().requires_grad_(), use_reentrant=True)
        return nn.functional.cross_entropy(self.model[3:](hidden), batch[1])


class SparseEmbeddings(Workload):
    """Gradients that are sparse tensors, and the optimizer that takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.SparseAdam([self.model["table"].weight], lr=0.05)
        self.also = (torch.optim.SGD(self.model["head"].parameters(), lr=0.05),)

    def network(self) -> nn.Module:
        return nn.ModuleDict({"table": nn.EmbeddingBag(20, 8, mode="sum", sparse=True), "head": nn.Linear(8, 3)})

    def inputs(self) -> Tensor:
        return torch.randint(20, (6, 4))

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.model["head"](self.model["table"](batch[0])), batch[1])

    def step(self, batch: Batch) -> Tensor:
        for optimizer in (self.optimizer, *self.also):
            optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        for optimizer in (self.optimizer, *self.also):
            optimizer.step()
        return loss.detach()


class Adversarial(Workload):
    """A generator and a discriminator, an optimizer and a backward each."""

    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.Adam(self.model["discriminator"].parameters(), lr=1e-3)
        self.also = (torch.optim.Adam(self.model["generator"].parameters(), lr=1e-3),)

    def network(self) -> nn.Module:
        generator = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(inplace=True), nn.Linear(16, 8))
        discriminator = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(16, 1))
        return nn.ModuleDict({"generator": generator, "discriminator": discriminator})

    def judged(self, samples: Tensor, real: float) -> Tensor:
        logits = self.model["discriminator"](samples).flatten()
        return nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, real))

    def step(self, batch: Batch) -> Tensor:
        forged = self.model["generator"](torch.randn(6, 4))
        self.optimizer.zero_grad()
        loss = self.judged(batch[0], 1.0) + self.judged(forged.detach(), 0.0)
        loss.backward()
        self.optimizer.step()
        (optimizer,) = self.also
        optimizer.zero_grad()
        self.judged(forged, 1.0).backward()
        optimizer.step()
        return loss.detach()


class Shared(Workload):
    """One module in two places and called three times, one weight under two names."""

    def network(self) -> nn.Module:
        layer = nn.Linear(8, 8)
        tied = nn.Linear(8, 8, bias=False)
        tied.weight = layer.weight
        return nn.ModuleDict({"first": layer, "again": layer, "tied": tied, "head": nn.Linear(8, 3)})

    def loss(self, batch: Batch) -> Tensor:
        hidden = batch[0]
        for name in ("first", "again", "first", "tied"):
            hidden = torch.tanh(self.model[name](hidden))
        return nn.functional.cross_entropy(self.model["head"](hidden), batch[1])


class Compiled(Convolutions):
    """A compiled model; traced once, with autograd, but run by torch's own kernels."""

    backend = "aot_eager"

    def __init__(self) -> None:
        super().__init__()
        torch.compiler.reset()
        self.compiled = torch.compile(self.model, backend=self.backend)

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.compiled(batch[0]), batch[1])


class CompiledStep(Convolutions):
    """The whole step handed to the compiler, which then meets every hook that runs within it."""

    def __init__(self) -> None:
        super().__init__()
        torch.compiler.reset()
        self.compiled_step = torch.compile(super().step, backend="aot_eager")

    def step(self, batch: Batch) -> Tensor:
        return self.compiled_step(batch)


class CompiledByInductor(Compiled):
    """Compiled to C++."""

    backend = "inductor"


class Accumulated(Convolutions):
    """Several backwards a step."""

    def step(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad()
        losses = [self.loss((batch[0][rows], batch[1][rows])) for rows in (slice(0, 3), slice(3, 6))]
        for loss in losses:
            (loss / 2).backward()
        self.optimizer.step()
        return torch.stack(losses).mean().detach()


class Autocast(Convolutions):
    """The forward in bfloat16."""

    def loss(self, batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().loss(batch)


class Scaled(Workload):
    """A GradScaler, which the CPU has as well, whose first scale overflows: it skips steps and halves the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    def step(self, batch: Batch) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(batch) * 100
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


WORKLOADS: Mapping[str, type[Workload]] = {
    "mlp": Workload,
    "convolutions": Convolutions,
    "transformer": Transformer,
    "recurrent": Recurrent,
    "checkpointed": Checkpointed,
    "checkpointed reentrant": CheckpointedReentrant,
    "sparse embeddings": SparseEmbeddings,
    "adversarial": Adversarial,
    "shared": Shared,
    "compiled": Compiled,
    "compiled step": CompiledStep,
    "accumulated": Accumulated,
    "autocast": Autocast,
    "scaled": Scaled,
}


def build(kind: type[Workload]) -> Workload:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    return kind()


def outcome(workload: Workload, losses: list[Tensor]) -> dict[str, Any]:
    """Everything a run leaves, in a form that `==` compares to the bit."""
    optimizers = [optimizer.state_dict()["state"] for optimizer in (workload.optimizer, *workload.also)]
    state = workload.model.state_dict()
    return {
        "losses": [bits(loss) for loss in losses],
        "keys": list(state),
        "state": [bits(tensor) for tensor in state.values()],
        "gradients": [None if p.grad is None else bits(p.grad) for p in workload.model.parameters()],
        "optimizer": [
            {name: {key: bits(torch.as_tensor(value)) for key, value in held.items()} for name, held in states.items()}
            for states in optimizers
        ],
        "scale": workload.scaler and workload.scaler.state_dict(),
        "modes": [module.training for module in workload.model.modules()],
        "trained": [parameter.requires_grad for parameter in workload.model.parameters()],
        "torch": bits(torch.get_rng_state()),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tobytes(),  # noqa: NPY002
    }


def bits(tensor: Tensor) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), tensor.detach().to_dense().contiguous().view(-1).numpy().tobytes()


def bare(workload: Workload) -> dict[str, Any]:
    return outcome(workload, [workload.step(batch) for batch in workload.batches])


def in_plain_loop(monitor: sk.Monitor, workload: Workload) -> list[Tensor]:
    return [workload.step(batch) for batch in workload.batches]


def in_blocks(monitor: sk.Monitor, workload: Workload) -> list[Tensor]:
    losses = []
    for batch in workload.batches:
        with monitor.step():
            losses.append(workload.step(batch))
    return losses


def replayable(monitor: sk.Monitor, workload: Workload) -> list[Tensor]:
    step = monitor.replayable(workload.step)
    return [step(batch) for batch in workload.batches]


Mode = Callable[[sk.Monitor, Workload], list[Tensor]]
MODES: tuple[Mode, ...] = (in_plain_loop, in_blocks, replayable)


def attached(workload: Workload, run_dir: Path, preset: str = "default") -> sk.Monitor:
    config = PRESETS[preset].replace(report=False, compact=False)
    optimizers = (workload.optimizer, *workload.also)
    return sk.attach(workload.model, optimizers, run_dir, config=config, scaler=workload.scaler)


def hooks_of(workload: Workload) -> list[str]:
    """Every hook on a module, a parameter or the optimizer."""
    owners = [*workload.model.modules(), *workload.model.parameters(), workload.optimizer, *workload.also]
    return [f"{type(owner).__name__}.{name}" for owner in owners for name in dir(owner) if _holds_hooks(owner, name)]


def _holds_hooks(owner: object, name: str) -> bool:
    return name.endswith("_hooks") and isinstance(held := getattr(owner, name), dict) and len(held) > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", WORKLOADS.values(), ids=WORKLOADS)
def test_a_watched_run_is_the_bare_run_to_the_bit(kind: type[Workload], mode: Mode, tmp_path: Path) -> None:
    expected = bare(build(kind))
    untouched = hooks_of(build(kind))

    for preset in PRESETS:
        workload = build(kind)
        with attached(workload, tmp_path / preset, preset) as monitor:
            losses = mode(monitor, workload)
            found = outcome(workload, losses)

        assert {key for key in expected if found[key] != expected[key]} == set(), preset
        assert hooks_of(workload) == untouched, preset
        assert monitor.diagnosis is None, preset


def test_the_hooks_are_there_while_the_run_is_watched(tmp_path: Path) -> None:
    workload = build(Workload)

    with attached(workload, tmp_path / "run"):
        names = hooks_of(workload)

    assert any("_forward_hooks" in name for name in names)
    assert any("_post_accumulate_grad_hooks" in name for name in names)
    assert any("_optimizer_step_pre_hooks" in name for name in names)


@pytest.fixture
def without_collector() -> Iterator[None]:
    """What is still there must be held by a reference, not by a cycle that waits for the garbage collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("mode", MODES)
def test_nothing_keeps_the_model_or_the_monitor_alive(mode: Mode, tmp_path: Path) -> None:
    workload = build(Convolutions)
    monitor = attached(workload, tmp_path / "run", "full")
    mode(monitor, workload)
    monitor.close()
    left = weakref.ref(workload.model), weakref.ref(monitor), weakref.ref(workload.optimizer)

    del workload, monitor

    assert [reference() for reference in left] == [None, None, None]


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("policy", ["record", "rollback", "raise"])
def test_a_closed_monitor_that_is_kept_for_its_diagnosis_keeps_nothing_else(policy: str, tmp_path: Path) -> None:
    workload = build(Convolutions)
    buffer = Held(examples=torch.rand(4, 2), labels=torch.zeros(4).long(), logits=torch.rand(4, 2))
    config = PRESETS["full"].replace(report=False, compact=False)
    monitor = sk.attach(
        workload.model, workload.optimizer, tmp_path, config=config, on_nonfinite=policy, replay_buffer=buffer
    )
    replayable(monitor, workload)
    workload.batches[0][0][0, 0, 0, 0] = math.nan
    with pytest.raises(sk.NonFiniteError) if policy == "raise" else nullcontext():
        monitor.replayable(workload.step)(workload.batches[0])
    monitor.close()
    left = weakref.ref(workload.model), weakref.ref(workload.optimizer), weakref.ref(buffer)

    del workload, buffer

    assert monitor.diagnosis is not None
    assert [reference() for reference in left] == [None, None, None]


class Held(dict):
    """A mapping that can be referred to weakly."""


def test_ten_runs_whose_monitors_are_kept_leave_no_weight_behind(tmp_path: Path) -> None:
    monitors = []

    for number in range(10):
        workload = build(Workload)
        with attached(workload, tmp_path / str(number), "full") as monitor:
            replayable(monitor, workload)
        monitors.append(monitor)
    del workload, monitor
    gc.collect()

    held = [entry for entry in gc.get_objects() if issubclass(type(entry), Tensor)]
    assert [entry for entry in held if entry.shape == (16, 8)] == []
    assert len(monitors) == 10


def test_a_monitor_that_was_closed_lets_its_step_run_on_as_the_plain_function(tmp_path: Path) -> None:
    expected = bare(build(Workload))
    workload = build(Workload)
    monitor = attached(workload, tmp_path / "run")
    step = monitor.replayable(workload.step)
    losses = [step(batch) for batch in workload.batches[:2]]
    monitor.close()

    losses += [step(batch) for batch in workload.batches[2:]]

    assert outcome(workload, losses) == expected
    assert monitor.step_index == 2


@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_closes_its_monitor_runs_to_its_end(mode: Mode, tmp_path: Path) -> None:
    expected = bare(build(Workload))
    workload = build(Workload)
    monitor = attached(workload, tmp_path / "run", "full")
    step = workload.step
    workload.step = lambda batch: (monitor.close(), step(batch))[1]

    losses = mode(monitor, workload)

    assert outcome(workload, losses) == expected
    assert hooks_of(workload) == []


def test_two_monitors_watch_the_same_run_and_leave_it_one_by_one(tmp_path: Path) -> None:
    expected = bare(build(Convolutions))
    workload = build(Convolutions)
    first, second = attached(workload, tmp_path / "1", "full"), attached(workload, tmp_path / "2", "full")

    losses = in_plain_loop(first, workload)
    found = outcome(workload, losses)
    indices = (first.step_index, second.step_index)
    first.close()
    between = len(hooks_of(workload))
    second.close()

    assert found == expected
    assert indices == (4, 4)
    assert between > 0
    assert hooks_of(workload) == []


def test_a_scaler_that_skips_is_no_fault_but_an_event(tmp_path: Path) -> None:
    workload = build(Scaled)

    with attached(workload, tmp_path / "run") as monitor:
        replayable(monitor, workload)

    events = sk.open_run(tmp_path / "run").events()
    assert monitor.diagnosis is None
    assert "scaler_skip" in set(events["kind"])
    assert not set(events["severity"]) & {"error"}


def number_of_graphs(workload: Workload) -> int:
    torch._dynamo.utils.counters.clear()
    for batch in workload.batches:
        workload.step(batch)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("kind", [Compiled, CompiledStep])
def test_what_is_compiled_is_compiled_to_the_same_graphs(kind: type[Workload], tmp_path: Path) -> None:
    expected = number_of_graphs(build(kind))
    workload = build(kind)

    with attached(workload, tmp_path / "run"):
        found = number_of_graphs(workload)

    assert found == expected


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
def test_a_watched_run_of_kernels_that_inductor_fused_is_the_bare_run_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs that are cut elsewhere are fused and rounded otherwise."""
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)  # its pool of processes would outlive the test
    expected = bare(build(CompiledByInductor))
    workload = build(CompiledByInductor)

    with attached(workload, tmp_path / "run", "full") as monitor:
        found = outcome(workload, replayable(monitor, workload))

    assert {key for key in expected if found[key] != expected[key]} == set()
