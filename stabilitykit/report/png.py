"""The report as one image: verdict, layer x step map, loss, gradient norm; through matplotlib's objects, no pyplot."""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import StrMethodFormatter

from stabilitykit.analyse.findings import Findings, analyse, role_name
from stabilitykit.analyse.grid import INF, MISSING, NAN
from stabilitykit.analyse.wording import count, plural, printable, sentence
from stabilitykit.report.curve_data import Panel, panels
from stabilitykit.report.figure_data import chosen_rows, leading_role, origin_row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stabilitykit.analyse.layer_map import LayerMap
    from stabilitykit.read import Run
    from stabilitykit.schema import Origin

MAX_ROWS = 120
MAX_LABELS = 30
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")  # Okabe-Ito
NAN_COLOUR, INF_COLOUR, MISSING_COLOUR = "#D6006C", "#FF7A00", "#A3A7B0"
STYLE: dict[Any, Any] = {
    "font.size": 10.0,
    "axes.grid": True,
    "grid.alpha": 0.35,
    "agg.path.chunksize": 10_000,
    "axes.titlesize": 11.0,
}
SHOWN_PANELS = ("loss", "gradient")


def render(run: Run) -> bytes:
    """PNG bytes, 1,320 pixels wide; the verdict is in the title and in the file's `Title` and `Description`."""
    findings = analyse(run)
    shown = [panel for panel in panels(findings) if panel.key in SHOWN_PANELS]
    layer_map = next((entry for entry in findings.maps if entry.role == _role(findings)), None)
    with mpl.rc_context(STYLE):
        figure = _figure(run, findings, layer_map, shown)
        stream = io.BytesIO()
        title = sentence(printable(findings.headline, 1_000))
        facts = {"Title": title, "Description": findings.ending, "Software": "stabilitykit"}
        figure.savefig(stream, format="png", metadata=facts)
    return stream.getvalue()


def _role(findings: Findings) -> str:
    return leading_role(findings.maps, findings.diagnoses[0] if findings.diagnoses else None)


