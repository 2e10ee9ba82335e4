"""The check of a data set: finds its defects before a model is trained on it.

Statistics that need no model (`photo_stats`) give most findings: unreadable files, copies of a photo,
identities with too few photos, odd pictures. A model adds labels in doubt (`quality.label_errors`). The check
changes no photo; `Check.cleaned` lists the photos that remain without the harmful ones.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from retrieval.bulk.embed import embed_photos
from retrieval.embedding.outcome import Outcome
from retrieval.errors import DataError, InputError, Interrupted
from retrieval.images.face_detector import FaceDetector
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import FaceAlignment
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.quality.cleaning import Cleaning
from retrieval.quality.finding_rules import Evidence, findings
from retrieval.quality.findings import DataFinding, Item, Kind, Level
from retrieval.quality.label_errors import find_label_issues
from retrieval.quality.photo_set import CheckOptions, Person, PhotoSet, Rows
from retrieval.quality.photo_stats import PhotoStats, read_stats
from retrieval.sources import photos
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.photos import Photo
from retrieval.system.files import temporary_folder
from retrieval.system.paths import is_url

__all__ = ["Check", "CheckOptions", "DataFinding", "Kind", "Level", "Person", "check"]


@dataclass(frozen=True)
class Check:
    """The result of a data set check.

    Attributes:
        data: the data set that was checked.
        options: the options of the training that was checked for; `preprocessing.faces` says how faces were
            searched for, and is None where they were not.
        photos, readable: the numbers of files found, and of readable ones.
        people: all identities, by name.
        effective_people: the effective number of identities: the exponential of the entropy of the photo
            shares of the identities that can be split; 0 where there are none. That many identities of
            equal size are as varied.
        findings: the most serious first.
        judged: the number of photos of which a model checked the label; None without a model.
        cleaned: (path, identity) of the photos that remain.
        left_out: (path, identity, kind) of the others.
        passed_over: files and folders that were not read.
    """

    data: str
    options: CheckOptions
    photos: int
    readable: int
    people: tuple[Person, ...]
    effective_people: float
    findings: tuple[DataFinding, ...]
    judged: int | None
    cleaned: tuple[tuple[str, str | None], ...]
    left_out: tuple[tuple[str | None, str | None, Kind], ...]
    passed_over: PassedOver = field(default_factory=PassedOver)

    @property
    def harms(self) -> bool:
        """Whether a finding has the level `HARMS`."""
        return any(finding.level is Level.HARMS for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Returns the result as values for JSON."""
        faces = self.options.preprocessing.faces
        return {
            "data": self.data,
            "options": {
                "seed": self.options.seed,
                "validation_fraction": self.options.validation_fraction,
                "min_images": self.options.min_images,
                "image_size": self.options.preprocessing.size,
                "crop": self.options.preprocessing.crop,
                "detector": None if faces is None else faces.detector,
            },
            "photos": self.photos,
            "readable": self.readable,
            "passed_over": self.passed_over.as_json(),
            "identities": [asdict(person) for person in self.people],
            "effective_identities": round(self.effective_people, 2),
            "judged": self.judged,
            "harms": self.harms,
            "findings": [_finding_fields(finding) for finding in self.findings],
            "cleaned": len(self.cleaned),
            "left_out": [
                {"path": path, "identity": name, "kind": kind} for path, name, kind in self.left_out
            ],
        }


def _finding_fields(finding: DataFinding) -> dict[str, Any]:
    """Returns a finding as values for JSON; photos without a known face have no `box`."""
    fields = asdict(finding)
    for item in fields["items"]:
        for photo in item["photos"]:
            if photo["box"] is None:
                del photo["box"]
    return fields


