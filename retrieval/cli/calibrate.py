"""The command `calibrate`: finds the distance threshold beyond which a gallery's searches answer UNKNOWN."""

import json
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieval.cli import options
from retrieval.cli.command import in_current_options
from retrieval.cli.opening import open_gallery
from retrieval.console import terminal
from retrieval.errors import InputError

if TYPE_CHECKING:
    from retrieval.bulk.calibrate import Calibrated, StrangerReport
    from retrieval.database.records import Calibration
    from retrieval.gallery.gallery import Gallery
    from retrieval.rates import Rate


def calibrate(
    gallery: options.Gallery,
    fpir: Annotated[float, typer.Option(metavar="RATE", help="The share of strangers' searches that may return an identity.")] = 0.01,
    strangers: Annotated[list[str] | None, typer.Option(metavar="DATA", help="Photos of people who are not enrolled: a source as of `ingest`; may be repeated.", show_default="the gallery's own people, each without their own faces")] = None,
    exclude: options.Exclude = None,
    sample: Annotated[int, typer.Option(min=1, help="How many enrolled faces are searched for at most.")] = 10_000,
    seed: Annotated[int, options.seed("Of the sample and of the intervals.")] = 0,
    show: Annotated[bool, typer.Option("--show", help="Show what is stored, and change nothing.")] = False,
    as_json: options.Json = False,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    device: options.Device = "auto",
    precision: options.Precision = "float32",
) -> None:  # fmt: skip
    """Find the distance beyond which searches of this gallery say UNKNOWN, and let them go by it.

    FPIR is the share of strangers' searches that return an identity; FNIR, the share of enrolled faces that
    would not find their own person. Thresholds for 0.1, 0.03, 0.01, 0.003 and 0.001 are kept too, as far as there
    are searches enough: `faceprint search --fpir` picks one.
    """
    with open_gallery(gallery, "calibrate", device=device, precision=precision) as opened:
        if show:
            found = opened.calibration()
            if found is None:
                raise InputError(
                    f"{gallery} is not calibrated; run `faceprint calibrate {shlex.quote(str(gallery))}`."
                )
            _show(found, None, opened.info().faces, _trained_on(opened), as_json=as_json)
            return
        wanted: dict[str, Any] = {"sample": sample, "seed": seed}
        if strangers:
            wanted |= {"strangers": strangers, "batch_size": batch_size, "workers": workers}
            wanted |= {"exclude": exclude or []}
        done = _with_progress(opened, fpir, wanted)
        trained_on = _trained_on(opened)
    _show(done.calibration, done.report, done.calibration.faces, trained_on, as_json=as_json)


def _trained_on(gallery: "Gallery") -> int:
    """Returns how many of the enrolled people the model was trained on."""
    return len(gallery.identity_metadata(gallery.bundle.labels))


def _with_progress(gallery: "Gallery", fpir: float, wanted: dict[str, Any]) -> "Calibrated":
    from retrieval.bulk.calibrate import calibrate
    from retrieval.embedding.outcome import Outcome, Status
    from retrieval.system.signals import graceful

    with graceful() as should_stop, terminal.progress("searching") as progress:
        embedding: list[Any] = []
        rejected = 0

        def note(outcome: Outcome) -> None:
            nonlocal rejected
            if not embedding:
                embedding.append(progress.add_task("", total=None, pace="photos of strangers", rejected=0))
            rejected += outcome.status is Status.REJECTED
            progress.update(embedding[0], advance=1, rejected=rejected)

        searching: list[Any] = []

        def tell(done: int, total: int) -> None:
            if not searching:
                searching.append(progress.add_task("", total=total, pace="enrolled faces", rejected=0))
            progress.update(searching[0], completed=done)

        return calibrate(gallery, fpir, on_outcome=note, on_progress=tell, should_stop=should_stop, **wanted)


def _show(
    found: "Calibration", report: "StrangerReport | None", faces: int, trained_on: int, *, as_json: bool
) -> None:
    from retrieval.search.calibration import remarks

    if as_json:
        shown = {
            **found.fields(),
            "remarks": [in_current_options(one) for one in remarks(found, trained_on)],
            "faces_now": faces,
        }
        if report is not None:
            shown["photos"] = report.summary()
        typer.echo(json.dumps(shown, ensure_ascii=False, indent=1))
        return
    _print(found, report, faces, trained_on)


def _print(found: "Calibration", report: "StrangerReport | None", faces: int, trained_on: int) -> None:
    from rich.table import Table

    from retrieval.search.calibration import foretold, remarks

    console = terminal.console()
    if report is not None:
        console.print(
            f"found [b]{report.found:,}[/b] = strangers [b]{report.used:,}[/b] + enrolled {report.enrolled:,}"
            f" + repeated {report.repeated:,} + rejected {report.rejected:,}"
        )
        if report.passed_over:
            console.print(terminal.text(f"passed over: {report.passed_over}"))
    console.print(_provenance(found), markup=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("")
    in_the_long_run = "95% in the long run"
    for name in ("FPIR wanted", "threshold", "FPIR seen", in_the_long_run, "FNIR", in_the_long_run):
        table.add_column(name, justify="right", no_wrap=True)
    chosen = found.point()
    for point in found.points:
        table.add_row(
            "*" if point == chosen else "",
            f"{point.fpir:g}",
            f"{point.threshold:.3f}",
            *_rate(point.seen),
            *_rate(point.missed),
        )
    console.print(table, soft_wrap=False)
    if chosen is not None:
        console.print(f"{_sentence(foretold(chosen))}.", markup=False)
    console.print("* searches decide by this one; `faceprint search --fpir` by another", markup=False)
    if faces != found.faces:
        console.print(
            f"The gallery has {terminal.counted(faces, 'face')} now and had {found.faces:,}: expect about "
            f"{faces / max(found.faces, 1):.2f} times these FPIRs.",
            markup=False,
        )
    for remark in remarks(found, trained_on):
        typer.echo(f"note: {in_current_options(remark)}", err=True)


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:]


def _provenance(found: "Calibration") -> str:
    people = f" of {found.people:,} people" if found.people else ""
    who = f"{terminal.counted(found.searches, 'photo')}{people} who are not enrolled"
    if found.strangers != "photos":
        who = f"{terminal.counted(found.searches, 'face')}{people} of the gallery, without their own"
    return (
        f"{found.found_at}, by {who}; {terminal.counted(found.faces, 'face')} of "
        f"{terminal.counted(found.identities, 'identity')}, model {found.fingerprint[:12]}"
    )


def _rate(rate: "Rate") -> tuple[str, str]:
    """Returns a share and its interval as text; "too few" where nothing was measured."""
    if not rate.n:
        return "too few", ""
    return f"{rate.value:.4f}", f"{rate.low:.4f} to {rate.high:.4f}"
