"""Statistics of photos that need no model, for the data set check; read by `retrieval.embedding.stages`."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np

from retrieval.embedding.outcome import Outcome
from retrieval.embedding.reading import Meters, ReadPhoto, read_some
from retrieval.embedding.stages import Entry, checked_workers, in_chunks, prepare_stage
from retrieval.errors import Reason, UnreadableImage
from retrieval.images import pixels
from retrieval.images.photo_reader import MIN_FACE_SIDE, PhotoFaces, PhotoReader
from retrieval.quality.near_duplicates import SIDE, Grey
from retrieval.sources.photos import Photo
from retrieval.system.pipeline import Meter, Pipeline

# The batch size of reading, in photos.
_READ_AHEAD: Final = 64


@dataclass(frozen=True, slots=True)
class FaceStats:
    """The statistics of the face that a model sees of a photo: the largest and most central one.

    Attributes:
        box: left, top, width and height in pixels of the upright photo.
        input_side: the side of the aligned square in pixels of the photo.
        sharpness: `FaceImage.sharpness`.
        yaw: `DetectedFace.yaw`.
    """

    box: tuple[float, float, float, float]
    input_side: float
    sharpness: float
    yaw: float

    @property
    def side(self) -> float:
        """The shorter side of the box in pixels."""
        return min(self.box[2:])


@dataclass(frozen=True, slots=True, eq=False)
class PhotoStats:
    """The statistics of a photo; of an unreadable one, `reason` is set and the figures are 0 or None.

    Attributes:
        path: absolute; None where the row of a list names none.
        identity: the label of the photo.
        reason, detail: why it cannot be read.
        sha256: of the file's bytes, in hex.
        width, height: upright, in pixels.
        brightness: mean level, from 0 to 255.
        contrast: standard deviation of the levels.
        colour: the difference between a pixel's channels that 1% of the pixels exceed, in levels.
        grey: the whole picture in grey, uint8 (32, 32).
        faces: how many faces it shows that are large enough (`MIN_FACE_SIDE`); None where no faces were
            searched for.
        face: the face that a model sees, whatever its size; None where none was found.
    """

    path: str | None
    identity: str | None
    reason: Reason | None = None
    detail: str | None = None
    sha256: str = ""
    width: int = 0
    height: int = 0
    brightness: float = 0.0
    contrast: float = 0.0
    colour: float = 0.0
    grey: Grey | None = None
    faces: int | None = None
    face: FaceStats | None = None

    @property
    def trainable(self) -> bool:
        """Whether `train` takes it: a readable photo; with a face detector, one with a large enough face."""
        if self.reason is not None or self.faces is None:
            return self.reason is None
        return self.face is not None and self.face.side >= MIN_FACE_SIDE


def read_stats(
    found: Iterable[Photo],
    *,
    reader: PhotoReader | None = None,
    workers: int | None = None,
    on_photo: Callable[[PhotoStats], None] = lambda one: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[PhotoStats] | None:
    """Returns the statistics of photos, in order; None where `should_stop` returned True.

    Memory: about 2 KB a photo, besides that of the reading stage, which is the same as in `ingest`.

    Args:
        found: the photos.
        reader: finds the faces; None, or one without a detector, searches for none.
        workers: threads that read and decode; None is one per processor.
        on_photo: called once for every photo, in order.
        should_stop: called between chunks of photos.

    Raises:
        InputError: `workers` is below 1.
        MissingDependency: a photo is at an address, and fsspec is not installed.
    """
    workers = checked_workers(workers)
    stage = prepare_stage(partial(_stats_of_some, Meters(), reader), workers=workers, batch_size=_READ_AHEAD)
    stats: list[PhotoStats] = []
    with Pipeline(in_chunks(found, Meter("scan"))).then(stage) as pipeline:
        for some in pipeline:
            for one in some:
                on_photo(one)
            stats += some
            if should_stop():
                return None
    return stats


def _stats_of_some(meters: Meters, reader: PhotoReader | None, entries: Sequence[Entry]) -> list[PhotoStats]:
    offered = [entry for entry in entries if isinstance(entry, Photo)]
    return [_stats(one, reader) for some in read_some(offered, meters) for one in some]


def _stats(read: ReadPhoto | Outcome, reader: PhotoReader | None) -> PhotoStats:
    if isinstance(read, Outcome):
        return PhotoStats(read.path, read.identity, read.reason, read.detail)
    path, identity = read.face.path, read.face.identity
    try:
        glance = pixels.glance(read.content, side=2 * SIDE)
        faces = None if reader is None or reader.detector is None else reader.inspect(read.content)
    except UnreadableImage as error:
        return PhotoStats(path, identity, error.reason, error.detail)
    levels = glance.small.astype(np.float32)
    return PhotoStats(
        path,
        identity,
        sha256=read.face.sha256,
        width=glance.width,
        height=glance.height,
        brightness=float(levels.mean()),
        contrast=float(levels.mean(axis=2).std()),
        colour=float(np.percentile(np.ptp(levels, axis=2), 99)),
        grey=_grey(levels),
        faces=None if faces is None else sum(one.side >= MIN_FACE_SIDE for one in faces.found),
        face=None if reader is None or faces is None else _face(faces, reader),
    )


def _face(faces: PhotoFaces, reader: PhotoReader) -> FaceStats | None:
    image = faces.main
    if image is None or image.face is None:
        return None
    return FaceStats(image.face.box, reader.input_side(image.face), image.sharpness, image.face.yaw)


def _grey(levels: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]") -> Grey:
    """Returns the luma (ITU-R BT.601) of each 2 x 2 block of pixels, averaged."""
    luma = levels @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.asarray(np.rint(luma.reshape(SIDE, 2, SIDE, 2).mean(axis=(1, 3))), np.uint8)
