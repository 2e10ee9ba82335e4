"""Helpers that `ingest` and `embed` share: photos of sources, progress, summary, errors at the end."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval.cli.output import write_file
from retrieval.cli.report_file import ReportFile
from retrieval.console import terminal
from retrieval.errors import InputError, RunError

if TYPE_CHECKING:
    from retrieval.bulk.reports import Run
    from retrieval.console.progress import Progress
    from retrieval.embedding.outcome import Outcome
    from retrieval.sources.exclusion import PassedOver
    from retrieval.sources.photos import Photo


def found_photos(
    sources: Sequence[str],
    *,
    retry: Path | None = None,
    identity_from: str | None,
    exclude: Sequence[str],
    passed_over: "PassedOver",
) -> "tuple[int | Callable[[], int | None], Iterator[Photo]]":
    """Returns the number of photos, or a function that counts them, and the photos, at least one.

    Raises:
        InputError: there is no photo.
    """
    from functools import partial
    from itertools import chain

    from retrieval.sources import photos

    reported = photos.from_report(retry) if retry is not None else None
    scan = partial(
        photos.scan, sources, identity_from=identity_from, exclude=exclude, passed_over=passed_over
    )
    found = scan() if reported is None else iter(reported)
    # Checked before a gallery is created: sources without photos are a mistake of the user.
    first = next(found, None)
    if first is None:
        named = f"{', '.join(sources)}{passed_over.aside()}"
        where = f"rejected photos in {retry}" if retry else f"photos in {named}"
        raise InputError(f"There are no {where}; check the path.")
    counted = partial(photos.count, sources, exclude=exclude)
    return counted if reported is None else len(reported), chain([first], found)


@contextmanager
def watched(
    verb: str, total: "int | Callable[[], int | None] | None", lines: ReportFile, *, log_json: bool
) -> "Iterator[tuple[Callable[[Outcome], None], Callable[[], bool]]]":
    """Shows the progress of a run; yields its `on_outcome` and `should_stop`."""
    from retrieval.console.progress import Bar, JsonLog, Total
    from retrieval.system.signals import graceful

    progress: Progress = JsonLog(verb, Total(total)) if log_json else Bar(verb, Total(total))
    with graceful() as should_stop, progress:

        def note(outcome: "Outcome") -> None:
            lines.write(outcome)
            progress.note(outcome)

        yield note, should_stop


def tell_summary(done: "Run", path: Path | None, *, log_json: bool) -> None:
    """Writes the summary of a run: as a JSON line with `log_json`, and to the file `path` if given."""
    from retrieval.console.progress import JsonLog

    if log_json:
        JsonLog.event("done", summary=done.summary())
    if path is not None:
        summary = json.dumps(done.summary(), ensure_ascii=False, indent=1) + "\n"
        write_file(path, summary.encode(), what="The summary")


def fail_for_rejected(done: "Run", verb: str, report: Path | None, again: str, *, strict: bool) -> None:
    """Raises an error for rejected files, where the command must fail for them.

    Raises:
        InputError: all files were rejected.
        RunError: a file was rejected for a reason that may pass, or `strict` is set and any was rejected.
    """
    where = report or "--report FILE"
    if done.found and done.rejected == done.found:
        raise InputError(f"Not one of the {done.found:,} files could be {verb}; {where} says why.")
    if done.worth_retrying:
        raise RunError(
            f"{done.worth_retrying:,} of the {done.rejected:,} rejected files could not be read this time; "
            f"{where} says which and why. Fix the cause and run {again} again."
        )
    if strict and done.rejected:
        raise RunError(f"{done.rejected:,} files were rejected; {where} says which and why.")


def print_reasons_and_pace(done: "Run") -> None:
    """Prints the counts of rejected photos by reason, what was passed over, and the rates of a run."""
    console = terminal.console()
    for reason, number in done.reasons.most_common():
        console.print(f"  {number:>7,}  {reason}")
    if done.passed_over:
        console.print(terminal.text(f"passed over: {done.passed_over}"))
    console.print(f"in {done.seconds:,.1f} s, {how_quick(done)}")


def how_quick(done: "Run") -> str:
    """Returns the rates of a run, its busiest stage, and its peak memory, as text."""
    words = [f"{done.photos_per_second:,.0f} photos/s"]
    if done.bytes_read:
        words.append(f"{done.megabytes_per_second:,.1f} MB/s read")
    limit = done.bottleneck
    if limit is not None:
        words.append(f"the busiest stage was {limit.name} ({done.busy_share:.0%} of the time)")
    if done.batch_size is not None:
        words.append(f"batches of {done.batch_size:,}")
    if done.optimizing_seconds > 0.1:
        words.append(f"making searches quick took {done.optimizing_seconds:,.1f} s")
    return ", ".join([*words, f"at most {terminal.size(done.peak_memory)} of memory"])
