import math

import pytest

from trainers.comparison import METRICS, compare, difference, spread, student_quantile


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (30, 2.04227), (1000, 1.96234)]
)
def test_students_quantile_is_the_one_in_the_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(quantile, rel=1e-5)


def test_a_paired_difference_takes_out_what_the_seed_does_to_both() -> None:
    found = difference([1.0, 2.0, 3.0])

    assert (found.num_pairs, found.mean) == (3, 2.0)
    assert found.high - found.mean == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert found.low == pytest.approx(2 * found.mean - found.high)


def test_one_pair_has_no_limits_and_none_no_mean() -> None:
    assert (difference([1.0]).low, difference([1.0]).high) == (-math.inf, math.inf)
    assert math.isnan(difference([]).mean)


def test_runs_without_a_number_are_left_out_of_the_spread() -> None:
    found = spread([1.0, math.nan, 3.0])

    assert (found.num_runs, found.mean, found.sd) == (2, 2.0, pytest.approx(math.sqrt(2)))


def test_methods_are_compared_over_the_seeds_they_share() -> None:
    def run(accuracy: float) -> dict[str, float]:
        return dict.fromkeys(METRICS, accuracy)

    scores = {"derpp": {0: run(10), 1: run(20), 2: run(30)}, "er": {1: run(21), 2: run(33), 7: run(99)}}

    base, other = compare(scores, "derpp")

    assert base.differences == {}
    assert base.spreads["class_il"].mean == 20
    assert other.differences["class_il"].num_pairs == 2
    assert other.differences["class_il"].mean == 2
