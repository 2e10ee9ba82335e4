"""Charts of reports, as inline SVG in the colours of the page."""

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from training.evaluation.measurements import Bin, Curve, Figure, OperatingPoint, Paired, Ranking

# matplotlib needs literal colours. In the SVG each is replaced by a CSS variable of the page, which differs
# between light and dark mode.
_COLOURS: Final = {
    "#010101": "--ink",
    "#020202": "--faint",
    "#030303": "--line",
    "#040404": "--one",
    "#050505": "--two",
    "#060606": "--three",
    "#070707": "--four",
}
_INK, _FAINT, _LINE, *_SERIES = _COLOURS
_MARKERS: Final = "osD^"
_DASHES: Final = ("-", "--", "-.", ":")
_WIDTH: Final = 8.0
_NARROW: Final = 6.4
# Any: newer versions of matplotlib type the keys, each version with different names.
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "faceprint",
    "font.size": 8.5,
    "text.color": _INK,
    "axes.labelcolor": _FAINT,
    "axes.edgecolor": _LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _FAINT,
    "ytick.labelcolor": _FAINT,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class ChartRow:
    """A row of a chart: the model or a baseline, with a figure for each column."""

    name: str
    figures: Sequence[Figure | None]


def intervals(heads: Sequence[str], rows: Sequence[ChartRow], *, title: str) -> Markup:
    """Draws each figure as a dot with its interval, from 0 to 100%: a line per row, a panel per heading."""

    def draw(canvas: Canvas) -> None:
        axes = np.atleast_1d(canvas.subplots(1, len(heads), sharey=True))
        for column, (axis, head) in enumerate(zip(axes, heads, strict=True)):
            axis.set_title(head, fontsize=9, loc="left", color=_INK)
            _percents(axis, "x", ticks=5 if len(heads) < 4 else 3)
            for place, row in enumerate(rows):
                _dot(axis, row.figures[column], place)
        axes[0].set_yticks(range(len(rows)), [row.name for row in rows], color=_INK)
        axes[0].set_ylim(len(rows) - 0.5, -0.5)
        for axis in axes:
            axis.tick_params(axis="y", length=0)
            axis.grid(visible=False, axis="y")
            axis.spines["left"].set_visible(False)

    return _drawn(draw, height=0.75 + 0.32 * len(rows), title=title)


def _dot(axis: Axes, figure: Figure | None, place: int) -> None:
    if figure is None or figure.value is None:
        words = "not measured" if figure is None else "too few"
        axis.text(50, place, words, ha="center", va="center", color=_FAINT, fontstyle="italic")
        return
    value = 100 * figure.value
    colour = _SERIES[place % len(_SERIES)]
    if figure.low is not None and figure.high is not None:
        axis.plot([100 * figure.low, 100 * figure.high], [place, place], color=colour, lw=4, alpha=0.35)
    axis.plot([value], [place], _MARKERS[place % 4], color=colour, ms=6)
    side = -1 if value > 60 else 1
    edge = 100 * ((figure.low if side < 0 else figure.high) or figure.value)
    axis.annotate(
        f"{value:.1f}", (edge, place), (side * 7, 0), textcoords="offset points", va="center",
        ha="right" if side < 0 else "left", color=_INK,
    )  # fmt: skip


def cmc(rows: Sequence[tuple[str, Ranking]], *, title: str) -> Markup | None:
    """Draws CMC curves: the share of searches with the right person among the k nearest people.

    Returns None if there are too few searches.
    """
    known = [(name, ranking.cmc) for name, ranking in rows if ranking.cmc and ranking.cmc[0].known]
    if not known:
        return None

    def draw(canvas: Canvas) -> None:
        axis = canvas.subplots()
        for place, (name, figures) in enumerate(known):
            _cmc_curve(axis, place, name, figures)
        _percents(axis, "y")
        axis.set_xlabel("k, people from the nearest on")
        axis.set_ylabel("right person among them")
        axis.set_xticks([1, 5, 10, 15, 20])
        _legend(axis, "lower right")

    return _drawn(draw, height=3.2, title=title, width=_NARROW)


def _cmc_curve(axis: Axes, place: int, name: str, figures: Sequence[Figure]) -> None:
    ranks = np.arange(1, len(figures) + 1)
    values = [100 * (one.value or 0) for one in figures]
    if place == 0 and all(one.low is not None and one.high is not None for one in figures):
        low, high = ([100 * (end or 0) for end in ends] for ends in zip(*_ends(figures), strict=True))
        axis.fill_between(ranks, low, high, color=_SERIES[0], alpha=0.15, lw=0)
    axis.plot(ranks, values, _DASHES[place % 4], color=_SERIES[place % 4], label=name, lw=1.8)


