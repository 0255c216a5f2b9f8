"""What is written to diagnosis.json can be read again, by this version and the next."""

from __future__ import annotations

import json
import math
from dataclasses import fields, is_dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabilitykit.schema import (
    PHASES,
    ROLES,
    ROWS,
    ChainLink,
    Diagnosis,
    Origin,
    RunUpStep,
    TensorSummary,
    plain,
    verdict,
)

numbers = st.floats()
text = st.text(max_size=12)
counts = st.integers(0, 2**40)
tuples_of_counts = st.lists(counts, max_size=4).map(tuple)
summaries = st.builds(
    TensorSummary,
    name=text,
    dtype=text,
    shape=tuples_of_counts,
    numel=counts,
    nan=counts,
    posinf=counts,
    neginf=counts,
    zeros=counts,
    min=numbers,
    max=numbers,
    mean=numbers,
    value=text,
)
lines = st.none() | st.integers(1, 10_000)
origins = st.builds(
    Origin,
    step=counts,
    phase=st.sampled_from(PHASES),
    kind=st.sampled_from(["nan", "inf"]),
    module=text,
    op=text,
    tensor=text,
    file=text,
    line=lines,
    code=text,
    samples=tuples_of_counts,
    proof=st.sampled_from(["replayed", "replayed-differs", "hooks", "record"]),
)
links = st.builds(
    ChainLink,
    phase=st.sampled_from(PHASES),
    op=text,
    module=text,
    file=text,
    line=lines,
    code=text,
    output=summaries,
    note=text,
)
steps = st.builds(
    RunUpStep, step=counts, loss=numbers, grad_norm=numbers, parameter_norm=numbers, absmax=numbers, absmax_tensor=text
)
diagnoses = st.builds(
    Diagnosis,
    origin=origins,
    noticed=text,
    chain=st.lists(links, max_size=2).map(tuple),
    inputs=st.lists(summaries, max_size=2).map(tuple),
    rule=text,
    cause=text,
    remedies=st.lists(text, max_size=3).map(tuple),
    run_up=st.lists(steps, max_size=2).map(tuple),
    samples_are=text,
    task=st.none() | st.integers(0, 20),
)


def same(mine: object, theirs: object) -> bool:
    """Equality in which NaN equals NaN, all the way down."""
    if isinstance(mine, float) and isinstance(theirs, float):
        return mine == theirs or (math.isnan(mine) and math.isnan(theirs))
    if is_dataclass(mine):
        return type(mine) is type(theirs) and all(
            same(getattr(mine, entry.name), getattr(theirs, entry.name)) for entry in fields(mine)
        )
    if isinstance(mine, tuple) and isinstance(theirs, tuple):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    return mine == theirs


@given(diagnosis=diagnoses)
def test_a_diagnosis_survives_the_file(diagnosis: Diagnosis) -> None:
    read = Diagnosis.from_json(diagnosis.to_json())

    assert same(read, diagnosis)


@given(diagnosis=diagnoses)
def test_the_file_is_strict_json_that_a_browser_reads(diagnosis: Diagnosis) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    body = json.loads(diagnosis.to_json(), parse_constant=refuse)

    assert body["verdict"] == diagnosis.verdict


def test_keys_of_a_later_version_are_left_out_at_every_depth() -> None:
    summary = TensorSummary(name="x", dtype="float32", shape=(2,), numel=2)
    link = ChainLink(phase="forward", op="log", module="head", file="a.py", line=1, code="", output=summary)
    diagnosis = Diagnosis(
        origin=Origin(step=3, phase="forward", kind="nan"),
        chain=(link,),
        inputs=(summary,),
        run_up=(RunUpStep(step=2),),
    )
    body = json.loads(diagnosis.to_json())
    places = (body, body["origin"], body["chain"][0], body["chain"][0]["output"], body["inputs"][0], body["run_up"][0])
    for place in places:
        place["of_the_future"] = [1]

    read = Diagnosis.from_json(json.dumps(body))

    assert same(read, diagnosis)


def test_keys_that_an_earlier_version_did_not_write_have_their_defaults() -> None:
    read = Diagnosis.from_json('{"origin": {"step": 3, "phase": "forward", "kind": "nan"}}')

    assert same(read, Diagnosis(origin=Origin(step=3, phase="forward", kind="nan")))


@pytest.mark.parametrize("text", ["{}", "[]", '"origin"', "null", "nonsense"])
def test_a_text_that_is_no_diagnosis_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"origin|Expecting value"):
        Diagnosis.from_json(text)


def test_the_verdict_says_step_task_phase_operation_module_and_line() -> None:
    origin = Origin(step=1234, phase="forward", kind="inf", module="head", op="exp", file="train.py", line=7)

    assert (
        verdict(origin, 2) == "step 1,234, task 2: first Inf in the forward phase: `exp` in module `head` at train.py:7"
    )


@pytest.mark.parametrize(
    ("phase", "words"),
    [
        ("data", "the batch already held it (`batch[0]`)"),
        ("buffer", "a replayed sample already held it (`batch[0]`)"),
        ("weights", "the parameter already held it when the step began (`batch[0]`)"),
        ("state", "the module's buffer already held it when the step began (`batch[0]`)"),
    ],
)
def test_where_no_operation_is_to_blame_the_verdict_says_what_held_the_value(phase, words: str) -> None:
    assert words in verdict(Origin(step=0, phase=phase, kind="nan", tensor="batch[0]"))


def test_what_is_no_entry_of_the_batch_is_not_said_to_be_one() -> None:
    said = verdict(Origin(step=4, phase="data", kind="nan"))

    assert said == "step 4: first NaN in the data phase: a tensor kept outside the step already held it"


def test_a_backward_origin_is_the_derivative_of_the_forward_operation() -> None:
    origin = Origin(step=0, phase="backward", kind="nan", op="sqrt", tensor="w")

    assert "the derivative of `sqrt` (gradient of `w`)" in verdict(origin)


def test_a_summary_is_one_line_with_what_is_wrong_before_the_range() -> None:
    summary = TensorSummary(
        name="self", dtype="float32", shape=(24, 3), numel=72, nan=1, zeros=24_000, min=0.0, max=17.2
    )

    assert summary.describe() == "self: float32 [24, 3], 1 NaN, 24,000 zero, range 0 .. 17.2"


def test_a_number_is_described_by_its_value() -> None:
    assert TensorSummary(name="lr", dtype="", shape=(), numel=0, value="nan").describe() == "lr = nan"


def test_json_has_no_nan_so_plain_writes_words() -> None:
    assert plain({"a": (math.nan, -math.inf), 1: [math.inf, 2.0]}) == {"a": ["nan", "-inf"], "1": ["inf", 2.0]}


def test_roles_and_phases_fit_the_byte_a_row_has_for_them() -> None:
    assert max(len(ROLES), len(PHASES)) <= 256
    assert {ROWS["tensors"]["role"].itemsize, ROWS["tensors"]["phase"].itemsize} == {1}
