import numpy as np
import pandas as pd

from stabilitykit.analyse.buffer import buffer_health
from stabilitykit.analyse.timeline import TaskSpan, describe_ending, event_groups, guard_counts, skip_count, task_spans
from stabilitykit.schema import BUFFER_ROW


def events(*rows: tuple[int, str, str, str, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["step", "kind", "severity", "subject", "message"])


def test_tasks_are_spans_of_steps_and_unknown_tasks_none() -> None:
    spans = task_spans(np.arange(6), np.array([-1, 0, 0, 1, 1, 1]))

    assert spans == (TaskSpan(task=0, first_step=1, last_step=2), TaskSpan(task=1, first_step=3, last_step=5))
    assert task_spans(np.arange(2), np.array([-1, -1])) == ()


def test_events_are_summed_up_by_kind_the_gravest_first() -> None:
    table = events(
        (1, "scaler_skip", "warning", "scaler", "first"),
        (9, "scaler_skip", "warning", "scaler", "second"),
        (5, "nonfinite", "error", "loss", "the loss is NaN"),
        (2, "guard", "info", "clip", "clipped"),
    )

    groups = event_groups(table)

    assert [(group.kind, group.num, group.first_step, group.last_step) for group in groups] == [
        ("nonfinite", 1, 5, 5),
        ("scaler_skip", 2, 1, 9),
    ]
    assert groups[1].example == "first"
    assert groups[1].subjects == ("scaler",)


def test_a_guard_that_never_acted_is_counted_as_never() -> None:
    table = events((2, "guard", "info", "clip", "a"), (7, "guard", "info", "clip", "b"), (8, "task", "info", "", ""))

    counts = guard_counts(table, {"precision": None, "validation": 3})

    assert [(guard.name, guard.acted, guard.example) for guard in counts] == [
        ("precision", 0, ""),
        ("validation", 3, ""),
        ("clip", 2, "b"),
    ]


def test_skipped_steps_are_counted() -> None:
    skipped = skip_count(pd.DataFrame({"step": [3, 4, 5], "skipped": [0, 1, 1]}))

    assert (skipped.num, skipped.first_step) == (2, 4)


def test_each_ending_is_a_sentence() -> None:
    assert describe_ending("completed", 9, {}, 2.0, "") == "The run completed 10 steps in 2 s."
    assert (
        describe_ending("raised", 9, {"step": 10, "error": "boom"}, 0.0, "verdict") == "The run raised at step 10: boom"
    )
    assert describe_ending("raised", 9, {"error": "x: verdict"}, 0.0, "verdict") == "The run raised at step 9."
    assert describe_ending("killed", 9, {}, 0.0, "").startswith("The process was killed; the last step on disk is 9.")
    assert describe_ending("killed", -1, {}, 0.0, "") == "No step was recorded; the run was killed."


def test_buffer_measures_are_first_last_and_worst_and_alarms_come_first() -> None:
    rows = np.zeros(3, BUFFER_ROW)
    rows["bad_logits"], rows["class_balance"] = [0, 2, 1], [0.9, 0.4, 0.8]
    rows["duplicates"], rows["age"] = -1, np.nan
    table = pd.DataFrame(rows).assign(step=[0, 50, 100])

    measures = buffer_health(table)

    assert measures[0].name == "Slots with bad logits"
    assert (measures[0].alarm, measures[0].worst, measures[0].worst_step, measures[0].last) == (True, 2, 50, 1)
    balance = next(measure for measure in measures if measure.name == "Class balance")
    assert (balance.worst, balance.worst_step) == (0.4, 50)
    assert not {"Duplicates", "Mean age"} & {measure.name for measure in measures}


def test_a_measure_may_be_negative_but_a_count_of_minus_one_was_not_taken() -> None:
    rows = np.zeros(2, BUFFER_ROW)
    rows["example_min"], rows["least_held"] = [-2.0, -3.0], -1
    table = pd.DataFrame(rows).assign(step=[0, 50])

    measures = {measure.name: measure for measure in buffer_health(table)}

    assert (measures["Least value of an example"].worst, measures["Least value of an example"].worst_step) == (-3.0, 50)
    assert "Rarest class" not in measures
