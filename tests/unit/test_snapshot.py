"""A training state that is put back is the state that was captured, bit for bit."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stabilitykit import random_states
from stabilitykit.errors import UsageError
from stabilitykit.random_states import RandomStates
from stabilitykit.snapshot import Moment, TrainingState

OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adam for-loop": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "adam tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 3)
        )
        self.register_buffer("seen", torch.zeros(()), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += len(inputs)
        return self.layers(inputs)


class Training:
    """A model that is trained with every kind of randomness there is."""

    def __init__(self, optimizer: str) -> None:
        self.model = Network()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.state = TrainingState(self.model, [self.optimizer])

    def step(self) -> float:
        inputs = torch.randn(5, 6) * random.random() + float(np.random.normal())  # noqa: NPY002
        labels = torch.randint(3, (5,))

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(inputs), labels)
            loss.backward()
            return loss

        return self.optimizer.step(closure).item()

    def contents(self) -> dict[str, object]:
        gradients = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        return copy.deepcopy(
            {
                "model": dict(self.model.state_dict()),
                "seen": self.model.seen,
                "gradients": gradients,
                "state": list(self.optimizer.state_dict()["state"].values()),
                "groups": self.optimizer.state_dict()["param_groups"],
                "modes": [module.training for module in self.model.modules()],
                "streams": (torch.get_rng_state(), random.getstate(), np.random.get_state()),  # noqa: NPY002
            }
        )


def identical(mine: object, theirs: object) -> bool:
    """Equality to the bit, through containers; NaN equals NaN."""
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        if mine.layout != torch.strided:
            mine, theirs = mine.to_dense(), theirs.to_dense()
        same_kind = mine.dtype == theirs.dtype and mine.shape == theirs.shape
        return same_kind and mine.numpy(force=True).tobytes() == theirs.numpy(force=True).tobytes()
    if isinstance(mine, np.ndarray):
        return mine.tobytes() == np.asarray(theirs).tobytes()
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(identical(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list | tuple) and isinstance(theirs, list | tuple):
        return len(mine) == len(theirs) and all(map(identical, mine, theirs))
    return mine == theirs


@pytest.mark.parametrize("steps_before", [0, 1, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_restored_training_is_what_it_was_and_goes_on_as_it_went(optimizer: str, steps_before: int) -> None:
    training = Training(optimizer)
    for _ in range(steps_before):
        training.step()
    before = training.contents()
    snapshot = training.state.capture()
    first = [training.step() for _ in range(3)]
    after = training.contents()

    training.state.restore(snapshot)
    restored = training.contents()
    second = [training.step() for _ in range(3)]

    assert identical(restored, before)
    assert second == first
    assert identical(training.contents(), after)


def test_a_snapshot_can_be_restored_as_often_as_wanted() -> None:
    training = Training("adam")
    training.step()
    snapshot = training.state.capture()

    losses = []
    for _ in range(3):
        training.state.restore(snapshot)
        losses.append(training.step())

    assert losses == losses[:1] * 3


def test_no_object_changes_its_identity() -> None:
    training = Training("adamw foreach")
    training.step()
    parameters = [id(entry) for entry in training.model.parameters()]
    storages = [entry.data_ptr() for entry in training.model.state_dict().values()]
    moments = [state["exp_avg"].data_ptr() for state in training.optimizer.state.values()]
    snapshot = training.state.capture()
    training.step()

    training.state.restore(snapshot)

    assert [id(entry) for entry in training.model.parameters()] == parameters
    assert [entry.data_ptr() for entry in training.model.state_dict().values()] == storages
    assert [state["exp_avg"].data_ptr() for state in training.optimizer.state.values()] == moments


def test_capturing_advances_no_random_stream() -> None:
    training = Training("sgd")
    before = RandomStates.capture()

    training.state.capture()

    after = RandomStates.capture()
    assert identical(before.torch_cpu, after.torch_cpu)
    assert before.python == after.python
    assert identical(before.numpy, after.numpy)


def test_a_moment_puts_back_streams_and_hyperparameters_alone() -> None:
    training = Training("sgd momentum")
    moment = training.state.moment()
    drawn = torch.rand(3)
    training.optimizer.param_groups[0]["lr"] = 7.0
    with torch.no_grad():
        training.model.layers[0].weight.fill_(1.0)

    training.state.restore_moment(moment)

    assert isinstance(moment, Moment)
    assert torch.equal(torch.rand(3), drawn)
    assert training.optimizer.param_groups[0]["lr"] == 0.1
    assert (training.model.layers[0].weight == 1.0).all()


def test_a_group_that_a_step_added_is_gone_and_can_be_added_again() -> None:
    body, head = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([body], lr=0.1)
    state = TrainingState(nn.ParameterList([body, head]), [optimizer])  # type: ignore[arg-type]
    before = state.capture()
    optimizer.add_param_group({"params": [head], "lr": 0.5})
    after = state.capture()

    state.restore(before)

    assert [group["params"] for group in optimizer.param_groups] == [[body]]
    optimizer.add_param_group({"params": [head], "lr": 0.5})
    state.restore(before)
    state.restore(after)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    assert optimizer.param_groups[1]["params"][0] is head
    assert optimizer.param_groups[1]["lr"] == 0.5


def test_gradients_that_were_none_are_none_again() -> None:
    training = Training("sgd")
    snapshot = training.state.capture()
    training.step()

    training.state.restore(snapshot)

    assert [entry.grad for entry in training.model.parameters()] == [None] * 6


def test_gradients_under_accumulation_are_put_back_into_the_same_tensors() -> None:
    training = Training("sgd")
    training.model(torch.randn(5, 6)).sum().backward()
    gradients = [entry.grad for entry in training.model.parameters()]
    copies = [entry.clone() for entry in gradients]
    snapshot = training.state.capture()
    training.model(torch.randn(5, 6)).sum().backward()

    training.state.restore(snapshot)

    assert all(entry.grad is gradient for entry, gradient in zip(training.model.parameters(), gradients, strict=True))
    assert all(torch.equal(gradient, held) for gradient, held in zip(gradients, copies, strict=True))


def test_sparse_gradients_are_put_back() -> None:
    model = nn.Embedding(5, 2, sparse=True)
    state = TrainingState(model, [torch.optim.SparseAdam(model.parameters())])
    model(torch.tensor([1, 3])).sum().backward()
    before = model.weight.grad.to_dense()
    snapshot = state.capture()
    model(torch.tensor([0])).sum().backward()

    state.restore(snapshot)

    assert model.weight.grad.layout == torch.sparse_coo
    assert torch.equal(model.weight.grad.to_dense(), before)


def test_a_dense_gradient_that_became_sparse_is_dense_again() -> None:
    weight = nn.Parameter(torch.ones(3))
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    state = TrainingState(nn.Module(), [torch.optim.SGD([weight])])
    snapshot = state.capture()
    weight.grad = torch.tensor([0.0, 0.0, 9.0]).to_sparse()

    state.restore(snapshot)

    assert weight.grad.tolist() == [1.0, 2.0, 3.0]


def test_modes_are_put_back_module_by_module() -> None:
    training = Training("sgd")
    training.model.layers[1].eval()
    before = [module.training for module in training.model.modules()]
    snapshot = training.state.capture()
    training.model.eval()

    training.state.restore(snapshot)

    assert [module.training for module in training.model.modules()] == before


def test_parameters_that_belong_to_the_optimizer_alone_are_captured() -> None:
    temperature = nn.Parameter(torch.ones(()))
    state = TrainingState(nn.Linear(1, 1), [torch.optim.SGD([temperature], lr=1.0)])
    snapshot = state.capture()
    with torch.no_grad():
        temperature.fill_(5.0)

    state.restore(snapshot)

    assert temperature.item() == 1.0


class Scheduled:
    """The least a stateful object needs."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Buffer:
    """A replay buffer of plain tensors."""

    def __init__(self) -> None:
        self.examples, self.labels = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
        self.logits = None


