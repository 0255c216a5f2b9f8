from stabilitykit.monitor.skips import Skips
from stabilitykit.watch.reading import Reading

GOOD = Reading(losses={}, stepped=True)
SKIPPED = Reading(losses={}, stepped=False, bad_gradients=["weight"])


def test_only_the_first_skip_after_a_step_that_was_taken_is_odd() -> None:
    skips = Skips(scaled=True)

    assert [skips.odd(entry) for entry in (SKIPPED, SKIPPED, GOOD, SKIPPED, SKIPPED, GOOD)] == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]


def test_without_a_scaler_no_skip_is_odd() -> None:
    skips = Skips(scaled=False)

    assert not any(skips.odd(entry) for entry in (GOOD, SKIPPED))