def _ends(figures: Iterable[Figure]) -> Iterator[tuple[float | None, float | None]]:
    return ((one.low, one.high) for one in figures)


def det(rows: Sequence[tuple[str, Curve]], points: Sequence[OperatingPoint], *, title: str) -> Markup | None:
    """Draws DET curves: FNIR against FPIR, both logarithmic, with the operating points of the first curve.

    Returns None if no curve has a point that logarithmic axes can show.
    """
    known = [(name, *_positive(curve)) for name, curve in rows if len(curve.missed)]
    if not any(len(alarms) for _, alarms, _ in known):
        return None

    def draw(canvas: Canvas) -> None:
        axis = canvas.subplots()
        _logarithmic(axis, "x", min([alarms.min() for _, alarms, _ in known if len(alarms)] + _rates(points)))
        lowest = min(missed.min() for _, _, missed in known if len(missed))
        _logarithmic(axis, "y", min([lowest, *(one.missed.low or 1 for one in points)]))
        for place, (name, alarms, missed) in enumerate(known):
            _step(axis, place, name, alarms, missed)
        _mark(axis, points, lambda figure: figure)
        axis.set_xlabel("FPIR: strangers who are named")
        axis.set_ylabel("FNIR: enrolled who are not found")
        _legend(axis, "lower left")

    return _drawn(draw, height=4.2, title=title, width=_NARROW)


def roc(rows: Sequence[tuple[str, Curve]], points: Sequence[OperatingPoint], *, title: str) -> Markup | None:
    """Draws ROC curves: TAR against FAR, FAR logarithmic, with the operating points of the first curve.

    Returns None if no curve has a FAR above 0.
    """
    known = [(name, curve) for name, curve in rows if len(curve.missed)]
    shown = [rate for _, curve in known for rate in curve.false_alarms if rate]
    if not shown:
        return None

    def draw(canvas: Canvas) -> None:
        axis = canvas.subplots()
        _logarithmic(axis, "x", min(shown + _rates(points)))
        _percents(axis, "y")
        for place, (name, curve) in enumerate(known):
            alarms, missed = _positive(curve, both=False)
            _step(axis, place, name, alarms, 1 - missed, scale=100)
        _mark(axis, points, lambda figure: _complement(figure), scale=100)
        axis.set_xlabel("FAR: pairs of two people that are accepted")
        axis.set_ylabel("TAR: pairs of one person that are")
        _legend(axis, "lower right")

    return _drawn(draw, height=3.8, title=title, width=_NARROW)


def _rates(points: Sequence[OperatingPoint]) -> list[float]:
    """Returns the rates at which the miss rate is known."""
    return [point.rate for point in points if point.missed.known]


def _complement(figure: Figure) -> Figure:
    """Returns 1 - figure, such as TAR for the miss rate."""
    value, low, high = (None if end is None else 1 - end for end in (figure.value, figure.high, figure.low))
    return Figure(value, low, high, figure.n, figure.method)


