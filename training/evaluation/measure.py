"""Measures a model on a data folder: returns `measurements.Measured` and a row for each photo."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from retrieval.console.terminal import counted
from retrieval.errors import DataError, InputError, UnreadableImage
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.photos import Photo
from retrieval.system.places import Place
from training.evaluation import closed_set, open_set, pairs, protocols
from training.evaluation.measurements import DataFacts, Measured, Mistake, ModelFacts
from training.evaluation.observe import Observed, Wanted, Watch, observe, shown
from training.evaluation.searches import Rows
from training.fitting.versions import versions

PROTOCOLS: Final = ("closed", "open", "lfw-pairs")
# Number of photos on which the exported graph of the network before fine-tuning is checked.
_SAMPLE_PHOTOS: Final = 8


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation.

    Attributes:
        protocol: one of PROTOCOLS; None means "open" with a gallery, else "closed".
        gallery: an existing gallery to search in.
        pairs: the file of pairs, for "lfw-pairs".
        weights: of the network before fine-tuning, "imagenet" or a file; None leaves that baseline out.
        fraction: share of each person's photos that is held out if the model's own split does not apply.
        min_images: an open set enrolls people with at least this many photos.
        seed: of the split and of resampling.
        workers: number of threads that read photos; None means one per processor.
        device, precision: as in `Embedder.open`.
        exclude: patterns of files and folders that are passed over (see `retrieval.sources.photos.scan`).
    """

    protocol: str | None = None
    gallery: Path | Place | None = None
    pairs: Path | None = None
    weights: str | None = None
    fraction: float = 0.3
    min_images: int = 10
    seed: int = 0
    workers: int | None = None
    device: str = "auto"
    precision: str = "float32"
    exclude: tuple[str, ...] = ()

    @property
    def chosen(self) -> str:
        """The protocol that applies: `protocol`, or its default."""
        return self.protocol or ("open" if self.gallery else "closed")


def measure(
    model: Path, data: Path, *, options: EvaluationOptions = EvaluationOptions(), watch: Watch = Watch()
) -> tuple[Measured, Rows]:
    """Measures a model and the baselines on the photos of a folder.

    Raises:
        InputError: the options contradict each other, or the model, the data, the gallery, the pairs or the
            weights cannot be used.
        Interrupted: `watch.should_stop` returned True.
        RunError: the device failed.
    """
    check_options(options)
    bundle = ModelBundle.load(model)
    if options.weights is not None:
        bundle.require_trained("compared with itself before fine-tuning")
    passed_over = PassedOver()
    found = partial(protocols.photos_of, data, exclude=options.exclude, passed_over=passed_over)
    if options.gallery is not None:
        with Gallery.open(options.gallery, read_only=True, device=options.device) as gallery:
            gallery.require(bundle)
            measured, rows = _measure_gallery(bundle, data, found(), gallery, options, watch)
    else:
        work = {"closed": _measure_closed, "open": _measure_open, "lfw-pairs": _measure_pairs}
        measured, rows = work[options.chosen](bundle, data, found(), options, watch)
    if passed_over:
        measured = replace(measured, notes=(*measured.notes, f"Passed over: {passed_over}."))
    return measured, rows


def check_options(options: EvaluationOptions) -> None:
    """Checks options, each by itself and against the others.

    Raises:
        InputError: a value is out of range, or two options contradict each other.
    """
    if options.chosen not in PROTOCOLS:
        raise InputError(f"`protocol` must be one of {', '.join(PROTOCOLS)}, not {options.chosen}.")
    if (options.chosen == "lfw-pairs") != (options.pairs is not None):
        raise InputError("`pairs` and `protocol='lfw-pairs'` go together; give both or neither.")
    if options.gallery is not None and options.chosen != "open":
        raise InputError("A `gallery` is searched by the open protocol; leave `protocol` out.")
    if not 0 < options.fraction < 1:
        raise InputError("The share that is held out must lie between 0 and 1.")
    if options.min_images < 2:
        raise InputError("`min_images` must be at least 2: one photo to enroll and one to search for.")
    if options.weights == "none":
        raise InputError("`weights='none'` is no network to compare with; give imagenet or a FILE.")


