"""Guard 6 in a loop that is not ours: a classifier with BatchNorm and dropout on random batches."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from stabilitykit.errors import NonFiniteError, UsageError
from stabilitykit.guards import StepValidation


class Loop:
    """Somebody's training loop."""

    def __init__(self, *, momentum: float = 0.9, lr: float = 0.05) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr, momentum=momentum)
        self.batches = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(40)]
        self.factor = 1.0
        self.calls = 0

    def step(self, inputs: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        self.optimizer.zero_grad()
        loss = self.factor * cross_entropy(self.model(inputs), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def contents(self) -> list[Tensor]:
        momenta = [state["momentum_buffer"] for state in self.optimizer.state.values() if state]
        return [entry.clone() for entry in (*self.model.state_dict().values(), *momenta)]


class Events(list[dict[str, Any]]):
    def __call__(self, kind: str, message: str, **data: Any) -> None:
        self.append(data | {"kind": kind, "message": message})


def protected(loop: Loop, **options: Any) -> tuple[Any, StepValidation, Events]:
    events = Events()
    validation = StepValidation(loop.model, loop.optimizer, on_event=events, num_classes=3, **options)
    step = validation.protect(loop.step, labels=lambda inputs, labels: labels, sample_ids=lambda inputs, _: range(6))
    return step, validation, events


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("policy", ["raise", "skip", "rollback", "record"])
def test_a_healthy_run_is_bit_identical_and_nothing_is_said(policy: str) -> None:
    bare, loop = Loop(), Loop()
    torch.manual_seed(1)
    expected = [bare.step(*batch) for batch in bare.batches], bare.contents(), torch.get_rng_state()

    step, validation, events = protected(loop, policy=policy)
    torch.manual_seed(1)
    losses = [step(*batch) for batch in loop.batches]

    assert same(losses, expected[0])
    assert same(loop.contents(), expected[1])
    assert torch.equal(torch.get_rng_state(), expected[2])
    assert not events
    assert validation.problem is None


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_s8_a_bad_batch_never_reaches_the_statistics_of_batch_norm(policy: str) -> None:
    loop = Loop()
    step, _, events = protected(loop, policy=policy)
    for batch in loop.batches[:3]:
        step(*batch)
    before = loop.contents()
    inputs, labels = loop.batches[3]
    inputs[2, 1] = math.nan

    assert step(inputs, labels) is None

    assert same(loop.contents(), before)
    assert loop.calls == 3
    assert events[0]["phase"] == "data"
    assert events[0]["rows"] == [2]
    assert events[0]["sample_ids"] == list(range(6))


def test_s6_labels_are_judged_by_range_and_dtype_before_they_are_used() -> None:
    loop = Loop()
    step, _, events = protected(loop, policy="skip")
    inputs, labels = loop.batches[0]

    assert step(inputs, labels.index_fill(0, torch.tensor([4]), 200)) is None
    assert step(inputs, labels.float()) is None

    assert loop.calls == 0
    assert "got 200, expected 0 to 2" in events[0]["message"]
    assert "got torch.float32, expected torch.int64" in events[1]["message"]


def test_s7_any_weight_that_is_not_finite_brings_back_the_last_good_state_not_a_new_head() -> None:
    loop = Loop()
    step, _, events = protected(loop, policy="rollback", snapshot_every=4)
    for index, batch in enumerate(loop.batches[:7]):
        if index == 4:
            good = loop.contents()
        step(*batch)
    with torch.no_grad():
        loop.model[0].weight[0, 0] = math.nan

    assert step(*loop.batches[7]) is None

    assert same(loop.contents(), good)
    assert events[-1]["to_step"] == 4
    assert step(*loop.batches[8]) is not None


def test_s9_momentum_that_went_bad_does_not_spoil_the_weights_that_came_back() -> None:
    loop = Loop()
    step, _, _ = protected(loop, policy="rollback", snapshot_every=2)
    for batch in loop.batches[:5]:
        step(*batch)
    for state in loop.optimizer.state.values():
        state["momentum_buffer"].fill_(math.nan)

    results = [step(*batch) for batch in loop.batches[5:12]]

    assert results[0] is None
    assert all(loss is not None for loss in results[1:])
    assert all(entry.isfinite().all() for entry in loop.contents())


def test_s8_statistics_that_went_bad_are_noticed_although_loss_and_weights_are_finite() -> None:
    loop = Loop()
    step, _, events = protected(loop, policy="skip")
    step(*loop.batches[0])

    loop.model[1].running_var.fill_(math.nan)  # training normalises with the batch: its loss stays finite
    outcome = step(*loop.batches[1])

    assert outcome is None
    assert "module buffers: NaN or Inf in 1.running_var" in events[-1]["message"]
    assert loop.model[1].running_var.isfinite().all()


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_layer_that_joined_later_is_looked_at_as_well(policy: str) -> None:
    loop = Loop()
    step, _, events = protected(loop, policy=policy)
    step(*loop.batches[0])
    loop.model.append(nn.BatchNorm1d(3))
    loop.optimizer.add_param_group({"params": list(loop.model[5].parameters())})
    step(*loop.batches[1])

    loop.model[5].running_var.fill_(math.nan)
    outcome = step(*loop.batches[2])

    assert outcome is None
    assert "module buffers: NaN or Inf in 5.running_var" in events[-1]["message"]


def test_s10_skip_undoes_weights_momentum_and_statistics_alike() -> None:
    loop = Loop()
    step, validation, events = protected(loop, policy="skip")
    for batch in loop.batches[:3]:
        step(*batch)
    before = loop.contents()
    loop.factor = math.inf

    outcome = step(*loop.batches[3])

    assert outcome is None
    assert same(loop.contents(), before)
    assert events[-1]["step"] == validation.step_index == 3


def test_s13_so_many_unsound_steps_in_a_row_end_the_run() -> None:
    loop = Loop()
    step, validation, _ = protected(loop, policy="skip", max_in_a_row=3)
    loop.factor = math.nan

    outcomes = [step(*loop.batches[0]), step(*loop.batches[1])]
    with pytest.raises(NonFiniteError, match="3 steps in a row were not sound, the last: loss is nan"):
        step(*loop.batches[2])

    assert outcomes == [None, None]
    assert validation.num_acted == 3


def test_s13_one_sound_step_begins_the_count_anew() -> None:
    loop = Loop()
    step, validation, _ = protected(loop, policy="skip", max_in_a_row=2)

    for index, batch in enumerate(loop.batches[:8]):
        loop.factor = math.nan if index % 2 else 1.0
        step(*batch)

    assert validation.num_acted == 4


@pytest.mark.parametrize(
    "kill", [lambda loss: torch.tensor(1.0, requires_grad=True), lambda loss: loss.detach().requires_grad_()]
)
def test_o6_a_loss_that_is_not_connected_to_the_weights_is_no_step(kill: Any) -> None:
    loop = Loop()
    validation = StepValidation(loop.model, loop.optimizer, policy="skip", on_event=(events := Events()))

    @validation.protect
    def step(inputs: Tensor, labels: Tensor) -> Tensor:
        loop.optimizer.zero_grad()
        loss = kill(cross_entropy(loop.model(inputs), labels))
        loss.backward()
        loop.optimizer.step()
        return loss.detach()

    assert step(*loop.batches[0]) is None
    assert "gradients are missing although the loss is" in events[0]["message"]


def test_s4_a_clamp_that_kills_every_gradient_is_noticed() -> None:
    loop = Loop()
    validation = StepValidation(loop.model, loop.optimizer, policy="skip", on_event=(events := Events()))
    with torch.no_grad():
        loop.model[4].bias -= 50

    @validation.protect
    def step(inputs: Tensor, labels: Tensor) -> Tensor:
        loop.optimizer.zero_grad()
        loss = cross_entropy(loop.model(inputs).clamp(-10, 10), labels)
        loss.backward()
        loop.optimizer.step()
        return loss.detach()

    assert step(*loop.batches[0]) is None
    assert "gradients are all zero although the loss is 1.099" in events[0]["message"]


def test_s5_an_infinity_is_seen_before_anything_could_clamp_it() -> None:
    loop = Loop()
    step, _, _ = protected(loop, policy="skip")
    inputs, labels = loop.batches[0]
    inputs[0, 0] = math.inf

    assert step(inputs, labels) is None


def test_a_finite_jump_is_unsound_and_a_new_tasks_loss_is_not() -> None:
    loop = Loop(lr=1e-4)
    step, _, events = protected(loop, policy="rollback")
    outcomes = []

    for index, batch in enumerate(loop.batches[:14]):
        loop.factor = {10: 30.0, 12: 1e5}.get(index, 1.0)
        outcomes.append(step(*batch))

    assert [index for index, loss in enumerate(outcomes) if loss is None] == [12]
    assert "loss jumped to" in events[0]["message"]


@pytest.mark.parametrize("policy", ["raise", "skip", "rollback"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_those_the_optimizer_used_not_what_the_loop_leaves_behind(policy: str, set_to_none: bool) -> None:
    loop = Loop()
    events = Events()

    def step(inputs: Tensor, labels: Tensor) -> Tensor:
        loss = loop.factor * cross_entropy(loop.model(inputs), labels)
        loss.backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad(set_to_none=set_to_none)
        return loss.detach()

    validation = StepValidation(loop.model, loop.optimizer, policy=policy, on_event=events)
    step = validation.protect(step)
    losses = [step(*batch) for batch in loop.batches]

    assert None not in losses
    assert events == []
    loop.factor = 0.0
    loop.model[0].weight.register_hook(lambda gradient: gradient + math.nan)
    with pytest.raises(NonFiniteError, match=r"gradients: norm is nan, NaN or Inf in 0\.weight"):
        StepValidation(loop.model, loop.optimizer).protect(step.__wrapped__)(*loop.batches[0])
    assert not loop.optimizer._optimizer_step_pre_hooks


def test_an_optimizer_that_makes_its_gradients_itself_is_judged_by_those_it_made() -> None:
    loop = Loop()
    optimizer = torch.optim.LBFGS(loop.model.parameters(), max_iter=2)

    def step(inputs: Tensor, labels: Tensor) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(loop.model(inputs), labels)
            loss.backward()
            return loss

        return optimizer.step(closure)

    step = StepValidation(loop.model, optimizer).protect(step)

    assert all(step(*batch) is not None for batch in loop.batches[:3])


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_an_overflow_under_a_scaler_is_its_own_business_also_where_gradients_are_gone_afterwards(policy: str) -> None:
    loop = Loop()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    def step(inputs: Tensor, labels: Tensor) -> Tensor:
        loss = 8 * cross_entropy(loop.model(inputs), labels)
        scaler.scale(loss).backward()
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.zero_grad()
        return loss.detach()

    step = StepValidation(loop.model, loop.optimizer, policy=policy, stateful=(scaler,)).protect(step)

    assert None not in [step(*batch) for batch in loop.batches]
    assert scaler.get_scale() < 2.0**127


def test_before_the_update_a_loop_can_ask_and_no_harm_is_done() -> None:
    loop = Loop()
    validation = StepValidation(loop.model, loop.optimizer, policy="record")
    before = [entry.detach().clone() for entry in loop.model.parameters()]

    for factor in (math.nan, 1.0):
        loop.optimizer.zero_grad()
        loss = factor * cross_entropy(loop.model(loop.batches[0][0]), loop.batches[0][1])
        loss.backward()
        if validation.allows_update(loss):
            loop.optimizer.step()
        else:
            assert same(list(loop.model.parameters()), before)

    assert not same(list(loop.model.parameters()), before)


def test_going_back_again_goes_further_back_and_does_not_repeat_the_draws() -> None:
    loop = Loop()
    step, _, events = protected(loop, policy="rollback", snapshot_every=3)
    for batch in loop.batches[:7]:
        step(*batch)
    loop.factor = math.nan

    step(*loop.batches[7])
    once = torch.get_rng_state()
    step(*loop.batches[8])
    twice = torch.get_rng_state()
    step(*loop.batches[9])
    step(*loop.batches[10])

    assert [event["to_step"] for event in events] == [6, 3, 3, 0]
    assert not torch.equal(once, twice)


def test_after_a_rollback_the_learning_rate_is_lower_for_a_while_and_then_what_it_was() -> None:
    loop = Loop(lr=0.05)
    step, _, _ = protected(loop, policy="rollback", lr_factor=0.1, cool_steps=3, snapshot_every=2)
    rates = []

    for index, batch in enumerate(loop.batches[:14]):
        loop.factor = math.nan if index in (4, 5) else 1.0
        step(*batch)
        rates.append(loop.optimizer.param_groups[0]["lr"])

    assert rates[:4] == [0.05] * 4
    assert rates[4:8] == pytest.approx([0.005] * 4)
    assert rates[8:] == pytest.approx([0.05] * 6)


def test_a_scheduler_that_sets_its_own_rate_meanwhile_keeps_it() -> None:
    loop = Loop(lr=0.05)
    step, _, _ = protected(loop, policy="rollback", lr_factor=0.1, cool_steps=2)
    step(*loop.batches[0])
    loop.factor = math.nan
    step(*loop.batches[1])
    loop.factor = 1.0

    loop.optimizer.param_groups[0]["lr"] = 0.02
    for batch in loop.batches[2:6]:
        step(*batch)

    assert loop.optimizer.param_groups[0]["lr"] == 0.02


def test_the_offending_batch_is_set_aside_with_its_sample_ids(tmp_path: Path) -> None:
    loop = Loop()
    step, _, events = protected(loop, policy="rollback", run_dir=tmp_path)
    step(*loop.batches[0])
    inputs, labels = loop.batches[1]
    inputs[3] = math.inf

    step(inputs, labels)

    with safe_open(tmp_path / events[0]["batch"], "pt") as held:
        tensors = [held.get_tensor(name) for name in sorted(held.keys())]
        assert json.loads(held.metadata()["sample_ids"]) == list(range(6))
    assert torch.equal(tensors[0], inputs)
    assert torch.equal(tensors[1], labels)


def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    loop = Loop()
    step, _, events = protected(loop, policy="skip", run_dir=tmp_path / "file")
    loop.factor = math.nan

    assert step(*loop.batches[0]) is None
    assert events[0]["batch"] == ""


def test_raise_names_the_tensor_and_the_step() -> None:
    loop = Loop()
    step, _, _ = protected(loop, policy="raise")
    step(*loop.batches[0])
    loop.model[4].weight.data[0, 0] = math.inf
    loop.optimizer.param_groups[0]["lr"] = 0.0

    with pytest.raises(NonFiniteError, match=r"step 1: (loss is|gradients: norm is)"):
        step(*loop.batches[1])


def test_record_changes_nothing_and_says_what_it_saw() -> None:
    bare, loop = Loop(), Loop()
    step, _, events = protected(loop, policy="record")
    bare.factor = loop.factor = math.nan
    torch.manual_seed(1)
    bare.step(*bare.batches[0])

    torch.manual_seed(1)
    loss = step(*loop.batches[0])

    assert math.isnan(loss)
    assert events[0]["message"] == "step 0: loss is nan; left as it is"
    assert [entry.isnan().any() for entry in loop.contents()] == [entry.isnan().any() for entry in bare.contents()]


@pytest.mark.parametrize(
    "options",
    [{"policy": "ignore"}, {"max_in_a_row": 0}, {"snapshot_every": 0}, {"max_jump": 1.0}, {"lr_factor": 0.0}],
    ids=str,
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    loop = Loop()

    with pytest.raises(UsageError, match=r"StepValidation: got .*, expected"):
        StepValidation(loop.model, loop.optimizer, **options)
