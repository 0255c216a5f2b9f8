"""Drift between stored logits and the current model, measured without a trace."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabilitykit as sk
from stabilitykit.watch.buffer import full_audit
from stabilitykit.watch.teacher import Drift, teacher_drift


class Network(nn.Module):
    """BatchNorm, dropout, a counter and a draw of its own in every forward: all that an audit must not move."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.norm, self.drop, self.head = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.seen += len(inputs)
        noise = torch.rand(1) * 0 + random.random() * 0
        return self.head(self.drop(self.norm(inputs))) + noise


def drift(model: nn.Module, examples: Tensor, logits: Tensor, sample: int = 64) -> Drift:
    return teacher_drift(model, examples, logits, unfit=(), preprocess=None, sample=sample)


def test_the_logits_a_model_has_just_given_have_not_drifted() -> None:
    model = Network().eval()
    examples = torch.randn(10, 4)

    measured = drift(model, examples, model(examples))

    assert measured.rms == pytest.approx(0.0, abs=1e-6)
    assert (measured.agreement, measured.num_slots) == (1.0, 10)


def test_drift_is_the_root_mean_square_of_the_difference() -> None:
    model = nn.Identity()
    stored = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    measured = drift(model, stored + torch.tensor([3.0, -4.0]), stored)

    assert measured.rms == pytest.approx(math.sqrt((9 + 16) / 2))
    assert measured.stored_rms == pytest.approx(math.sqrt(30 / 4))
    assert measured.agreement == 0.0


def test_the_live_model_and_the_random_streams_stay_as_they_are() -> None:
    model = Network().train()
    model.norm.eval()
    before = copy.deepcopy(model)
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()  # noqa: NPY002

    drift(model, torch.randn(8, 4, generator=torch.Generator()), torch.zeros(8, 3))

    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    assert model.calls == 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == streams[1:]  # noqa: NPY002


def test_a_watched_model_is_not_seen_to_run(watched) -> None:
    model = nn.Linear(4, 3)
    watch = watched(model)

    drift(model, torch.randn(8, 4), torch.zeros(8, 3))

    assert watch.rows() == []


def test_only_a_sample_of_evenly_spaced_slots_is_run() -> None:
    seen = []

    measured = teacher_drift(
        lambda inputs: seen.append(inputs.flatten().tolist()) or inputs,
        torch.arange(10.0).reshape(10, 1),
        torch.arange(10.0).reshape(10, 1),
        unfit={0, 9},
        preprocess=None,
        sample=4,
    )

    assert seen == [[1, 3, 5, 7]]
    assert measured.num_slots == 4


def test_a_head_that_has_grown_is_compared_in_the_columns_it_had() -> None:
    stored = torch.randn(5, 2)

    measured = drift(nn.ConstantPad1d((0, 3), 9.0), stored, stored)

    assert measured.rms == 0.0


def test_logits_of_another_shape_are_refused_with_both_shapes() -> None:
    with pytest.raises(sk.UsageError, match=r"gave logits \[5, 2\] for 5 slots, expected \[5, 3\]"):
        drift(nn.Identity(), torch.randn(5, 2), torch.randn(5, 3))


def test_a_model_that_gives_no_tensor_is_refused() -> None:
    with pytest.raises(sk.UsageError, match="gave a NoneType, expected a tensor"):
        teacher_drift(lambda _: None, torch.randn(5, 2), torch.randn(5, 3), unfit=(), preprocess=None, sample=4)


def test_a_module_that_cannot_be_copied_is_refused_with_a_way_out() -> None:
    model = nn.Linear(2, 3)
    model.handle = (row for row in ())

    with pytest.raises(sk.UsageError, match=r"a Linear could not be copied .* pass a callable"):
        drift(model, torch.randn(5, 2), torch.randn(5, 3))


def test_a_model_whose_logits_are_not_finite_has_drifted_without_bound() -> None:
    assert drift(nn.Threshold(1e9, math.nan), torch.randn(5, 3), torch.randn(5, 3)).rms == math.inf


def test_an_audit_with_a_model_has_drift_in_its_row() -> None:
    buffer = {"examples": torch.full((6, 2), 2.0), "labels": torch.zeros(6).long(), "logits": torch.full((6, 2), 1.0)}

    row = full_audit(buffer, nn.Identity(), preprocess=lambda inputs: inputs * 2, sample=3).row

    assert (row["teacher_drift"][0], row["drift_slots"][0], row["teacher_agreement"][0]) == (3.0, 3, 1.0)


def test_a_drift_larger_than_the_logits_themselves_is_a_finding() -> None:
    buffer = {"examples": torch.randn(6, 2), "logits": torch.ones(6, 2)}

    findings = sk.audit_buffer(buffer, lambda inputs: -torch.ones(len(inputs), 2))

    assert [(finding.kind, finding.field) for finding in findings] == [("teacher", "logits")]
    assert "differ from the current model's by 2" in findings[0].message


def test_slots_that_are_not_finite_are_not_run() -> None:
    buffer = {"examples": torch.ones(4, 2), "logits": torch.ones(4, 2)}
    buffer["examples"][1], buffer["logits"][2] = math.nan, math.inf

    row = full_audit(buffer, nn.Identity()).row

    assert (row["teacher_drift"][0], row["drift_slots"][0]) == (0.0, 2)


def test_without_a_model_nothing_is_said_of_drift() -> None:
    row = full_audit({"examples": torch.ones(4, 2), "logits": torch.ones(4, 2)}).row

    assert math.isnan(row["teacher_drift"][0])
    assert row["drift_slots"][0] == 0


def test_a_sample_of_nothing_is_refused() -> None:
    with pytest.raises(sk.UsageError, match="got sample=0, expected 1 or more"):
        sk.audit_buffer({"examples": torch.ones(4, 2)}, sample=0)