def _figure(run: Run, findings: Findings, layer_map: LayerMap | None, shown: list[Panel]) -> Figure:
    heights = ([min(2.6, 0.8 + 0.06 * len(layer_map.names))] if layer_map else []) + [1.0] * len(shown)
    figure = Figure(figsize=(11.0, 1.6 + 1.9 * sum(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    title = textwrap.fill(sentence(printable(findings.headline, 600)).replace("`", ""), 96)
    ending = textwrap.fill(printable(findings.ending, 400).replace("`", ""), 130)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", parse_math=False)
    if not heights:
        figure.text(0.01, 0.3, ending, parse_math=False)
        return figure
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    axes[0].set_title(ending, loc="left", fontsize=9.5, color="#565c6a", parse_math=False)
    if layer_map:
        _draw_map(figure, axes[0], findings, layer_map)
    for place, panel in zip(axes[len(axes) - len(shown) :], shown, strict=True):
        _draw_panel(place, panel)
    for place in axes:
        _draw_marks(place, run, findings)
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes[-1].set_xlim(0, _end(run))
    return figure


def _draw_map(figure: Figure, axes: Axes, findings: Findings, layer_map: LayerMap) -> None:
    origin = findings.diagnoses[0].origin if findings.diagnoses else None
    keep = origin_row(layer_map, origin) if origin else None
    rows = chosen_rows(layer_map, keep, MAX_ROWS)
    grid = layer_map.overview
    change = grid.log10[rows].astype(np.float64) - np.nan_to_num(layer_map.early[rows])[:, None]
    change[~np.isfinite(change)] = np.nan
    high = float(np.clip(np.nanquantile(change, 0.999), 1, 6)) if np.isfinite(change).any() else 1.0
    extent = (grid.columns.start, grid.columns.stop, len(rows) - 0.5, -0.5)
    settings: dict[str, Any] = {"extent": extent, "aspect": "auto", "interpolation": "nearest"}
    image = axes.imshow(change, cmap="viridis", vmin=-1, vmax=high, **settings)
    axes.imshow(_overlay(grid.state[rows], np.isneginf(grid.log10[rows])), **settings)
    axes.grid(visible=False)
    bar = figure.colorbar(image, ax=axes, extend="both", pad=0.01, fraction=0.03)
    bar.set_label("powers of ten against\nits early median")
    _label_rows(axes, layer_map, rows, keep)
    if origin and keep is not None and keep in rows:
        place = int(np.flatnonzero(rows == keep)[0])
        _ring(axes, origin, place)
    shown = f"{count(len(rows))} of {plural(len(layer_map.names), 'tensor')}"
    _legend(axes, grid.state[rows], f"{role_name(layer_map.role)}, {shown}")


def _ring(axes: Axes, origin: Origin, place: int) -> None:
    """A ring and words at the origin, since the cell itself may be thinner than a pixel."""
    for colour, width in (("white", 4), (NAN_COLOUR, 2)):
        ring: dict[str, Any] = {"markersize": 13, "fillstyle": "none", "markeredgewidth": width, "clip_on": False}
        axes.plot([origin.step + 0.5], [place], "o", color=colour, **ring)
    what = "NaN" if origin.kind == "nan" else "Inf"
    left = origin.step > (axes.get_xlim()[0] + axes.get_xlim()[1]) / 2
    axes.annotate(
        f"first {what}, step {count(origin.step)}",
        (origin.step + 0.5, place),
        xytext=(-14 if left else 14, 22),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        color="white",
        fontweight="bold",
        bbox={"boxstyle": "square,pad=0.3", "facecolor": "#B4004E", "edgecolor": "none"},
    )


def _overlay(state: npt.NDArray[np.uint8], zero: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """What has no colour on the scale, as an image of its own: a masked array would show NaN and missing alike."""
    pixels = np.zeros((*state.shape, 4))
    for code, colour in ((MISSING, MISSING_COLOUR), (INF, INF_COLOUR), (NAN, NAN_COLOUR)):
        pixels[state == code] = mpl.colors.to_rgba(colour)
    pixels[zero & (state != INF) & (state != NAN)] = mpl.colors.to_rgba("#440154")
    return pixels


def _label_rows(axes: Axes, layer_map: LayerMap, rows: npt.NDArray[np.int64], keep: int | None) -> None:
    every = -(-len(rows) // MAX_LABELS)
    marked = [place for place, row in enumerate(rows.tolist()) if row == keep]
    places = [place for place in range(0, len(rows), every) if all(abs(place - other) >= every for other in marked)]
    places = sorted([*places, *marked])
    labels = [printable(layer_map.names[rows[place]], 34) for place in places]
    axes.set_yticks(places, labels, fontsize=7.5, family="monospace", parse_math=False)
    for place, label in zip(places, axes.get_yticklabels(), strict=True):
        if place in marked:
            label.set(color="#B4004E", fontweight="bold")


def _legend(axes: Axes, state: npt.NDArray[np.uint8], what: str) -> None:
    known = (("NaN", NAN, NAN_COLOUR), ("Inf", INF, INF_COLOUR), ("not recorded", MISSING, MISSING_COLOUR))
    patches = [Patch(facecolor=colour, label=label) for label, code, colour in known if (state == code).any()]
    axes.set_ylabel(what)
    if patches:
        axes.legend(handles=patches, loc="upper left", fontsize=8, ncols=3, framealpha=0.95)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    if panel.logarithmic:
        axes.set_yscale("log")
    for curve, colour in zip(panel.curves, COLOURS, strict=False):
        finite = np.isfinite(curve.values)
        steps, values = (panel.steps[finite], curve.values[finite]) if curve.sparse else (panel.steps, curve.values)
        values = np.where(np.isfinite(values), values, np.nan)
        marker = "." if len(values) < 40 else ""
        (drawn,) = axes.plot(steps, values, color=colour, linewidth=1.0, marker=marker)
        drawn.set_label(curve.label.lstrip("_") or "value")
        for first, last, kind in curve.gaps:
            colour_of = NAN_COLOUR if kind == "nan" else INF_COLOUR
            axes.axvspan(first, last + 1, ymin=0.94, color=colour_of, linewidth=2)
    axes.set_ylabel(panel.title, parse_math=False)
    if len(panel.curves) > 1:
        above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.1, "frameon": False}
        legend = axes.legend(fontsize=8, ncols=8, **above)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _draw_marks(axes: Axes, run: Run, findings: Findings) -> None:
    for span in findings.tasks[1:]:
        axes.axvline(span.first_step, color="#565c6a", linewidth=0.8, linestyle=":")
    if findings.diagnoses:
        axes.axvline(findings.diagnoses[0].origin.step + 0.5, color=NAN_COLOUR, linewidth=1.4, linestyle="--")
    if run.ending in {"killed", "raised"}:
        axes.axvspan(run.last_step + 1, _end(run), facecolor="white", edgecolor="#c3c7d0", hatch="////", linewidth=0)


def _end(run: Run) -> int:
    steps = run.last_step + 1
    return steps + max(1, steps // 25) if run.ending in {"killed", "raised"} else max(steps, 1)
