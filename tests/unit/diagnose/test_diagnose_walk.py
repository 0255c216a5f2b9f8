"""The walk from a symptom to its origin, on graphs made by hand."""

from __future__ import annotations

import math
from typing import Any

from stabilitykit.diagnose import walk
from stabilitykit.diagnose.graph import Edge, Leaf, Operation, Symptom
from stabilitykit.diagnose.walk import Finding, find_origin, followed, trace_back
from stabilitykit.schema import TensorSummary

SIZE = 4


def summary(*, nan: int = 0, posinf: int = 0, neginf: int = 0) -> TensorSummary:
    return TensorSummary(name="", dtype="float32", shape=(SIZE,), numel=SIZE, nan=nan, posinf=posinf, neginf=neginf)


def op(index: int, name: str, *edges: Edge, places: bool = False, **counts: int) -> Operation:
    return Operation(
        index=index,
        op=name,
        kernel=name,
        phase="forward",
        module="",
        output=summary(**(counts or {"nan": 1})),
        edges=list(edges),
        places_constant=places,
    )


def leaf(kind: Any = "batch", **counts: int) -> Leaf:
    return Leaf(kind, "x", summary(**(counts or {"nan": 1})))


def edge(source: Operation | Leaf) -> Edge:
    held = source.output if isinstance(source, Operation) else source.summary
    return Edge("self", source, nan=held.nan > 0)


def noticed(source: Operation | Leaf, name: str = "loss") -> Symptom:
    return Symptom("loss", name, source)


def never(_leaf: Leaf) -> bool:
    return False


def test_the_origin_is_the_operation_whose_inputs_were_all_finite() -> None:
    log = op(1, "log", neginf=1)
    product = op(2, "mul", edge(log))
    loss = op(3, "mean", edge(product))

    found = find_origin([noticed(loss)])

    assert found is not None
    assert found.origin is log
    assert found.path == (log, product, loss)
    assert found.kind == "inf"


def test_a_leaf_that_was_bad_before_the_step_is_the_origin() -> None:
    batch = leaf()
    first = op(1, "addmm", edge(batch))

    found = find_origin([noticed(op(2, "mean", edge(first)))])

    assert found.origin is batch
    assert found.entry.source is batch
    assert found.kind == "nan"
    assert found.moment == 1


def test_of_an_inf_and_a_nan_input_of_a_nan_the_nan_is_followed() -> None:
    mask = op(1, "log", neginf=1)
    division = op(2, "div", nan=1)
    total = op(3, "add", edge(mask), edge(division))

    assert followed(total) == [total.edges[1]]
    assert find_origin([noticed(total)]).origin is division


def test_an_inf_is_followed_where_no_input_was_nan() -> None:
    overflow = op(1, "exp", posinf=1)
    difference = op(2, "sub", edge(overflow), nan=1)

    assert find_origin([noticed(difference)]).origin is overflow


def test_of_two_causes_the_earlier_is_the_origin() -> None:
    later, earlier = op(5, "log"), op(2, "div")
    total = op(6, "add", edge(later), edge(earlier))

    assert find_origin([noticed(total)]).origin is earlier


def test_of_two_symptoms_the_one_with_the_earliest_origin_is_told() -> None:
    backward, forward = op(9, "sqrt"), op(2, "exp")

    found = find_origin([noticed(backward, "gradient"), noticed(forward, "loss")])

    assert (found.origin, found.symptom.name) == (forward, "loss")


def test_without_symptoms_there_is_no_origin() -> None:
    assert find_origin([]) is None


def test_an_intended_constant_that_turns_into_a_nan_is_told_at_the_operation_that_turned_it() -> None:
    fill = op(1, "masked_fill", places=True, neginf=SIZE)
    softmax = op(2, "softmax", edge(fill), nan=SIZE)
    output = op(3, "bmm", edge(softmax))

    found = find_origin([noticed(output)])

    assert found.origin is softmax
    assert found.path == (softmax, output)


def test_an_intended_constant_whose_sign_is_turned_did_harm_there() -> None:
    fill = op(1, "full", places=True, neginf=1)
    negated = op(2, "neg", edge(fill), posinf=1)
    loss = op(3, "sum", edge(negated), posinf=1)

    assert find_origin([noticed(loss)]).origin is negated