def check(
    data: str,
    *,
    model: ModelBundle | Embedder | None = None,
    detector: FaceDetector | None = None,
    options: CheckOptions = CheckOptions(),
    exclude: Sequence[str] = (),
    workers: int | None = None,
    on_photo: Callable[[str, Outcome | PhotoStats], None] = lambda stage, one: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Check:
    """Returns the defects of a data set.

    Args:
        data: identity folders, or any other source of `photos.scan` that can be read twice.
        model: finds labels in doubt; None skips them.
        detector: finds faces; None is the detector of `model`, where it has one.
        options: the options that `train` will be called with. How faces are aligned is that of the model or
            the default.
        exclude: patterns of files and folders that are passed over, as in `photos.scan`.
        workers: threads that read and decode; None is one per processor.
        on_photo: called for every photo, in order, at each stage: "looking", then with a model "embedding".
        should_stop: called between chunks of photos; True stops the check.

    Raises:
        DataError: `data` does not exist or holds no file, or none of its photos could be read again.
        InputError: `data` is standard input or an address, or `detector` is given and `model` has its own.
        BundleError, StorageError: as `ModelBundle.load_photo_reader`.
        Interrupted: `should_stop` returned True.
    """
    if data == photos.STANDARD_INPUT or is_url(data):
        raise InputError(f"A check reads its data twice, which {data} does not allow; name a folder.")
    reader = _reader(model, detector, options)
    options = replace(options, preprocessing=reader.preprocessing)
    passed_over = PassedOver()
    scan = partial(photos.scan, [data], exclude=exclude)
    stats = read_stats(
        scan(passed_over=passed_over),
        reader=reader,
        workers=workers,
        on_photo=partial(on_photo, "looking"),
        should_stop=should_stop,
    )
    if stats is None:
        raise Interrupted("Stopped; nothing was written.")
    if not stats:
        raise DataError(
            f"{data} has no photos{passed_over.aside()}; it must hold one subfolder of photos per identity."
        )
    seen = PhotoSet(stats, options)
    cleaning = Cleaning(seen)
    doubts: tuple[Item, ...] = ()
    judged = None
    if model is not None:
        rows = cleaning.labelled_rows()
        embed = partial(_embedded, data, scan, model, workers, partial(on_photo, "embedding"), should_stop)
        doubts = _doubts(seen, rows, embed)
        judged = len(rows)
    return Check(
        data=data,
        options=options,
        photos=len(stats),
        readable=len(seen.readable),
        people=seen.people,
        effective_people=seen.effective_people,
        findings=tuple(findings(Evidence(seen, doubts))),
        judged=judged,
        cleaned=tuple((stats[row].path or "", stats[row].identity) for row in cleaning.rows),
        left_out=tuple((stats[row].path, stats[row].identity, kind) for row, kind in cleaning.out.items()),
        passed_over=passed_over,
    )


def _reader(
    model: ModelBundle | Embedder | None, detector: FaceDetector | None, options: CheckOptions
) -> PhotoReader:
    """Returns what finds faces, in photos of the size of the options.

    Raises:
        InputError, BundleError, StorageError: as `check`.
    """
    bundle = model.bundle if isinstance(model, Embedder) else model
    faces = None if detector is None else FaceAlignment(detector.sha256)
    if bundle is not None and bundle.preprocessing.faces is not None:
        if detector is not None:
            raise InputError(
                f"The model {bundle.folder} has a face detector of its own; leave `detector` out."
            )
        loaded = model.photo_reader if isinstance(model, Embedder) else bundle.load_photo_reader()
        detector, faces = loaded.detector, bundle.preprocessing.faces
    return PhotoReader(replace(options.preprocessing, faces=faces), detector)


_Vectors: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.float32]]"


def _doubts(
    seen: PhotoSet, rows: Rows, embed: Callable[[Rows, Sequence[PhotoStats], Path], tuple[Rows, _Vectors]]
) -> tuple[Item, ...]:
    """Returns the labels in doubt among rows, the strongest doubt first; vectors are in a temporary file."""
    if len(seen.names(rows)) < 2:
        return ()
    with temporary_folder(Path(tempfile.gettempdir()), "faceprint-check-") as folder:
        rows, vectors = embed(rows, seen.stats, folder / "vectors.npy")
        names = {name: number for number, name in enumerate(sorted(seen.names(rows)))}
        labels = np.array([names[seen.identity(row) or ""] for row in rows], np.int64)
        found = find_label_issues(vectors, labels)
        del vectors
    return tuple(
        seen.item(
            [rows[one.row], rows[one.other], rows[one.own]],
            f"{one.other_distance:.2f} to {seen.identity(rows[one.other])}, {one.own_distance:.2f} to "
            f"{seen.identity(rows[one.row])}; doubt {one.strength:.2f}",
        )
        for one in found
    )


def _embedded(
    data: str, scan: Callable[[], Iterator[Photo]],
    model: ModelBundle | Embedder, workers: int | None, on_photo: Callable[[Outcome], None],
    should_stop: Callable[[], bool], rows: Rows, stats: Sequence[PhotoStats], target: Path,
) -> tuple[Rows, _Vectors]:  # fmt: skip
    """Embeds rows into a file; returns the rows that succeeded and their vectors (n, d) float32, mapped."""
    wanted, embedded = set(rows), list[int]()
    photos_again = enumerate(scan())
    order: list[int] = []

    def chosen() -> Iterator[Photo]:
        for row, photo in photos_again:
            # A change of the folder between the two scans must not pair photos with other rows.
            if row in wanted and photo.path == stats[row].path:
                order.append(row)
                yield photo

    done = 0

    def note(outcome: Outcome) -> None:
        nonlocal done
        if outcome.reason is None:
            embedded.append(order[done])
        done += 1
        on_photo(outcome)

    report = embed_photos(model, chosen(), target, workers=workers, on_outcome=note, should_stop=should_stop)
    if report.interrupted:
        raise Interrupted("Stopped; nothing was written.")
    if not report.embedded:
        raise DataError(f"Not one photo of {data} could be read again; did it change meanwhile?")
    return embedded, np.load(target, mmap_mode="r")
