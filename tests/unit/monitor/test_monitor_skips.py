from stabilitykit.monitor.skips import Skips
from stabilitykit.watch.reading import Reading

GOOD = Reading(losses={}, stepped=True)
SKIPPED = Reading(losses={}, stepped=False, bad_gradients=["weight"])


def test_only_the_first_skip_after_a_step_that_was_taken_is_odd() -> None:
    skips = Skips(3)

    assert [skips.odd(entry) for entry in (SKIPPED, SKIPPED, GOOD, SKIPPED, SKIPPED, GOOD)] == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]


def test_without_a_scaler_no_skip_is_odd() -> None:
    skips = Skips(0)

    assert not any(skips.odd(entry) for entry in (GOOD, SKIPPED))


def test_a_scaler_that_skips_again_and_again_is_looked_into_so_often_and_no_more() -> None:
    skips = Skips(2)

    found = [skips.odd(entry) for _ in range(4) for entry in (GOOD, SKIPPED)]

    assert found == [False, True, False, True, False, False, False, False]
