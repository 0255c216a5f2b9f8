import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainers.binomial import exact_interval


@pytest.mark.parametrize(
    ("successes", "runs", "low", "high"),
    [(10, 10, 0.6915, 1.0), (0, 10, 0.0, 0.3085), (5, 10, 0.1871, 0.8129), (999, 1000, 0.99444, 0.999975)],
)
def test_the_limits_are_those_of_the_tables(successes: int, runs: int, low: float, high: float) -> None:
    assert exact_interval(successes, runs) == pytest.approx((low, high), abs=1e-4)


def test_a_thousand_of_a_thousand_do_not_prove_999_in_a_thousand() -> None:
    assert exact_interval(1000, 1000)[0] == pytest.approx(0.025 ** (1 / 1000))
    assert exact_interval(1000, 1000)[0] < 0.999


@given(runs=st.integers(1, 300), data=st.data())
def test_the_interval_holds_the_rate_and_mirrors_for_failures(runs: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, runs))

    low, high = exact_interval(successes, runs)
    mirrored = exact_interval(runs - successes, runs)

    assert low <= successes / runs <= high
    assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-9)