def drawn_from(generator: object) -> object:
    """The next number of any kind of generator."""
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    return generator.random()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.Generator().manual_seed(3),
        lambda: np.random.default_rng(3),
        lambda: np.random.RandomState(3),
        lambda: random.Random(3),
    ],
    ids=["torch.Generator", "numpy.Generator", "numpy.RandomState", "random.Random"],
)
def test_a_generator_of_the_callers_repeats_what_it_drew(make: Callable[[], object]) -> None:
    generator = make()
    state = TrainingState(nn.Linear(1, 1), [], [generator])
    snapshot = state.capture()
    first = [drawn_from(generator) for _ in range(3)]

    state.restore(snapshot)

    assert [drawn_from(generator) for _ in range(3)] == first


def test_an_object_with_a_state_dict_is_put_back() -> None:
    counter = Scheduled()
    state = TrainingState(nn.Linear(1, 1), [], [counter])
    snapshot = state.capture()
    counter.count = 5

    state.restore(snapshot)

    assert counter.count == 0


def test_an_object_that_refuses_its_state_keeps_no_other_from_its_own() -> None:
    class Refuses:
        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state: dict[str, int]) -> None:
            raise KeyError("strict")

    model, counter = nn.Linear(2, 2), torch.zeros(())
    state = TrainingState(model, [], [Refuses(), counter])
    snapshot = state.capture()
    nn.init.zeros_(model.weight)
    counter.add_(1)

    with pytest.raises(KeyError, match="strict"):
        state.restore(snapshot)

    assert model.weight.abs().sum() > 0
    assert counter == 0