def _measure_closed(
    bundle: ModelBundle, data: Path, photos: Sequence[Photo], options: EvaluationOptions, watch: Watch
) -> tuple[Measured, Rows]:
    division = protocols.closed(photos, data, bundle, fraction=options.fraction, seed=options.seed)
    seen, before = _embed(bundle, (*division.enrolled, *division.probes), options, watch, probabilities=True)
    enrolled = _is_enrolled(seen, division.enrolled)
    _require_both(enrolled, data)
    watch.on_stage("measuring", 0)
    found, rows = closed_set.measure(seen, enrolled, bundle.labels, before=before, seed=options.seed)
    found = replace(found, mistakes=tuple(_relative_mistake(one, data) for one in found.mistakes))
    measured = _measured(bundle, data, options, division.says, (*division.enrolled, *division.probes), seen)
    notes = (*_note_unnamed(division), *_note_baselines(bundle, options))
    if division.says != "the model's own split" and bundle.split.get("train"):
        notes = ("The photos of the model's own split are not here: this is other data.", *notes)
    return replace(measured, closed=found, notes=notes), _relative_rows(rows, data)


def _measure_open(
    bundle: ModelBundle, data: Path, photos: Sequence[Photo], options: EvaluationOptions, watch: Watch
) -> tuple[Measured, Rows]:
    division = protocols.open_set(
        photos,
        data,
        bundle,
        min_images=options.min_images,
        fraction=options.fraction,
        seed=options.seed,
    )
    seen, before = _embed(bundle, (*division.enrolled, *division.probes), options, watch)
    enrolled = _is_enrolled(seen, division.enrolled)
    _require_both(enrolled, data)
    watch.on_stage("measuring", 0)
    found, rows = open_set.measure(
        seen,
        enrolled,
        trained=_trained_people(bundle),
        min_images=options.min_images,
        trained_photos=division.trained_photos,
        before=before,
        seed=options.seed,
    )
    found = replace(found, mistakes=tuple(_relative_mistake(one, data) for one in found.mistakes))
    measured = _measured(bundle, data, options, division.says, (*division.enrolled, *division.probes), seen)
    notes = (*_note_unnamed(division), *_note_trained(division), *_note_baselines(bundle, options))
    return replace(measured, open=found, notes=notes), _relative_rows(rows, data)


def _measure_gallery(
    bundle: ModelBundle,
    data: Path,
    photos: Sequence[Photo],
    gallery: Gallery,
    options: EvaluationOptions,
    watch: Watch,
) -> tuple[Measured, Rows]:
    division = protocols.untrained(photos, data, bundle)
    if not division.probes:
        raise DataError(f"There is no photo in {data} that has a name and that the model was not trained on.")
    seen, _ = _embed(bundle, division.probes, replace(options, weights=None), watch, grey=False)
    watch.on_stage("searching", 0)
    found, rows = open_set.measure_gallery(
        seen,
        gallery,
        trained=_trained_people(bundle),
        trained_photos=division.trained_photos,
        seed=options.seed,
    )
    found = replace(found, mistakes=tuple(_relative_mistake(one, data) for one in found.mistakes))
    measured = _measured(bundle, data, options, division.says, division.probes, seen)
    notes = (
        *_note_unnamed(division),
        *_note_trained(division),
        "Baselines are left out: a gallery has embeddings, and not the photos that baselines look at.",
        "Mean average precision is left out: the gallery is asked for its nearest people only.",
    )
    return replace(measured, open=found, notes=notes), _relative_rows(rows, data)


def _measure_pairs(
    bundle: ModelBundle, data: Path, photos: Sequence[Photo], options: EvaluationOptions, watch: Watch
) -> tuple[Measured, Rows]:
    if options.pairs is None:
        raise InputError("The protocol lfw-pairs takes `pairs`, a file.")
    wanted = pairs.read_pairs(options.pairs)
    photos = pairs.photos_in(wanted, photos, data)
    seen, before = _embed(bundle, photos, options, watch)
    watch.on_stage("measuring", 0)
    found, rows = pairs.measure(
        seen, wanted, data, trained=_trained_people(bundle), before=before, seed=options.seed
    )
    measured = _measured(bundle, data, options, options.pairs.name, photos, seen)
    notes = _note_baselines(bundle, options)
    if found.trained_people:
        some = f"{found.trained_people:,} of the {found.people:,} people in the pairs"
        notes = (
            f"The model was trained on {some}, which is no fair test; `unseen` leaves their pairs out.",
            *notes,
        )
    return replace(measured, pairs=found, notes=notes), rows


