"""The HTML report of an evaluation, or of a comparison of two, as one self-contained file."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from markupsafe import Markup

from retrieval.errors import FaceprintError, Reason, UnreadableImage
from retrieval.pages import html
from retrieval.sources import photos
from retrieval.sources.archives import Shelf
from retrieval.system.paths import is_url
from training.evaluation.measurements import (
    Closed,
    Comparison,
    Figure,
    Identification,
    Measured,
    Mistake,
    Open,
    Pairs,
    Verification,
)
from training.reports import charts, templates
from training.reports.charts import ChartRow
from training.reports.data_check import DataCheck

# The baselines by their names in metrics.json, and their names on pages.
NAMES: Final[Mapping[str, str]] = {
    "pixels": "raw pixels",
    "eigenfaces": "eigenfaces",
    "before": "before fine-tuning",
}
THIS: Final = "this model"

# The largest number of people, confusions and mistakes on the page. metrics.json has all people and
# confusions, and up to 50 mistakes.
PEOPLE_SHOWN: Final = 500
CONFUSIONS_SHOWN: Final = 15
MISTAKES_SHOWN: Final = 24

# Side of thumbnails in pixels: twice the displayed side, for screens and printers of high resolution.
_THUMBNAIL_SIDE: Final = 224

_HEADS: Final[Mapping[str, Sequence[str]]] = {
    "closed": ("closest image", "among 5 nearest people", "mean average precision"),
    "lfw-pairs": ("accuracy", "area under ROC", "TAR at FAR 0.01"),
}


@dataclass(frozen=True)
class Line:
    """A figure with its name; main figures are also shown as tiles."""

    name: str
    figure: Figure
    main: bool = False


@dataclass(frozen=True)
class Picture:
    """A photo on a page: a data URL, or the reason why there is none."""

    url: str | None
    why: str


@dataclass(frozen=True)
class Shown:
    """A mistake with its pictures: the probe, the nearest photo, and the right person's nearest photo."""

    mistake: Mistake
    query: Picture
    nearest: Picture
    right: Picture | None


def page(measured: Measured, data: Path, *, check: DataCheck | None = None) -> bytes:
    """Renders the report of an evaluation, with thumbnails of the photos that are in `data` now.

    A photo that can no longer be read is replaced by a box with the reason.
    """
    found = measured.closed or measured.open or measured.pairs
    if found is None:
        raise ValueError("an evaluation without figures")
    context = _context(found)
    mistakes = () if isinstance(found, Pairs) else found.mistakes[:MISTAKES_SHOWN]
    return templates.page(
        "evaluation.html.jinja",
        measured=measured,
        found=found,
        check=check,
        names=NAMES,
        this=THIS,
        mistakes=_pictures(mistakes, data),
        people_shown=PEOPLE_SHOWN,
        confusions_shown=CONFUSIONS_SHOWN,
        **context,
    )


def comparison_page(found: Comparison, a: Mapping[str, Any], b: Mapping[str, Any]) -> bytes:
    """Renders the page of a comparison; `a` and `b` are the two trees of metrics.json."""
    rows = [ChartRow(name, _sides(found, name)) for name in ("A", "B")]
    return templates.page(
        "comparison.html.jinja",
        found=found,
        sides=(("A", found.a, a), ("B", found.b, b)),
        settings=_settings(a, b),
        values=charts.intervals([test.name for test in found.tests], rows, title="Both side by side")
        if 0 < len(found.tests) < 5
        else None,
        steps=charts.differences(found.tests, title="Differences, B - A"),
        points=_points,
    )


def _points(difference: float) -> Markup:
    """Formats a difference of shares in percentage points, with its exact value in a `data` element."""
    return Markup('<data value="{}">{:+.1f}</data>').format(repr(difference), 100 * difference)


