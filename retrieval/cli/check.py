"""The command `check`: reports what is wrong with a data set before a model is trained on it."""

import csv
import io
import json
import os
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from retrieval.cli import options
from retrieval.cli.command import in_current_options
from retrieval.cli.options import require
from retrieval.cli.output import write_file
from retrieval.console import terminal
from retrieval.errors import RunError

if TYPE_CHECKING:
    from retrieval.quality.dataset_check import Check
    from retrieval.quality.findings import DataFinding

_COLOURS: Final = {"harms": "bold red", "look": "yellow", "note": "dim"}


def check(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A folder with one subfolder of photos per identity, or a list (.csv, .txt, .parquet) or archive of photos.", show_default=False)],
    model: Annotated[Path | None, typer.Option(metavar="MODEL", help="Also find photos that are nearer to another identity than to their own.", show_default=False)] = None,
    min_images: Annotated[int | None, typer.Option(min=2, help="As of train: identities with fewer photos are left out.", show_default=False)] = None,
    detector: Annotated[str | None, typer.Option("--detector", metavar="yunet|FILE.onnx", help="As of train: find the face in each photo. Reports photos without a face or with several, and tiny, blurred or turned faces.", show_default="MODEL's, or none")] = None,
    exclude: options.Exclude = None,
    val_fraction: Annotated[float, options.val_fraction("As of train: share of each identity's photos to hold out.")] = 0.3,
    seed: Annotated[int, options.seed("As of train: of the split.")] = 0,
    image_size: Annotated[int | None, typer.Option(min=32, max=1024, help="As of train: side of the network's input in pixels.", show_default="224, or MODEL's")] = None,
    crop: Annotated[float | None, typer.Option(help="As of train: share of the shorter side to keep.", show_default="1.0, or MODEL's")] = None,
    as_json: options.Json = False,
    json_file: options.JsonFile = None,
    page: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page with thumbnails, one file.", show_default=False)] = None,
    fix: Annotated[Path | None, typer.Option(metavar="LIST.csv", help="Write a list of the photos without those that should go, for train and ingest.", show_default=False)] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 when something was found that harms.")] = False,
    workers: options.Workers = None,
    device: options.Device = "auto",
) -> None:  # fmt: skip
    """Say what a folder of photos is worth, before hours of training.

    Unreadable files, copies (within an identity, under two names, across the split), identities with too few
    photos, odd pictures; with --model, labels in doubt; with --detector, photos without a face or with several.
    No photo is ever changed.

    Exit status: 0 when it was checked, whatever was found; 1 with --strict when something harms; 2 when there
    is nothing to check; 130 after Ctrl-C (nothing is written).
    """
    require(crop is None or 0 < crop <= 1, "--crop must be above 0 and at most 1")
    for target, option, suffix in (
        (json_file, "--json-file", ".json"),
        (page, "--page", ".html"),
        (fix, "--fix", ".csv"),
    ):
        if target is not None:
            _check_target(target, option, suffix, Path(data))
    done = _checked(
        data, model, detector, device, workers, exclude or [],
        seed=seed, validation_fraction=val_fraction, min_images=min_images, size=image_size, crop=crop,
    )  # fmt: skip
    advised = [replace(one, advice=in_current_options(one.advice)) for one in done.findings]
    done = replace(done, findings=tuple(advised))
    if as_json:
        typer.echo(json.dumps(done.as_json(), ensure_ascii=False, indent=1))
    else:
        _print(done)
    _write_all(done, json_file, page, fix, quiet=as_json)
    if strict and done.harms:
        raise RunError("Something was found that harms (--strict); the table says what to do.")


def _check_target(target: Path, option: str, suffix: str, data: Path) -> None:
    """Checks, before a run of hours, that an output file has its suffix and lies outside the data.

    Raises:
        InputError: it does not.
    """
    require(target.suffix.lower() == suffix, f"{option} writes a file that ends in {suffix}, not {target}")
    among = target.resolve().is_relative_to(data.resolve())
    require(not among, f"{target} would lie among the photos of {data}, or in their place; name another file")


