import time

import pytest
import torch
from torch import Tensor

from trainers.graph import acyclicity, has_cycle, lasso, standardised, task_graph, task_responses, without_cycles


def chain(count: int = 4000) -> Tensor:
    """Task 0 drives 1 and 2, task 2 drives 3; noises of different size, so that the order can be told."""
    torch.manual_seed(0)
    noise = torch.randn(count, 4, dtype=torch.float64)
    first = noise[:, 0]
    second = 0.9 * first + 0.3 * noise[:, 1]
    third = -0.8 * first + 0.5 * noise[:, 2]
    return torch.stack([first, second, third, 0.7 * third + 0.6 * noise[:, 3]], 1)


def test_a_response_is_the_log_sum_exp_of_the_tasks_own_logits() -> None:
    logits = torch.randn(5, 4)

    responses = task_responses(logits, [range(2), range(2, 4)])

    expected = torch.stack([logits[:, :2].double().exp().sum(1).log(), logits[:, 2:].double().exp().sum(1).log()], 1)
    assert torch.allclose(responses, expected)


def test_the_temporal_graph_finds_who_drives_whom() -> None:
    graph = task_graph(chain(), 0.05)

    assert torch.equal(graph, graph.triu(1))
    edges = {(i, j) for i, j in graph.nonzero().tolist() if abs(graph[i, j]) > 0.1}
    assert edges == {(0, 1), (0, 2), (2, 3)}
    assert graph[0, 2] < 0 < graph[0, 1]
    assert acyclicity(graph) == pytest.approx(0, abs=1e-12)


def test_each_column_is_a_lasso_regression() -> None:
    data = standardised(chain(500))
    gram = data.T @ data / len(data)

    weights = lasso(gram, 0.1, torch.ones(4, 4, dtype=torch.float64).triu(1))

    for task in range(1, 4):  # the conditions for an optimum: correlation with the residual is at most the penalty
        slopes = data[:, :task].T @ (data[:, task] - data[:, :task] @ weights[:task, task]) / len(data)
        used = weights[:task, task] != 0
        assert torch.allclose(slopes[used], 0.1 * weights[:task, task][used].sign(), atol=1e-6)
        assert (slopes.abs() <= 0.1 + 1e-6).all()


@pytest.mark.parametrize("sparsity", [1.0, 5.0])
def test_a_strong_penalty_leaves_no_edge(sparsity: float) -> None:
    assert not task_graph(chain(200), sparsity).any()


def test_the_free_graph_is_acyclic_and_close_to_the_truth() -> None:
    graph = task_graph(chain(), 0.05, "free")

    assert not has_cycle(graph)
    assert acyclicity(graph) == pytest.approx(0, abs=1e-12)
    linked = {frozenset(pair) for pair in graph.nonzero().tolist() if abs(graph[tuple(pair)]) > 0.2}
    assert {frozenset((0, 1)), frozenset((0, 2)), frozenset((2, 3))} <= linked


def test_a_constant_response_has_no_edges_and_no_nan() -> None:
    responses = chain(100)
    responses[:, 1] = 3.0

    for order in ("temporal", "free"):
        graph = task_graph(responses, 0.05, order)
        assert graph.isfinite().all()
        assert not graph[1].any()
        assert not graph[:, 1].any()


def test_cycles_are_seen_and_broken_at_their_weakest_edge() -> None:
    graph = torch.zeros(3, 3)
    graph[0, 1], graph[1, 2], graph[2, 0], graph[0, 2] = 0.9, 0.5, 0.2, 0.001

    broken = without_cycles(graph)

    assert has_cycle(graph)
    assert broken.nonzero().tolist() == [[0, 1], [1, 2]]


def test_twenty_tasks_take_milliseconds_and_draw_no_random_number() -> None:
    torch.manual_seed(1)
    responses = torch.randn(500, 20)
    state, started = torch.get_rng_state(), time.process_time()

    task_graph(responses, 0.1)

    assert time.process_time() - started < 0.5  # 15 ms where it was written
    assert torch.equal(state, torch.get_rng_state())