def test_an_intended_constant_that_leaves_nothing_finite_did_harm_there() -> None:
    fill = op(1, "masked_fill", places=True, neginf=1)
    shifted = op(2, "add", edge(fill), neginf=1)
    maximum = op(3, "amax", edge(shifted), neginf=SIZE)

    assert find_origin([noticed(maximum)]).origin is maximum


def test_a_constant_that_was_only_put_in_place_is_no_fault() -> None:
    reset = op(1, "fill", places=True, posinf=SIZE)

    assert find_origin([noticed(reset)]) is None


def test_an_intended_leaf_is_walked_past_and_an_unintended_one_is_not() -> None:
    mask = leaf("module_buffer", neginf=SIZE)
    softmax = op(1, "softmax", edge(mask), nan=SIZE)

    assert trace_back(noticed(softmax), lambda _leaf: True).origin is softmax
    assert trace_back(noticed(softmax), never).origin is mask


def test_a_constant_that_a_module_buffer_keeps_as_it_is_is_no_fault_there() -> None:
    mask = op(1, "full", places=True, neginf=SIZE)
    kept = op(2, "triu", edge(mask), neginf=1)
    turned = op(3, "mul", edge(mask), nan=1)

    assert trace_back(Symptom("module_buffer", "mask", kept), never) is None
    assert trace_back(Symptom("module_buffer", "mask", turned), never).origin is turned
    assert trace_back(Symptom("loss", "loss", kept), never).origin is kept


def test_a_real_cause_beside_an_intended_constant_is_the_origin() -> None:
    fill = op(1, "masked_fill", places=True, neginf=1)
    overflow = op(2, "exp", posinf=1)
    total = op(3, "add", edge(fill), edge(overflow), nan=1)

    assert find_origin([noticed(total)]).origin is overflow


def test_a_graph_with_shared_and_deep_paths_is_walked_once() -> None:
    source = op(0, "log")
    current = source
    for index in range(1, 5000):
        current = op(index, "add", edge(current), edge(current))

    found = find_origin([noticed(current)])

    assert found.origin is source
    assert len(found.path) == 5000


def test_the_moment_of_a_leaf_is_when_it_was_read() -> None:
    assert Finding(leaf(), noticed(leaf()), (op(7, "mul"),)).moment == 7
    assert Finding(leaf(), noticed(leaf()), ()).moment == -1


def test_kind_is_what_the_edge_brought_in_not_what_the_whole_leaf_holds() -> None:
    both = leaf(nan=1, posinf=1)
    only_inf_was_read = Edge("self", both, nan=False)

    found = find_origin([noticed(op(1, "sum", only_inf_was_read, posinf=1))])

    assert found.kind == "inf"
    assert math.isfinite(found.moment)


def test_a_deep_network_whose_every_weight_was_bad_is_walked_in_the_time_of_its_operations(monkeypatch) -> None:
    """A path for each cause made the walk cubic: minutes for a thousand layers."""
    depth = 300
    bad = [leaf("parameter") for _ in range(depth)]
    last = op(0, "mul", edge(bad[0]))
    for index in range(1, depth):
        last = op(index, "mul", edge(last), edge(bad[index]))
    paths: list[object] = []
    path_from = walk._Search.path_from
    monkeypatch.setattr(walk._Search, "path_from", lambda *given: paths.append(given) or path_from(*given))

    found = find_origin([noticed(last), noticed(last, "clipped")])

    assert found is not None
    assert found.origin is bad[0]
    assert found.symptom.name == "loss"
    assert len(paths) == 1


def test_operations_whose_values_met_are_rivals_in_the_order_they_ran() -> None:
    mask = op(1, "log", neginf=1)
    scores = op(2, "bmm", posinf=1)
    joined = op(3, "add", edge(mask), edge(scores), neginf=1, posinf=1)

    found = find_origin([noticed(op(4, "softmax", edge(joined)))])

    assert found is not None
    assert found.origin is mask
    assert [rival.origin for rival in found.rivals] == [mask, scores]


def test_one_place_has_no_rivals() -> None:
    first, second = op(1, "div", posinf=1), op(2, "div", posinf=1)

    found = find_origin([noticed(op(3, "add", edge(first), edge(second)))])

    assert found is not None
    assert found.rivals == ()