def _checked(
    data: str, model: Path | None, detector: str | None, device: str, workers: int | None, exclude: list[str], *,
    size: int | None, crop: float | None, **split: Any,
) -> "Check":  # fmt: skip
    from retrieval.images.preprocessing import Preprocessing
    from retrieval.models.bundle import ModelBundle
    from retrieval.models.detectors import open_detector
    from retrieval.models.embedder import Embedder
    from retrieval.quality import dataset_check
    from retrieval.quality.photo_set import CheckOptions
    from retrieval.system.signals import graceful

    with ExitStack() as stack:
        bundle = ModelBundle.load(model) if model is not None else None
        require(
            crop is None or bundle is None or bundle.preprocessing.faces is None,
            f"--crop is of no use with the model {model}, which takes aligned faces; leave it out",
        )
        found = None if detector is None else open_detector(detector)
        embedder = stack.enter_context(Embedder.open(bundle, device=device)) if bundle is not None else None
        usual = bundle.preprocessing if bundle is not None else Preprocessing(size=224, crop=1.0)
        wanted = Preprocessing(size=size or usual.size, crop=crop or usual.crop)
        chosen = CheckOptions(preprocessing=wanted, **split)
        should_stop = stack.enter_context(graceful())
        progress = stack.enter_context(_Stages(data, exclude))
        return dataset_check.check(
            data,
            model=embedder,
            detector=found,
            options=chosen,
            exclude=exclude,
            workers=workers,
            on_photo=progress.note,
            should_stop=should_stop,
        )


class _Stages:
    """A progress line on standard error for each stage of a check, in sequence. A context manager."""

    def __init__(self, data: str, exclude: list[str]) -> None:
        self._data = data
        self._exclude = exclude
        self._stack = ExitStack()
        self._stage = ""
        self._total: Any = None

    def __enter__(self) -> "_Stages":
        return self

    def note(self, stage: str, one: Any) -> None:
        """Counts a photo at a stage; starts a new line where the stage is another one."""
        from retrieval.console.progress import Bar, Total
        from retrieval.embedding.outcome import Outcome, Status
        from retrieval.sources import photos

        if stage != self._stage:
            self._stack.close()
            count = partial(photos.count, [self._data], exclude=self._exclude)
            counting = Total(count if not self._stage else None)
            self._bar = self._stack.enter_context(Bar(stage, counting))
            self._stage = stage
        status = Status.EMBEDDED if one.reason is None else Status.REJECTED
        self._bar.note(Outcome(one.path, one.identity, status, reason=one.reason))

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _print(done: "Check") -> None:
    from rich import box
    from rich.table import Table

    from retrieval.quality.check_page import amount, summary

    console = terminal.console()
    console.print(terminal.text(summary(done), "bold"))
    if done.judged is not None:
        console.print(
            f"{done.judged:,} photos, those that would be trained on and no copies, were judged by the model."
        )
    if done.options.preprocessing.faces is None:
        console.print("No faces were searched for; --detector yunet does that.")
    if not done.findings:
        console.print("Nothing was found that stands in the way.")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("")
    table.add_column("how many", justify="right", no_wrap=True)
    table.add_column("finding", overflow="fold", ratio=5)
    table.add_column("what to do", overflow="fold", ratio=4)
    for finding in done.findings:
        style = _COLOURS[finding.level]
        table.add_row(
            terminal.text(finding.level, style),
            amount(finding),
            _finding(finding),
            terminal.text(finding.advice),
        )
    console.print(table, soft_wrap=False)


def _finding(finding: "DataFinding") -> Any:
    from retrieval.quality.check_page import TITLES

    words = terminal.text(TITLES[finding.kind], "bold")
    words.append(". ", "not bold")
    words.append_text(terminal.text(finding.says, "not bold"))
    if example := _example(finding):
        words.append_text(terminal.text(f" Such as {example}", "dim not bold"))
    return words


def _example(finding: "DataFinding") -> str:
    """Returns the worst case of a finding as text; empty for findings without one."""
    from retrieval.quality.dataset_check import Kind

    if finding.kind is Kind.UNEVEN or not finding.items:
        return ""
    item = finding.items[0]
    names = [os.path.join(one.identity or "", os.path.basename(one.path or "-")) for one in item.photos[:2]]
    if finding.unit == "identity":
        return item.detail
    return " and ".join(names) + (f" ({item.detail})" if item.detail else "")


def _write_all(
    done: "Check", json_file: Path | None, page: Path | None, fix: Path | None, *, quiet: bool
) -> None:
    if json_file is not None:
        _write(json_file, json.dumps(done.as_json(), ensure_ascii=False, indent=1) + "\n")
    if page is not None:
        from retrieval.quality import check_page

        _write(page, check_page.page(done).decode())
    if fix is not None:
        _write(fix, _listed(done))
    if fix is not None and not quiet:
        people = len({identity for _, identity in done.cleaned if identity is not None})
        terminal.console().print(
            terminal.text(
                f"{terminal.counted(len(done.cleaned), 'photo')} of {terminal.counted(people, 'identity')} in {fix}; "
                f"{len(done.left_out):,} left out"
            )
        )


def _listed(done: "Check") -> str:
    text = io.StringIO(newline="")
    lines = csv.writer(text)
    lines.writerow(("path", "identity"))
    lines.writerows((path, identity or "") for path, identity in done.cleaned)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    # A path may have bytes that are not UTF-8, escaped here. Where it must be exact, it is UTF-8.
    write_file(path, text.encode("utf-8", "backslashreplace"))
