"""The output of `faceprint evaluate`: progress, and tables of figures with their intervals."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from retrieval.console import terminal
from retrieval.console.progress import Bar, JsonLog, Progress, Total
from retrieval.errors import InputError
from retrieval.models.bundle import ModelBundle
from retrieval.system.signals import graceful
from training.evaluation import comparison, measure, measurements, result_files
from training.evaluation.measure import EvaluationOptions
from training.evaluation.measurements import (
    Closed,
    Comparison,
    Figure,
    Identification,
    Measured,
    Open,
    OperatingPoint,
    Pairs,
    Ranking,
    Verification,
)
from training.evaluation.observe import Watch
from training.reports import data_check, evaluation_report
from training.reports.evaluation_report import NAMES, THIS, turned

__all__ = ["EvaluationOptions", "compare", "evaluate"]

# The largest number of people, and of photos left out, that are printed; metrics.json has all of them.
_MAX_ROWS_SHOWN: Final = 10


def evaluate(
    model: Path,
    data: Path,
    *,
    options: EvaluationOptions,
    out: Path | None,
    as_json: bool,
    check: Path | None = None,
    log_json: bool = False,
) -> None:
    """Measures with a progress bar, writes results and their report to `out` if given, and prints them.

    With `log_json` it prints lines of JSON instead, the last one with the results.

    Raises:
        FaceprintError: as in `measure.measure`, `result_files.write` and `data_check.read`.
    """
    if out is not None:
        result_files.check_target(out)
    checked = None if check is None else data_check.read(check)
    measured, rows = _measured(model, data, options, log_json=log_json)
    if out is not None:
        result_files.write(out, measured, rows, report=evaluation_report.page(measured, data, check=checked))
    if log_json:
        JsonLog.event("done", metrics=measurements.as_json(measured))
        return
    if as_json:
        _print_json(measured)
        return
    _print_measured(measured)
    if out is not None:
        terminal.console().print(
            terminal.text(
                f"wrote {out} ({result_files.REPORT}, {result_files.METRICS}, {result_files.PHOTOS})"
            )
        )


def compare(
    a: Path, b: Path, data: Path | None, *, options: EvaluationOptions, out: Path | None, as_json: bool
) -> None:
    """Compares two stored evaluations, or (with `data`) two models that are evaluated first.

    Raises:
        FaceprintError: as in `evaluation.comparison.compare`, `evaluation.result_files.read` and `evaluate`.
    """
    if out is not None:
        comparison.check_target(out)
    if data is None:
        one, other = _read(a), _read(b)
    else:
        for model in (a, b):
            ModelBundle.load(model)
        one, other = (result_files.of(*_measured(model, data, options)) for model in (a, b))
    found = comparison.compare(one, other, seed=options.seed)
    if out is not None:
        page = evaluation_report.comparison_page(found, one.metrics, other.metrics)
        comparison.write(out, found, report=page)
    if as_json:
        _print_json(found)
    else:
        _print_comparison(found)


def _read(folder: Path) -> result_files.Results:
    if (folder / "bundle.json").is_file():
        raise InputError(
            f"{folder} is a model; to compare models, name the photos to evaluate them on as well."
        )
    return result_files.read(folder)


def _measured(
    model: Path, data: Path, options: EvaluationOptions, *, log_json: bool = False
) -> tuple[Measured, Any]:
    with graceful() as should_stop, _stages(JsonLog if log_json else Bar) as (on_stage, on_outcome):
        watch = Watch(on_stage, on_outcome, should_stop)
        return measure.measure(model, data, options=options, watch=watch)


@contextmanager
def _stages(
    progress: Callable[[str, Total], Progress],
) -> Iterator[tuple[Callable[[str, int], None], Callable[[Any], None]]]:
    """Yields callbacks that show the progress of each stage, one at a time."""
    with ExitStack() as open_stage:
        stages: list[Progress] = []

        def on_stage(stage: str, total: int) -> None:
            open_stage.close()
            stages[:] = [open_stage.enter_context(progress(stage, Total(total or None)))]

        yield on_stage, lambda outcome: stages[-1].note(outcome)


def _print_json(tree: Any) -> None:
    import json

    print(json.dumps(measurements.as_json(tree), ensure_ascii=False, indent=1, allow_nan=False))


def _print_measured(measured: Measured) -> None:
    model, data = measured.model, measured.data
    console = terminal.console()
    console.print(terminal.text(f"{model.name} on {data.folder}", "bold"), highlight=False)
    where = f"gallery {data.gallery}, " if data.gallery else ""
    console.print(terminal.text(f"{measured.protocol}: {where}{data.split}", "dim"))
    if measured.closed is not None:
        _print_closed(measured.closed)
    if measured.open is not None:
        _print_open(measured.open)
    if measured.pairs is not None:
        _print_pairs(measured.pairs)
    speed = measured.speed
    console.print(
        f"{speed.photos:,} photos read and embedded in {speed.seconds:,.1f} s, "
        f"{speed.photos_per_second:,.1f} photos/s ({speed.engine} on {speed.device})"
    )
    if measured.left_out:
        console.print(f"{terminal.counted(len(measured.left_out), 'photo')} could not be read:")
        for one in measured.left_out[:_MAX_ROWS_SHOWN]:
            console.print(terminal.text(f"  {one.reason}  {one.path}"))
        if len(measured.left_out) > _MAX_ROWS_SHOWN:
            console.print(f"  and {len(measured.left_out) - _MAX_ROWS_SHOWN:,} more")
    for note in measured.notes:
        console.print(terminal.text(f"note: {note}", "yellow"))


def _print_closed(found: Closed) -> None:
    terminal.console().print(
        f"{found.enrolled:,} photos enrolled, {found.probes:,} searched for, of {found.identities:,} people"
        + (f"; {found.unanswerable:,} of people not enrolled, left out" if found.unanswerable else "")
    )
    table = _table("", "value", "95% interval", "n")
    if found.classifier is not None:
        _add(table, "classifier, the likeliest is right", found.classifier.accuracy)
        _add(table, "classifier, among the likeliest 5", found.classifier.top5)
    _add_ranking(table, found.ranking)
    if found.classifier is not None:
        fit = found.classifier.calibration
        _add(table, "calibration error", fit.error)
        if fit.temperature is not None:
            _add(table, "  on one half of the photos", fit.before)
            _add(table, f"  there, at temperature {fit.temperature:.2f} of the other half", fit.after)
            _add(table, "  loss there, in nats", fit.loss_before, _nats)
            _add(table, f"  loss there, at temperature {fit.temperature:.2f}", fit.loss_after, _nats)
    _show(table)
    rows = [(THIS, found.ranking), *((NAMES[one.name], one.ranking) for one in found.baselines)]
    beside = _table("the same photos", "closest image", "", "among 5 nearest people", "", "mAP", "")
    for name, ranking in rows:
        figures = (ranking.closest, ranking.cmc[4], ranking.mean_average_precision)
        beside.add_row(name, *(text for one in figures for text in _cells(one)))
    _show(beside)
    _print_people(found)


def _print_people(found: Closed) -> None:
    with_mistakes = [one for one in found.people if one.closest < one.probes][:_MAX_ROWS_SHOWN]
    if not with_mistakes:
        return
    table = _table(
        "the hardest people", "enrolled", "searched", "closest right", "classifier right", "taken for"
    )
    table.columns[-1].justify = "left"
    for one in with_mistakes:
        classified = "-" if one.right is None else f"{one.right:,}"
        name, other = terminal.text(one.identity), terminal.text(one.taken_for or "-")
        table.add_row(name, f"{one.enrolled:,}", f"{one.probes:,}", f"{one.closest:,}", classified, other)
    _show(table)


def _print_open(found: Open) -> None:
    trained = f" (the model was trained on {found.trained_identities:,} of them)"
    terminal.console().print(
        f"{found.enrolled:,} photos of {found.identities:,} people enrolled"
        + (trained if found.trained_identities else "")
        + f"; {found.mated:,} searches for them and {found.strangers:,} for "
        f"{found.stranger_identities:,} strangers"
        + (f"; {found.already_enrolled:,} enrolled already, left out" if found.already_enrolled else "")
    )
    table = _table("", "value", "95% interval", "n")
    for point in found.identification.points:
        _add(table, f"FNIR at FPIR {point.rate:g}{_at(point)}", point.missed)
    _add_ranking(table, found.identification.ranking)
    _show(table)
    if found.baselines:
        _print_open_beside(found)


def _print_open_beside(found: Open) -> None:
    headings = [text for point in found.identification.points for text in (f"FNIR at {point.rate:g}", "")]
    beside = _table("the same searches", *headings, "closest image", "")
    rows: list[tuple[str, Identification]] = [(THIS, found.identification)]
    rows += [(NAMES[one.name], one.identification) for one in found.baselines]
    for name, one in rows:
        figures = [*(point.missed for point in one.points), one.ranking.closest]
        beside.add_row(name, *(text for figure in figures for text in _cells(figure)))
    _show(beside)


def _print_pairs(found: Pairs) -> None:
    terminal.console().print(
        f"{found.same:,} pairs of one person and {found.different:,} of two, {found.people:,} people"
        + (f"; {found.left_out:,} pairs left out" if found.left_out else "")
    )
    table = _table("", "value", "95% interval", "n")
    _add_verification(table, "", found.verification)
    _show(table)
    if found.unseen is not None:
        table = _table("without people seen in training", "value", "95% interval", "n")
        _add_verification(table, "", found.unseen)
        _show(table)
    beside = _table("the same pairs", "accuracy", "", "area under ROC", "", "TAR at FAR 0.01", "")
    rows = [(THIS, found.verification)]
    rows += [(NAMES[one.name], one.verification) for one in found.baselines]
    for name, one in rows:
        figures = (one.accuracy, one.area, turned(one.points[1].missed))
        beside.add_row(name, *(text for figure in figures for text in _cells(figure)))
    _show(beside)


def _add_verification(table: Any, indent: str, found: Verification) -> None:
    error = "" if found.standard_error is None else f" (standard error {100 * found.standard_error:.2f} %)"
    _add(table, f"{indent}accuracy over {len(found.folds)} folds{error}", found.accuracy)
    _add(table, f"{indent}area under ROC", found.area)
    for point in found.points:
        _add(table, f"{indent}TAR at FAR {point.rate:g}{_at(point)}", turned(point.missed))


def _at(point: OperatingPoint) -> str:
    return "" if point.threshold is None else f" (distance {point.threshold:.3f})"


def _add_ranking(table: Any, found: Ranking) -> None:
    _add(table, "closest image shows the person", found.closest)
    _add(table, "person among the nearest 5", found.cmc[4])
    _add(table, "person among the nearest 20", found.cmc[19])
    if found.mean_average_precision is not None:
        _add(table, "mean average precision", found.mean_average_precision)


def _print_comparison(found: Comparison) -> None:
    console = terminal.console()
    console.print(terminal.text(f"A {found.a}", "bold"))
    console.print(terminal.text(f"B {found.b}", "bold"))
    noun = "pairs" if found.protocol == "lfw-pairs" else "photos"
    console.print(
        f"{found.protocol}: {found.common:,} {noun} of both; {found.only_in_a:,} of A alone and "
        f"{found.only_in_b:,} of B alone, left out"
    )
    headings = ("", "A", "B", "B - A", "95% interval", "only A right", "only B right", "McNemar's p", "n")
    table = _table(*headings)
    for test in found.tests:
        counts = ["-" if one is None else f"{one:,}" for one in (test.only_a, test.only_b)]
        p = "-" if test.p is None else _p_value(test.p)
        difference = _points(test.difference)
        table.add_row(
            test.name, _cells(test.a)[0], _cells(test.b)[0], *difference, *counts, p, f"{test.difference.n:,}"
        )
    _show(table)
    for note in found.notes:
        console.print(terminal.text(f"note: {note}", "yellow"))


def _p_value(p: float) -> str:
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


def _points(difference: Figure) -> tuple[str, str]:
    """Formats a difference of shares and its interval, in percentage points."""
    if difference.value is None:
        return "too few", ""
    if difference.low is None or difference.high is None:
        return f"{100 * difference.value:+.1f}", "-"
    return f"{100 * difference.value:+.1f}", f"{100 * difference.low:+.1f} to {100 * difference.high:+.1f}"


def _table(first: str, *headings: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _nats(loss: float) -> str:
    return f"{loss:.3f}"


def _add(table: Any, name: str, figure: Figure, shown: Callable[[float], str] = _percent) -> None:
    table.add_row(name, *_cells(figure, shown), f"{figure.n:,}")


def _cells(figure: Figure | None, shown: Callable[[float], str] = _percent) -> tuple[str, str]:
    """Formats a figure and its interval; shares in percent."""
    if figure is None:
        return "-", ""
    if figure.value is None:
        return "too few", ""
    value = shown(figure.value) + (" %" if shown is _percent else "")
    if figure.low is None or figure.high is None:
        return value, "-"
    return value, f"{shown(figure.low)} to {shown(figure.high)}"


def _show(table: Any) -> None:
    terminal.console().print(table, soft_wrap=False)