def test_a_scheduler_and_a_scaler_are_put_back() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    state = TrainingState(model, [optimizer], [scheduler, scaler])
    snapshot = state.capture()
    scaler.scale(model(torch.ones(1, 1)).sum() * torch.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.step()
    scheduler.step()
    changed = (scheduler.last_epoch, scheduler.get_last_lr(), scaler.get_scale())

    state.restore(snapshot)

    assert changed == (1, [0.5], 2.0)
    assert (scheduler.last_epoch, scheduler.get_last_lr(), scaler.get_scale()) == (0, [1.0], 4.0)


def test_a_second_module_a_tensor_and_a_replay_buffer_are_put_back() -> None:
    teacher, memory, buffer = nn.BatchNorm1d(2), torch.zeros(3), Buffer()
    mapping = {"examples": torch.zeros(2, 2), "labels": torch.zeros(2, dtype=torch.int64)}
    state = TrainingState(nn.Linear(1, 1), [], [teacher, memory, buffer, mapping])
    snapshot = state.capture()
    teacher(torch.randn(4, 2))
    memory += 1
    buffer.examples[1] = 5.0
    mapping["labels"][0] = 7

    state.restore(snapshot)

    assert teacher.running_mean.tolist() == [0.0, 0.0]
    assert memory.tolist() == [0.0, 0.0, 0.0]
    assert not buffer.examples.any()
    assert mapping["labels"].tolist() == [0, 0]


def test_a_replay_buffer_that_grows_during_the_step_has_its_old_length_again() -> None:
    buffer = Buffer()
    state = TrainingState(nn.Linear(1, 1), [], [buffer])
    snapshot = state.capture()
    buffer.examples = torch.cat([buffer.examples, torch.ones(2, 2)])

    state.restore(snapshot)

    assert buffer.examples.tolist() == [[0.0, 0.0]] * 4


class Averager(nn.Module):
    """Assigns its buffer anew at each call, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(2))

    def forward(self, inputs: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * inputs.detach().mean(0)
        return inputs - self.average


def test_a_module_buffer_that_was_assigned_anew_is_put_back() -> None:
    model = Averager()
    state = TrainingState(model, [])
    snapshot = state.capture()
    model(torch.ones(4, 2))

    state.restore(snapshot)

    assert model.average.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("nonsense", [object(), 3, "scheduler", None, [1, 2], {"no": "tensors"}, lambda: 0])
def test_an_object_that_cannot_be_captured_is_refused_in_one_line_that_says_what_is_expected(nonsense: object) -> None:
    with pytest.raises(UsageError, match="expected state_dict and load_state_dict") as caught:
        TrainingState(nn.Linear(1, 1), [], [nonsense])

    assert "\n" not in str(caught.value)
    assert type(nonsense).__name__ in str(caught.value)


def test_the_fingerprint_changes_with_every_write_and_with_nothing_else() -> None:
    training, buffer = Training("sgd"), Buffer()
    state = TrainingState(training.model, [training.optimizer], [buffer])
    fingerprint = state.fingerprint()
    training.model.eval()
    training.model.layers(torch.randn(2, 6))
    unchanged = state.fingerprint()
    buffer.labels[0] = 1

    assert unchanged == fingerprint
    assert state.fingerprint() != fingerprint


@pytest.mark.parametrize("change", ["written", "loaded"])
def test_the_fingerprint_changes_when_the_optimizers_state_is_put_in_from_outside(change: str) -> None:
    training = Training("adam")
    state = TrainingState(training.model, [training.optimizer])
    state.capture()
    training.step()
    fingerprint = state.fingerprint()
    unchanged = state.fingerprint()
    moments = next(iter(training.optimizer.state.values()))

    if change == "written":
        moments["exp_avg"].fill_(1.0)
    else:
        training.optimizer.load_state_dict(training.optimizer.state_dict())

    assert unchanged == fingerprint
    assert state.fingerprint() != fingerprint


def test_the_size_counts_parameters_buffers_and_gradients() -> None:
    model = nn.Linear(10, 10, bias=False)
    model(torch.ones(1, 10)).sum().backward()

    assert TrainingState(model, []).capture().num_bytes == 2 * 10 * 10 * 4


def test_a_replay_buffer_is_copied_into_the_memory_of_the_snapshot_before_and_counts() -> None:
    buffer = {"examples": torch.zeros(10, 4), "labels": torch.zeros(10, dtype=torch.int64)}
    state = TrainingState(nn.Linear(1, 1, bias=False), [], [buffer, torch.ones(3)])
    first = state.capture()
    held = {name: copied for name, (_, copied) in first.extras[0].items()}
    addresses = [copied.data_ptr() for copied in held.values()]

    buffer["examples"] += 1
    second = state.capture(first)
    buffer["examples"] += 1
    state.restore(second)

    assert [copied.data_ptr() for _, copied in second.extras[0].values()] == addresses
    assert second.num_bytes == 4 + 10 * 4 * 4 + 10 * 8 + 3 * 4
    assert buffer["examples"].unique().tolist() == [1]


def test_an_optimizers_setting_that_is_a_module_is_held_as_it_is() -> None:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": layer.parameters(), "layer": layer}], lr=0.1)
    state = TrainingState(layer, [optimizer])

    state.restore(state.capture())

    assert optimizer.param_groups[0]["layer"] is layer


def test_the_second_half_of_a_pair_of_numpy_normals_is_put_back() -> None:
    state = TrainingState(nn.Linear(1, 1), [])
    np.random.seed(0)  # noqa: NPY002
    np.random.randn()  # the other one of its pair waits  # noqa: NPY002
    waiting = state.capture()
    expected = np.random.randn()  # taken without a move of the generator  # noqa: NPY002
    state.capture()

    state.restore(waiting)
    again = state.capture()
    first = np.random.randn()  # noqa: NPY002
    state.restore(again)
    second = np.random.randn()  # noqa: NPY002

    assert first == second == expected


@pytest.mark.parametrize("readable", [True, False])
@pytest.mark.parametrize(
    "draw",
    [
        random.random,
        lambda: random.gauss(0, 1),
        lambda: [random.gauss(0, 1) for _ in range(2)],
        lambda: random.getrandbits(40_000),
        lambda: random.seed(3),
        lambda: random.setstate(random.Random(5).getstate()),
    ],
)
def test_pythons_stream_is_read_as_python_gives_it_whatever_moved_it(
    draw: Callable[[], object], readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not readable:
        monkeypatch.setattr(random_states, "_holds_its_state", lambda _: False)
    stream = random_states._PythonStream()

    for _ in range(3):
        assert stream.state() == random.getstate()
        draw()
        assert stream.state() == random.getstate()
        assert stream.state() is stream.state() or not readable


def test_pythons_stream_is_found_in_memory_in_cpython() -> None:
    assert random_states._holds_its_state(random.Random(1)) == (sys.implementation.name == "cpython")
