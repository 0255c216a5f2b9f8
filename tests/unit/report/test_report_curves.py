import numpy as np

from stabilitykit.analyse.findings import analyse
from stabilitykit.read import Run
from stabilitykit.report.curve_data import nonfinite_spans, panels

NAN, INF = float("nan"), float("inf")


def test_spans_of_nan_and_inf_are_told_apart() -> None:
    values = np.array(
        [1.0, 2.0, 3.0, 4.0, INF, INF, 5.0, 6.0, 7.0, 8.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0, NAN]
    )

    assert nonfinite_spans(np.arange(21) * 10, values) == ((40, 50, "inf"), (200, 200, "nan"))
    assert nonfinite_spans(np.arange(0), np.array([])) == ()


def test_a_curve_measured_now_and_then_has_no_marks_and_no_holes() -> None:
    values = np.array([1.0, NAN, NAN, NAN] * 5 + [NAN])

    assert nonfinite_spans(np.arange(21), values) == ()


def test_panels_show_both_gradient_norms_where_clipping_acted(diverging: Run, one_step: Run) -> None:
    clipped = {panel.key: panel for panel in panels(analyse(diverging))}["gradient"]
    unclipped = {panel.key: panel for panel in panels(analyse(one_step))}["gradient"]

    assert [curve.label for curve in clipped.curves] == ["before clipping", "after clipping"]
    assert [curve.label for curve in unclipped.curves] == ["gradient norm"]
    assert clipped.logarithmic
    assert clipped.curves[0].gaps == ((239, 239, "nan"),)
