"""The kinds of work that jobs of the service do on a gallery, and what they may read of the machine."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias

from retrieval.bulk.calibrate import calibrate
from retrieval.bulk.ingest import ingest, ingest_photos
from retrieval.embedding.outcome import Outcome
from retrieval.errors import InputError
from retrieval.gallery.gallery import Gallery
from retrieval.images.photo_reader import FaceSelection
from retrieval.models.bundle import ModelBundle
from retrieval.quality import doubts
from retrieval.quality.audit import audit
from retrieval.search.calibration import remarks
from retrieval.service import evaluation
from retrieval.service.settings import Limits
from retrieval.service.uploads import Upload
from retrieval.sources.photos import Photo
from retrieval.system import archive_paths

# Lost faces that the report of a reembedding lists.
_MAX_LOST: Final = 1000


@dataclass(frozen=True, slots=True)
class Ingest:
    """Photos of folders and archives to enroll.

    Attributes:
        sources: folders and archives, as from `allowed_sources`.
        identity_from: "first", "parent" or "none"; never an expression or a pattern of a caller, since
            matching one can take for ever. None is the default of `bulk.ingest.ingest`.
        selection: see there.
        via: the caller in the audit log.
    """

    kind: ClassVar = "ingest"

    sources: tuple[str, ...]
    identity_from: str | None
    selection: FaceSelection
    via: str


@dataclass(frozen=True, slots=True)
class Audit:
    """An audit of the gallery; its doubts are kept.

    Attributes:
        sample, seed, limit: see `quality.audit.audit`.
        via: the caller in the audit log.
    """

    kind: ClassVar = "audit"

    sample: int | None
    seed: int
    limit: float
    via: str


@dataclass(frozen=True, slots=True)
class Calibrate:
    """A calibration of the gallery, by which its searches decide from then on.

    Attributes:
        sources: folders and archives with photos of strangers, as from `allowed_sources`; none uses the
            gallery's own people.
        fpir, sample, seed: see `bulk.calibrate.calibrate`.
        via: the caller in the audit log.
    """

    kind: ClassVar = "calibrate"

    sources: tuple[str, ...]
    fpir: float
    sample: int
    seed: int
    via: str


@dataclass(frozen=True, slots=True)
class UploadIngest:
    """Photos to enroll that the caller sent.

    Attributes:
        upload: their files; they are removed when the job ends.
        identity: the name of all of them; None for those that the folders of a zip give.
        identity_from: which folders; see `Ingest`.
        selection: see `bulk.ingest.ingest`.
        via: the caller in the audit log.
    """

    kind: ClassVar = "upload"

    upload: Upload
    identity: str | None
    identity_from: str | None
    selection: FaceSelection
    via: str


@dataclass(frozen=True, slots=True)
class Reembed:
    """Another model for the gallery: every face is embedded again from its photo.

    Attributes:
        bundle: the model.
        switch, give_up: see `gallery.reembed.reembed`.
        via: the caller in the audit log.
    """

    kind: ClassVar = "reembed"

    bundle: ModelBundle
    switch: bool
    give_up: bool
    via: str


@dataclass(frozen=True, slots=True)
class Evaluate:
    """A measurement of the gallery, or of its model, on photos of a folder; nothing is changed.

    Attributes:
        data: the folder, with one subfolder of photos per person, as from `allowed_folder`.
        protocol: "gallery" searches for the photos in the gallery; "closed" and "open" divide the photos, and
            measure the model alone. See docs/evaluation.md.
        val_fraction, min_images, seed: see `training.evaluation.measure.EvaluationOptions`.
        device, precision: see `Embedder.open`.
        via: the caller in the audit log.
    """

    kind: ClassVar = "evaluate"

    data: str
    protocol: str
    val_fraction: float | None
    min_images: int | None
    seed: int
    device: str
    precision: str
    via: str


Work: TypeAlias = Ingest | UploadIngest | Audit | Calibrate | Reembed | Evaluate

# The report of a work as values for JSON, and whether it was interrupted.
Done: TypeAlias = tuple[dict[str, Any], bool]


@dataclass(frozen=True, slots=True)
class Watch:
    """What a work tells while it is done, and whether it is to stop.

    Attributes:
        count: called with the outcome of each photo.
        note: called with the units of work done and in all.
        should_stop: called between batches; True stops the work.
    """

    count: Callable[[Outcome], None]
    note: Callable[[int, int], None]
    should_stop: Callable[[], bool]


def do(work: Work, gallery: Gallery, limits: Limits, watch: Watch) -> Done:
    """Does a work; returns its report, and whether it was interrupted.

    Raises:
        Interrupted: it was stopped, and nothing of it stays.
        FaceprintError: it failed.
    """
    match work:
        case Ingest():
            return _ingest(work, gallery, limits, watch)
        case UploadIngest():
            return _ingest_upload(work, gallery, limits, watch)
        case Audit():
            return _audit(work, gallery, watch)
        case Calibrate():
            return _calibrate(work, gallery, watch)
        case Reembed():
            return _reembed(work, gallery, watch)
        case Evaluate():
            return _evaluate(work, gallery, watch)


def sources_of(work: Work) -> list[str]:
    """Returns the folders and archives of the machine whose photos a work reads."""
    match work:
        case Ingest() | Calibrate():
            return list(work.sources)
        case Evaluate():
            return [work.data]
        case _:
            return []


def _ingest(work: Ingest, gallery: Gallery, limits: Limits, watch: Watch) -> Done:
    report = ingest(
        gallery,
        work.sources,
        identity_from=work.identity_from,
        selection=work.selection,
        photo_seconds=limits.photo_seconds,
        on_outcome=watch.count,
        should_stop=watch.should_stop,
    )
    return report.summary(), report.interrupted


def _ingest_upload(work: UploadIngest, gallery: Gallery, limits: Limits, watch: Watch) -> Done:
    names: deque[str] = deque()

    def found() -> Iterator[Photo]:
        for name, photo in work.upload.photos(work.identity, work.identity_from, limits):
            names.append(name)
            yield photo

    report = ingest_photos(
        gallery,
        found(),
        selection=work.selection,
        photo_seconds=limits.photo_seconds,
        # Outcomes come in the order of the photos, which have no path.
        on_outcome=lambda outcome: watch.count(replace(outcome, path=names.popleft())),
        should_stop=watch.should_stop,
    )
    return report.summary(), report.interrupted


def _audit(work: Audit, gallery: Gallery, watch: Watch) -> Done:
    found = audit(
        gallery,
        sample=work.sample,
        seed=work.seed,
        limit=work.limit,
        on_progress=watch.note,
        should_stop=watch.should_stop,
    )
    doubts.keep(gallery, found)
    report = found.summary()
    # The report would outlive the erasure of a person: the doubts are asked for by themselves.
    return {name: report[name] for name in ("faces", "identities", "audited", "limits")}, False


def _calibrate(work: Calibrate, gallery: Gallery, watch: Watch) -> Done:
    done = calibrate(
        gallery,
        work.fpir,
        strangers=work.sources or None,
        sample=work.sample,
        seed=work.seed,
        on_outcome=watch.count,
        on_progress=watch.note,
        should_stop=watch.should_stop,
    )
    learned = len(gallery.identity_metadata(gallery.bundle.labels))
    report = {**done.calibration.fields(), "remarks": remarks(done.calibration, learned)}
    return report if done.report is None else {**report, "photos": done.report.summary()}, False


def _reembed(work: Reembed, gallery: Gallery, watch: Watch) -> Done:
    # Addresses are not fetched: the hosts would hear from the service whenever a caller likes.
    done = gallery.reembed(
        work.bundle,
        switch=work.switch,
        give_up=work.give_up,
        on_progress=watch.note,
        should_stop=watch.should_stop,
    )
    listed = [{"face_id": face.id, "reason": done.reasons[face.id]} for face in done.lost[:_MAX_LOST]]
    report = {
        "model": work.bundle.fingerprint,
        "switched": done.switched,
        "faces": done.faces,
        "embedded": done.embedded,
        "lost": len(done.lost),
        "unfetched": len(done.unfetched),
        "lost_faces": listed,
        "drift": None if done.drift is None else asdict(done.drift),
    }
    return report, done.interrupted


def _evaluate(work: Evaluate, gallery: Gallery, watch: Watch) -> Done:
    place = gallery.vault.place
    searched = ["--gallery", place] if work.protocol == "gallery" else ["--protocol", work.protocol]
    options = {
        "--val-fraction": work.val_fraction,
        "--min-images": work.min_images,
        "--seed": work.seed,
        "--device": work.device,
        "--precision": work.precision,
    }
    given = [text for name, value in options.items() if value is not None for text in (name, value)]
    metrics = evaluation.evaluate(
        [*searched, *given, "--", gallery.bundle.folder, work.data],
        count=watch.count,
        note=watch.note,
        should_stop=watch.should_stop,
    )
    return _without_people(metrics), False


def _without_people(metrics: dict[str, Any]) -> dict[str, Any]:
    """Returns results without the lists of people and photos, which would outlive the erasure of a person."""
    kept = {name: value for name, value in metrics.items() if name != "left_out"}
    for protocol in ("closed", "open"):
        if kept[protocol] is not None:
            kept[protocol] = _without(kept[protocol], "people", "mistakes", "confusions")
    if kept["closed"] is not None and kept["closed"]["classifier"] is not None:
        kept["closed"]["classifier"] = _without(kept["closed"]["classifier"], "confusions")
    return kept


def _without(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def allowed_sources(
    named: Sequence[str], roots: Sequence[Path], *, field: str = "sources"
) -> tuple[str, ...]:
    """Returns the absolute paths of folders and archives that lie below folders of the operator.

    Lists of paths are refused: they could name any file of the machine, and any address.

    Args:
        named: absolute paths, or paths below one of the folders.
        roots: the folders.
        field: what the error calls `named`.

    Raises:
        InputError: one is not below them, or is neither a folder nor an archive; the sentence is the same
            for what exists elsewhere and what does not exist.
    """
    return tuple(_allowed_source(name, roots, field) for name in named)


def _allowed_source(name: str, roots: Sequence[Path], field: str) -> str:
    path = _below(name, roots, _is_source)
    if path is None:
        raise InputError(
            f"`{field}` has {name[:200]!a}, which is no folder and no archive below a folder that the "
            "service may read (`faceprint serve --sources FOLDER`)."
        )
    return path


def allowed_model(name: str, roots: Sequence[Path]) -> ModelBundle:
    """Returns the model in a folder below one of the folders of the operator.

    Args:
        name: an absolute path, or one below one of the folders.
        roots: the folders.

    Raises:
        InputError: it is not below them, or is no folder; the sentence is the same for both.
        BundleError: the folder is no model, or its model is not whole.
    """
    return ModelBundle.load(allowed_folder(name, roots, field="model"))


def allowed_folder(name: str, roots: Sequence[Path], *, field: str) -> str:
    """Returns the absolute path of a folder that is, or lies below, one of the folders of the operator.

    Args:
        name: an absolute path, or one below one of the folders.
        roots: the folders.
        field: what the error calls `name`.

    Raises:
        InputError: it is not below them, or is no folder; the sentence is the same for both.
    """
    path = _below(name, roots, os.path.isdir)
    if path is None:
        raise InputError(
            f"`{field}` is {name[:200]!a}, which is no folder below a folder that the service may read "
            "(`faceprint serve --sources FOLDER`)."
        )
    return path


def _below(name: str, roots: Sequence[Path], is_wanted: Callable[[str], bool]) -> str | None:
    """Returns the absolute path of what a name means below one of the folders, if that is wanted."""
    for root in roots:
        # Links are resolved: one that leads out of the folder is not below it.
        base = os.path.realpath(root)
        with suppress(ValueError, OSError):
            path = os.path.realpath(os.path.join(base, name))
            if os.path.commonpath([base, path]) == base and is_wanted(path):
                return path
    return None


def _is_source(path: str) -> bool:
    return os.path.isdir(path) or (os.path.isfile(path) and archive_paths.kind(path) is not None)
