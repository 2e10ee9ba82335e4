"""Statistics of photos that need no embedding, for the data set check: size, light, colour and faces."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from retrieval.embedding.outcome import Outcome
from retrieval.embedding.reading import Meters, ReadPhoto, read_in_groups
from retrieval.embedding.stages import Entry, checked_workers, in_chunks, photos_among, prepare_stage
from retrieval.errors import Reason, UnreadableImage
from retrieval.images import pixels
from retrieval.images.photo_reader import MIN_FACE_SIDE, PhotoFaces, PhotoReader
from retrieval.quality.near_duplicates import SIDE, Grey
from retrieval.sources.photos import Photo
from retrieval.system.pipeline import Meter, Pipeline

# Nothing is embedded here; photos are read ahead as far as for an embedding of batches of this size.
_BATCH_SIZE: Final = 64

# The side of the small picture that the levels are taken from: 2 x 2 of its pixels are one of `grey`.
_SMALL_SIDE: Final = 2 * SIDE

# Percentile of the differences between the channels, for `PhotoStats.colour`.
_COLOUR_PERCENTILE: Final = 99


@dataclass(frozen=True, slots=True)
class FaceStats:
    """The statistics of the face that a model sees of a photo: the largest and most central one.

    Attributes:
        box: left, top, width and height in pixels of the upright photo.
        input_side: the side of the aligned square in pixels of the photo.
        sharpness: `FaceImage.sharpness`, in levels; low for a blurred face.
        yaw: `DetectedFace.yaw`: 0 for a frontal face, about 1 for a profile.
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
        contrast: standard deviation of the pixels' mean levels.
        colour: the 99th percentile, over the pixels, of the difference between the highest and the lowest
            channel, in levels; 0 for a grey picture.
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
    photos: Iterable[Photo],
    *,
    reader: PhotoReader | None = None,
    workers: int | None = None,
    on_photo: Callable[[PhotoStats], None] = lambda one: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[PhotoStats] | None:
    """Returns the statistics of photos, in order; None where `should_stop` returned True.

    Memory: about 2 KB a photo, besides that of the reading stage, which is the same as in `ingest`.

    Args:
        photos: of the data set.
        reader: finds the faces; None, or one without a detector, searches for none.
        workers: threads that read and decode; None is one per processor.
        on_photo: called once for every photo, in order.
        should_stop: called after each piece of up to 32 photos.

    Raises:
        InputError: `workers` is below 1.
        MissingDependency: a photo is at an address, and fsspec is not installed.
    """
    workers = checked_workers(workers)
    stage = prepare_stage(partial(_stats_of_piece, Meters(), reader), workers=workers, batch_size=_BATCH_SIZE)
    stats: list[PhotoStats] = []
    with Pipeline(in_chunks(photos, Meter("scan"))).then(stage) as pipeline:
        for piece in pipeline:
            for photo in piece:
                on_photo(photo)
            stats += piece
            if should_stop():
                return None
    return stats


def _stats_of_piece(meters: Meters, reader: PhotoReader | None, piece: Sequence[Entry]) -> list[PhotoStats]:
    return [_stats(photo, reader) for group in read_in_groups(photos_among(piece), meters) for photo in group]


def _stats(photo: ReadPhoto | Outcome, reader: PhotoReader | None) -> PhotoStats:
    if isinstance(photo, Outcome):
        return PhotoStats(photo.path, photo.identity, photo.reason, photo.detail)
    path, identity = photo.face.path, photo.face.identity
    try:
        glance = pixels.glance(photo.content, side=_SMALL_SIDE)
        faces = None if reader is None or reader.detector is None else reader.inspect(photo.content)
    except UnreadableImage as error:
        return PhotoStats(path, identity, error.reason, error.detail)
    levels = glance.small.astype(np.float32)
    return PhotoStats(
        path,
        identity,
        sha256=photo.face.sha256,
        width=glance.width,
        height=glance.height,
        brightness=float(levels.mean()),
        contrast=float(levels.mean(axis=2).std()),
        colour=float(np.percentile(np.ptp(levels, axis=2), _COLOUR_PERCENTILE)),
        grey=_grey(levels),
        faces=None if faces is None else sum(face.side >= MIN_FACE_SIDE for face in faces.found),
        face=None if reader is None or faces is None else _main_face(faces, reader),
    )


def _main_face(faces: PhotoFaces, reader: PhotoReader) -> FaceStats | None:
    image = faces.main
    if image is None or image.face is None:
        return None
    return FaceStats(image.face.box, reader.input_side(image.face), image.sharpness, image.face.yaw)


def _grey(levels: NDArray[np.float32]) -> Grey:
    """Returns the luma (ITU-R BT.601) of levels (64, 64, 3), averaged over blocks of 2 x 2 pixels."""
    luma = levels @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.asarray(np.rint(luma.reshape(SIDE, 2, SIDE, 2).mean(axis=(1, 3))), np.uint8)