def _sides(found: Comparison, name: str) -> list[Figure]:
    return [test.a if name == "A" else test.b for test in found.tests]


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the facts of two models and evaluations, as rows (name, of A, of B)."""
    facts = [_facts(one) for one in (a, b)]
    names = list(dict.fromkeys([*facts[0], *facts[1]]))
    return [(name, facts[0].get(name, "–"), facts[1].get(name, "–")) for name in names]


def _facts(metrics: Mapping[str, Any]) -> dict[str, str]:
    model, data = metrics["model"], metrics["data"]
    return {
        "fingerprint": model["fingerprint"][:16],
        "labels": f"{model['labels']:,}",
        "input": f"{model['input_size']} pixels, crop {model['crop']:g}",
        "embedding": f"{model['dimension']:,} numbers",
        **{name.replace("_", " "): templates.setting(value) for name, value in model["recipe"].items()},
        "photos measured on": f"{data['embedded']:,} of {data['folder']}",
        "split": data["split"],
        "seed of the evaluation": str(data["seed"]),
    }


def _context(found: Closed | Open | Pairs) -> dict[str, Any]:
    """Returns the lines, rows and charts of a protocol, for the template."""
    if isinstance(found, Closed):
        return _closed(found)
    return _open(found) if isinstance(found, Open) else _pairs(found)


def _closed(found: Closed) -> dict[str, Any]:
    ranking = found.ranking
    lines = []
    if found.classifier is not None:
        calibration = found.classifier.calibration
        lines = [
            Line("Classifier: the likeliest person is right", found.classifier.accuracy, main=True),
            Line("Classifier: right among the likeliest 5", found.classifier.top5, main=True),
        ]
    lines += [
        Line("Closest image shows the right person", ranking.closest, main=True),
        Line("Right person among the 5 nearest", ranking.cmc[4], main=True),
        Line("Right person among the 20 nearest", ranking.cmc[19]),
    ]
    if ranking.mean_average_precision is not None:
        lines.append(Line("Mean average precision", ranking.mean_average_precision, main=True))
    if found.classifier is not None:
        lines.append(Line("Calibration error of the classifier (ECE)", calibration.error, main=True))
        if calibration.temperature is not None:
            lines.append(Line("ECE on one half of the photos", calibration.before))
            lines.append(Line(f"ECE there, at temperature {calibration.temperature:.2f}", calibration.after))
    rankings = [(THIS, ranking), *((NAMES[one.name], one.ranking) for one in found.baselines)]
    rows = [ChartRow(name, (one.closest, one.cmc[4], one.mean_average_precision)) for name, one in rankings]
    bins = () if found.classifier is None else found.classifier.calibration.bins
    return {
        "lines": lines,
        "rows": rows,
        "heads": _HEADS["closed"],
        "beside": charts.intervals(_HEADS["closed"], rows, title="This model beside the baselines"),
        "curve": charts.cmc(rankings, title="Right person among the k nearest"),
        "diagram": charts.reliability(bins, title="Reliability of the classifier"),
    }


def _open(found: Open) -> dict[str, Any]:
    own = found.identification
    lines = [Line(f"FNIR at FPIR {point.rate:g}", point.missed, main=True) for point in own.points]
    lines += [
        Line("Closest image of an enrolled person shows them", own.ranking.closest, main=True),
        Line("Right person among the 5 nearest", own.ranking.cmc[4]),
        Line("Right person among the 20 nearest", own.ranking.cmc[19]),
    ]
    if own.ranking.mean_average_precision is not None:
        lines.append(Line("Mean average precision", own.ranking.mean_average_precision))
    ways = [(THIS, own), *((NAMES[one.name], one.identification) for one in found.baselines)]
    heads = [f"FNIR at FPIR {point.rate:g}" for point in own.points] + ["closest image"]
    rows = [ChartRow(name, _of_open(one)) for name, one in ways]
    return {
        "lines": lines,
        "rows": rows,
        "heads": heads,
        "beside": charts.intervals(heads, rows, title="This model beside the baselines"),
        "curve": charts.det(
            [(name, one.curve) for name, one in ways], own.points, title="Misses against false alarms (DET)"
        ),
        "ranks": charts.cmc(
            [(name, one.ranking) for name, one in ways], title="Right person among the k nearest"
        ),
    }


def _of_open(one: Identification) -> list[Figure]:
    return [*(point.missed for point in one.points), one.ranking.closest]


def _pairs(found: Pairs) -> dict[str, Any]:
    lines = _of_verification(found.verification, "", main=True)
    if found.unseen is not None:
        lines += _of_verification(found.unseen, "Without people seen in training: ", main=False)
    ways = [(THIS, found.verification), *((NAMES[one.name], one.verification) for one in found.baselines)]
    rows = [ChartRow(name, (one.accuracy, one.area, turned(one.points[1].missed))) for name, one in ways]
    return {
        "lines": lines,
        "rows": rows,
        "heads": _HEADS["lfw-pairs"],
        "beside": charts.intervals(_HEADS["lfw-pairs"], rows, title="This model beside the baselines"),
        "curve": charts.roc(
            [(name, one.curve) for name, one in ways],
            found.verification.points,
            title="True accepts against false ones (ROC)",
        ),
    }


def _of_verification(found: Verification, about: str, *, main: bool) -> list[Line]:
    return [
        Line(f"{about}Accuracy over {len(found.folds)} folds", found.accuracy, main=main),
        Line(f"{about}Area under the ROC curve", found.area, main=main),
        *(
            Line(f"{about}TAR at FAR {point.rate:g}", turned(point.missed), main=main)
            for point in found.points
        ),
    ]


def turned(missed: Figure) -> Figure:
    """Returns 1 - `missed`, such as TAR for the miss rate, with its interval."""
    value, low, high = (None if end is None else 1 - end for end in (missed.value, missed.high, missed.low))
    return Figure(value, low, high, missed.n, missed.method)


def _pictures(mistakes: Iterable[Mistake], data: Path) -> list[Shown]:
    with Shelf() as shelf:
        return [
            Shown(
                one,
                _picture(one.path, data, shelf),
                _picture(one.nearest_path, data, shelf),
                None if one.right_path is None else _picture(one.right_path, data, shelf),
            )
            for one in mistakes
        ]


def _picture(path: str, data: Path, shelf: Shelf) -> Picture:
    if is_url(path):
        return Picture(None, "not on this machine")
    try:
        content, _ = photos.read_from(shelf, os.path.join(os.path.abspath(data), path))
        return Picture(html.thumbnail_url(content, side=_THUMBNAIL_SIDE), "")
    except UnreadableImage as error:
        missing = error.reason is Reason.MISSING
        return Picture(None, "photo is gone" if missing else f"it cannot be read: {error.detail}")
    except FaceprintError as error:
        return Picture(None, str(error))