def _embed(
    bundle: ModelBundle,
    photos: Sequence[Photo],
    options: EvaluationOptions,
    watch: Watch,
    *,
    probabilities: bool = False,
    grey: bool = True,
) -> tuple[Observed, Observed | None]:
    """Embeds photos with the model and, given `options.weights`, with the network before fine-tuning."""
    watch.on_stage("embedding", len(photos))
    with Embedder.open(bundle, device=options.device, precision=options.precision) as embedder:
        seen = observe(
            embedder, photos, wanted=Wanted(probabilities, grey), watch=watch, workers=options.workers
        )
    if options.weights is None or not seen.paths:
        return seen, None
    from training.evaluation.initial_network import before_fine_tuning  # loads torch, which takes seconds

    watch.on_stage("exporting the network before fine-tuning", 0)
    with before_fine_tuning(bundle, options.weights, _sample(seen, bundle)) as initial:
        readable = frozenset(seen.paths)
        watch.on_stage("embedding, before fine-tuning", len(readable))
        again = [photo for photo in photos if photo.path in readable]
        with Embedder.open(initial, device=options.device, precision=options.precision) as embedder:
            return seen, observe(embedder, again, watch=watch, workers=options.workers)


def _sample(seen: Observed, bundle: ModelBundle) -> NDArray[np.uint8]:
    reader = bundle.load_photo_reader()
    try:
        return np.stack([reader.square(path) for path in seen.paths[:_SAMPLE_PHOTOS]])
    except UnreadableImage as error:
        raise InputError(f"A photo changed while it was measured; run it again: {error.words}.") from error


def _is_enrolled(seen: Observed, enrolled: Sequence[Photo]) -> NDArray[np.bool_]:
    paths = {photo.path for photo in enrolled}
    return np.array([path in paths for path in seen.paths], bool)


def _require_both(enrolled: NDArray[np.bool_], data: Path) -> None:
    if enrolled.sum() < 2 or enrolled.all():
        raise DataError(
            f"Too few photos of {data} can be read: it takes two to be enrolled and one to be searched for."
        )


def _trained_people(bundle: ModelBundle) -> frozenset[str]:
    """The people that a model was trained on, according to its card."""
    return frozenset(name.split("/")[0] for name in bundle.split.get("train", ())) | frozenset(bundle.labels)


def _measured(
    bundle: ModelBundle,
    data: Path,
    options: EvaluationOptions,
    says: str,
    photos: Sequence[Photo],
    seen: Observed,
) -> Measured:
    return Measured(
        protocol=options.chosen,
        model=ModelFacts(
            name=bundle.folder.resolve().name,
            fingerprint=bundle.fingerprint,
            labels=len(bundle.labels),
            input_size=bundle.input_size,
            crop=bundle.preprocessing.crop,
            dimension=bundle.dimension,
            recipe=dict(bundle.recipe),
            architecture=bundle.architecture,
            trained_photos=len(bundle.split.get("train", ())),
            trained_with=bundle.figures.get("device"),
        ),
        data=DataFacts(
            folder=str(data),
            gallery=None if options.gallery is None else str(options.gallery),
            split=says,
            seed=options.seed,
            found=len(photos),
            embedded=len(seen.paths),
        ),
        speed=seen.speed,
        left_out=tuple(replace(one, path=shown(one.path, str(data))) for one in seen.left_out),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={**versions(), "scikit-learn": version("scikit-learn"), "scipy": version("scipy")},
    )


def _note_baselines(bundle: ModelBundle, options: EvaluationOptions) -> tuple[str, ...]:
    if options.weights is not None:
        return ()
    if bundle.imported:
        return ()
    started = bundle.recipe.get("weights")
    if started in (None, "none"):
        return ("The network before fine-tuning is left out: it was trained from nothing.",)
    return (
        f"The network before fine-tuning is left out: give its initial weights ({started}) with --weights.",
    )


def _note_unnamed(division: protocols.Division) -> tuple[str, ...]:
    if not division.unnamed:
        return ()
    return (f"In no person's folder, and left out: {counted(division.unnamed, 'file')}.",)


def _note_trained(division: protocols.Division) -> tuple[str, ...]:
    if not division.trained_photos:
        return ()
    return (
        f"Not searched for, as the model was trained on them: {counted(division.trained_photos, 'photo')}.",
    )


def _relative_mistake(one: Mistake, data: Path) -> Mistake:
    return replace(
        one,
        path=shown(one.path, str(data)),
        nearest_path=shown(one.nearest_path, str(data)),
        right_path=None if one.right_path is None else shown(one.right_path, str(data)),
    )


def _relative_rows(rows: Rows, data: Path) -> Rows:
    """Makes the paths of rows relative to the data folder, so that two evaluations can be compared."""
    return [
        {**row, "path": shown(row["path"], str(data)), "nearest": shown(row["nearest"], str(data))}
        for row in rows
    ]