def _positive(curve: Curve, *, both: bool = True) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Returns false alarm rates and miss rates of the points of a curve that logarithmic axes can show."""
    alarms, missed = np.array(curve.false_alarms), np.array(curve.missed)
    shown = (alarms > 0) & ((missed > 0) if both else True)
    return alarms[shown], missed[shown]


def _step(axis: Axes, place: int, name: str, x: Any, y: Any, *, scale: float = 1) -> None:
    style: dict[str, Any] = {"color": _SERIES[place % 4], "lw": 1.8, "label": name, "drawstyle": "steps-post"}
    axis.plot(x, scale * y, _DASHES[place % 4], **style)


def _mark(
    axis: Axes, points: Sequence[OperatingPoint], of: Callable[[Figure], Figure], *, scale: float = 1
) -> None:
    """Marks operating points with their intervals, and each rate with a thin line."""
    for point in points:
        axis.axvline(point.rate, color=_FAINT, lw=0.6, ls=(0, (2, 3)))
        figure = of(point.missed)
        if figure.value is None:
            continue
        if figure.low is not None and figure.high is not None:
            ends = [scale * figure.low, scale * figure.high]
            axis.plot([point.rate] * 2, ends, color=_SERIES[0], lw=4, alpha=0.35)
        axis.plot([point.rate], [scale * figure.value], "o", color=_SERIES[0], ms=6)


def _logarithmic(axis: Axes, which: str, lowest: float) -> None:
    """Makes an axis logarithmic, for shares from 0.8 times the lowest to 1, labelled in percent."""
    floor = lowest * 0.8
    ticks = [digit * 10.0**power for power in range(-6, 1) for digit in (1, 3)]
    if floor > 0.05:
        ticks = [digit / 100 for digit in (5, 10, 20, 30, 40, 60, 80, 100)]
    shown = [tick for tick in ticks if floor <= tick <= 1]
    side = axis.xaxis if which == "x" else axis.yaxis
    (axis.set_xscale if which == "x" else axis.set_yscale)("log")
    (axis.set_xlim if which == "x" else axis.set_ylim)(floor, 1.0)
    side.set_major_locator(FixedLocator(shown))
    side.set_minor_locator(NullLocator())
    side.set_minor_formatter(NullFormatter())
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))


def _percents(axis: Axes, which: str, *, ticks: int = 5) -> None:
    side = axis.xaxis if which == "x" else axis.yaxis
    # A dot at 0 or 100% is not cut off.
    (axis.set_xlim if which == "x" else axis.set_ylim)(-2, 102)
    side.set_major_locator(FixedLocator(np.linspace(0, 100, ticks).tolist()))
    side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))


def reliability(bins: Sequence[Bin], *, title: str) -> Markup | None:
    """Draws the reliability diagram of the classifier, with the number of photos in each bin.

    Returns None if all bins are empty.
    """
    filled = [one for one in bins if one.confidence is not None and one.accuracy is not None]
    if not filled:
        return None

    def draw(canvas: Canvas) -> None:
        above, below = canvas.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        above.plot([0, 100], [0, 100], color=_FAINT, lw=1, ls=(0, (2, 3)), label="what it should be")
        sure = [100 * (one.confidence or 0) for one in filled]
        right = [100 * (one.accuracy or 0) for one in filled]
        above.vlines(sure, sure, right, color=_SERIES[1], lw=3, alpha=0.4)
        above.plot(sure, right, "o", color=_SERIES[0], ms=5, label="held-out photos")
        _percents(above, "y")
        above.set_ylabel("right")
        _legend(above, "lower right")
        middles = [50 * (one.low + one.high) for one in bins]
        below.bar(middles, [one.n for one in bins], 90 / len(bins), color=_SERIES[0], alpha=0.5)
        below.set_ylabel("photos")
        _percents(below, "x")
        below.set_xlabel("probability of the likeliest person")

    return _drawn(draw, height=4.4, title=title, width=_NARROW)


def differences(tests: Sequence[Paired], *, title: str) -> Markup | None:
    """Draws B - A with its interval for each figure, in percentage points; None if no difference is known."""
    known = [(test.name, test.difference) for test in tests if test.difference.value is not None]
    if not known:
        return None

    def draw(canvas: Canvas) -> None:
        axis = canvas.subplots()
        axis.axvline(0, color=_FAINT, lw=1)
        for place, (_, step) in enumerate(known):
            low, value, high = (100 * (end if end is not None else step.value or 0)
                                for end in (step.low, step.value, step.high))  # fmt: skip
            axis.plot([low, high], [place, place], color=_SERIES[0], lw=4, alpha=0.35)
            axis.plot([value], [place], "o", color=_SERIES[0], ms=6)
        axis.set_yticks(range(len(known)), [name for name, _ in known], color=_INK)
        axis.set_ylim(len(known) - 0.5, -0.5)
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=False, axis="y")
        reach = 1.1 * max(abs(edge) for edge in (*axis.get_xlim(), 0.5))
        axis.set_xlim(-reach, reach)
        axis.set_xlabel("percentage points; A is better to the left, B to the right")

    return _drawn(draw, height=0.9 + 0.32 * len(known), title=title)


def _legend(axis: Axes, where: Any) -> None:
    axis.legend(loc=where, labelcolor=_INK, handlelength=2.6)


def _drawn(draw: Callable[[Canvas], None], *, height: float, title: str, width: float = _WIDTH) -> Markup:
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        draw(canvas)
        file = io.StringIO()
        bare = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(file, format="svg", metadata=bare, transparent=True)
    return Markup(_inlined(file.getvalue(), title))


def _inlined(svg: str, title: str) -> str:
    """Converts an SVG file to inline SVG: without prolog and styles, with ids that are unique in the page."""
    own = re.sub(r"[^a-z]+", "-", title.lower()).strip("-")
    body = svg[svg.index("<svg") :]
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body)[0]
    # Comments repeat the text of labels; a style element would apply to the whole page.
    body = re.sub(r"<!--.*?-->|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    body = re.sub(r'\bid="', f'id="{own}-', body)
    body = re.sub(r'(url\(|href=")#', rf"\1#{own}-", body)
    for colour, name in _COLOURS.items():
        body = body.replace(colour, f"var({name})")
    words = Markup("<title>{}</title>").format(title)
    head = f'<svg viewBox="0 0 {width} {height}" role="img" class="chart">{words}'
    return head + body[body.index(">") + 1 :]
