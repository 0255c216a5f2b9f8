import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stabilitykit.analyse.wording import count, duration, factor, listed, number, plural, printable


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (26597, "26,597"),
        (39.42, "39.42"),
        (0.03125, "0.0312"),
        (0.0012345, "0.00123"),
        (-0.5, "-0.5"),
        (1.2e-5, "1.2e-5"),
        (3.4028e38, "3.4e38"),
        (999_999.9, "1,000,000"),
        (math.nan, "NaN"),
        (-math.inf, "-Inf"),
        (None, "\N{EN DASH}"),
    ],
)
def test_numbers_read_as_people_write_them(value: float | None, text: str) -> None:
    assert number(value) == text


@given(st.floats(-1e307, 1e307))
def test_a_printed_number_is_close_to_the_number(value: float) -> None:
    printed = float(number(value).replace(",", ""))

    assert printed == pytest.approx(value, rel=0.06, abs=1e-320)


@given(st.text() | st.text("\x1b[0m]\x07\\;12H\u202e\udce4a", max_size=60))
def test_printable_text_acts_on_nothing_and_fits(text: str) -> None:
    clean = printable(text, 40)

    assert len(clean) <= 40
    assert all(character.isprintable() for character in clean)
    clean.encode("utf-8")


@given(st.text("abcdefghij._0123456789", max_size=200))
def test_an_ordinary_name_is_left_as_it_is(name: str) -> None:
    assert printable(name) == name


def test_a_long_name_keeps_both_its_ends() -> None:
    assert printable("model." + "x" * 1000 + ".weight", 20) == "model.xxxx\N{HORIZONTAL ELLIPSIS}xx.weight"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12.3 ms"), (12.34, "12.3 s"), (600, "10 min"), (250, "4 min 10 s"), (11_100, "3 h 5 min")],
)
def test_durations_have_two_units_at_most(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_words_agree_with_their_number() -> None:
    assert (plural(1, "step"), plural(2000, "step"), count(1234)) == ("1 step", "2,000 steps", "1,234")


def test_lists_say_how_many_they_leave_out() -> None:
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert listed([]) == ""


def test_decades_are_told_as_a_factor() -> None:
    assert factor(2) == "\N{MULTIPLICATION SIGN}100"
    assert factor(400) == "10^400"
