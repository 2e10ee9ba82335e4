"""The `PhotoReader`: from a photo to the pixels that a model takes, of the picture or of faces in it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, Literal, get_args

import numpy as np

from retrieval.errors import InputError, Reason, UnreadableImage
from retrieval.images import pixels
from retrieval.images.alignment import Matrix, face_transform, inverse, magnification
from retrieval.images.close_ups import with_exact_landmarks
from retrieval.images.detection import DetectedFace, find_faces
from retrieval.images.face_detector import FaceDetector
from retrieval.images.picture import Pixels
from retrieval.images.pixels import MAX_SECONDS, ImageSource, View
from retrieval.images.preprocessing import Preprocessing

# Which faces of a photo are read: the largest and most central one, the only one, all of them, or none: the
# picture is taken as it is. "auto" is the largest of a photo with a name, and all of one without.
Faces = Literal["auto", "largest", "one", "all", "none"]

# Faces with a shorter side of fewer pixels hold too little to tell people apart.
MIN_FACE_SIDE: Final = 20


@dataclass(frozen=True, slots=True)
class FaceSelection:
    """Which faces of a photo are read; only for models with a face detector.

    Attributes:
        faces: "largest" (and most central), "one" (a photo with several is rejected), "all", "auto"
            ("largest" where a name says who is on the photo, else "all"), or "none": the central square of
            the picture, as for a model without a detector.
        min_side: the least shorter side of a face's box in pixels.
        min_sharpness: the least `FaceImage.sharpness`; None for no limit.
        max_yaw: the largest `DetectedFace.yaw` to either side; None for no limit.

    Raises:
        InputError: a choice does not exist, or a limit is negative.
    """

    faces: Faces = "largest"
    min_side: float = MIN_FACE_SIDE
    min_sharpness: float | None = None
    max_yaw: float | None = None

    def __post_init__(self) -> None:
        if self.faces not in get_args(Faces):
            raise InputError(f"`faces` is {self.faces!r}; choose of {', '.join(get_args(Faces))}.")
        for name in ("min_side", "min_sharpness", "max_yaw"):
            limit = getattr(self, name)
            if limit is not None and not limit >= 0:
                raise InputError(f"`{name}` is {limit}; it must be at least 0.")

    def beside(self, identity: str | None) -> "FaceSelection":
        """Returns the selection for a photo that was offered under a name, or under none."""
        if self.faces != "auto":
            return self
        return replace(self, faces="all" if identity is None else "largest")


@dataclass(frozen=True, slots=True, eq=False)
class FaceImage:
    """The input of a model: an aligned face, or the central square of a picture.

    Attributes:
        pixels: uint8 (size, size, 3), RGB.
        face: the face in the upright picture; None for a picture that was taken as it is.
    """

    pixels: Pixels
    face: DetectedFace | None = None

    @property
    def sharpness(self) -> float:
        """The standard deviation of the Laplacian of the grey levels, 0 to 255: low for a blurred face."""
        # In integers, which is five times as fast as in floats.
        levels = self.pixels.astype(np.int16)
        sums = levels[..., 0] + levels[..., 1] + levels[..., 2]
        neighbours = sums[:-2, 1:-1] + sums[2:, 1:-1] + sums[1:-1, :-2] + sums[1:-1, 2:]
        return round(float((neighbours - 4 * sums[1:-1, 1:-1]).std()) / 3, 3)


@dataclass(frozen=True, slots=True, eq=False)
class PhotoFaces:
    """The faces of a photo.

    Attributes:
        found: all of them, from left to right, whatever their size.
        main: the largest and most central one, which `PhotoReader.square` reads; None without a face.
    """

    found: tuple[DetectedFace, ...] = ()
    main: FaceImage | None = None


class PhotoReader:
    """Reads photos for a model. Safe to share between threads; picklable.

    Attributes:
        preprocessing: of the model.
        detector: the face detector; None for a model that embeds whole pictures.
    """

    def __init__(self, preprocessing: Preprocessing, detector: FaceDetector | None = None) -> None:
        """Makes a reader.

        Raises:
            InputError: the detector is not the one that the preprocessing states.
        """
        stated = None if preprocessing.faces is None else preprocessing.faces.detector
        if stated != (None if detector is None else detector.sha256):
            raise InputError("The model's preprocessing states another face detector; pass that one.")
        self.preprocessing = preprocessing
        self.detector = detector

    def __reduce__(self) -> tuple[type["PhotoReader"], tuple[Preprocessing, FaceDetector | None]]:
        return type(self), (self.preprocessing, self.detector)

    def square(self, source: ImageSource, *, seconds: float = MAX_SECONDS) -> Pixels:
        """Returns the largest face of a photo, or its central square for a model without a detector.

        Raises:
            UnreadableImage, InputError, RunError, Interrupted: as `read`.
        """
        return self.read(source, seconds=seconds)[0].pixels

    def read(
        self,
        source: ImageSource,
        selection: FaceSelection = FaceSelection(),
        *,
        seconds: float = MAX_SECONDS,
        clock: "DetectionClock | None" = None,
    ) -> list[FaceImage]:
        """Returns the selected faces of a photo, one or more, from left to right.

        Args:
            source: as of `pixels.read`.
            selection: which faces, where "auto" is "largest"; a model without a detector takes the central
                square of the picture.
            seconds: as of `pixels.read`.
            clock: the time of the detector is added to it.

        Raises:
            UnreadableImage: the picture cannot be read; or it has no face, several where one is asked for, or
                none that passes the limits of the selection.
            InputError, RunError, Interrupted: as `pixels.read`.
        """
        chosen = self.preprocessing
        if self.detector is None or selection.faces == "none":
            square = pixels.read(
                source, size=chosen.size, crop=chosen.crop, colour=chosen.colour, seconds=seconds
            )
            return [FaceImage(square)]
        found: list[DetectedFace] = []

        def locate(view: View) -> list[Matrix]:
            started = time.perf_counter()
            found[:] = self._exact(_selected(self._find(view), selection, view), view)
            if clock is not None:
                clock.seconds += time.perf_counter() - started
            return [self._transform(face) for face in found]

        aligned = pixels.align(source, size=chosen.size, locate=locate, colour=chosen.colour, seconds=seconds)
        faces = [FaceImage(square, face) for square, face in zip(aligned, found, strict=True)]
        return _good(faces, selection)

    def read_again(
        self, source: ImageSource, stored: DetectedFace, *, seconds: float = MAX_SECONDS
    ) -> FaceImage:
        """Returns the face of a photo that was found at a place before, perhaps by another detector.

        Raises:
            UnreadableImage: the picture cannot be read, or there is no face at that place.
            InputError, RunError, Interrupted: as `pixels.read`.
        """
        chosen = self.preprocessing
        found: list[DetectedFace] = []

        def locate(view: View) -> list[Matrix]:
            near = [face for face in self._find(view) if face.is_same_as(stored)]
            if not near:
                raise UnreadableImage(Reason.NO_FACE, "no face was found where it was enrolled")
            found[:] = self._exact([max(near, key=stored.overlap)], view)
            return [self._transform(face) for face in found]

        aligned = pixels.align(source, size=chosen.size, locate=locate, colour=chosen.colour, seconds=seconds)
        return FaceImage(aligned[0], found[0])

    def is_light(self, data: bytes, selection: FaceSelection) -> bool:
        """Returns whether `read` certainly takes little time and memory for a file; see `pixels.is_light`."""
        aligned = self.detector is not None and selection.faces != "none"
        return pixels.is_light(
            data, size=self.preprocessing.size, crop=self.preprocessing.crop, aligned=aligned
        )

    def find(self, source: ImageSource, *, seconds: float = MAX_SECONDS) -> list[DetectedFace]:
        """Returns all faces of a photo, from left to right, whatever their size; none without a detector.

        Raises:
            UnreadableImage, InputError, RunError, Interrupted: as `pixels.read`.
        """
        found: list[DetectedFace] = []

        def locate(view: View) -> list[Matrix]:
            found[:] = self._find(view)
            return []

        if self.detector is not None:
            pixels.align(source, size=1, locate=locate, colour=self.preprocessing.colour, seconds=seconds)
        return found

    def inspect(self, source: ImageSource, *, seconds: float = MAX_SECONDS) -> PhotoFaces:
        """Returns all faces of a photo, and the one that is read by default; none without a detector.

        Raises:
            UnreadableImage, InputError, RunError, Interrupted: as `pixels.read`.
        """
        if self.detector is None:
            return PhotoFaces()
        chosen = self.preprocessing
        found: list[DetectedFace] = []
        main: list[DetectedFace] = []

        def locate(view: View) -> list[Matrix]:
            found[:] = self._find(view)
            main[:] = self._exact([_main_face(found, view)] if found else [], view)
            return [self._transform(face) for face in main]

        aligned = pixels.align(source, size=chosen.size, locate=locate, colour=chosen.colour, seconds=seconds)
        return PhotoFaces(tuple(found), FaceImage(aligned[0], main[0]) if main else None)

    def input_side(self, face: DetectedFace) -> float:
        """Returns the side of the square that is read of a face, in pixels of its photo."""
        return self.preprocessing.size / magnification(self._transform(face))

    def _find(self, view: View) -> list[DetectedFace]:
        assert self.detector is not None
        assert self.preprocessing.faces is not None
        faces = find_faces(view.pixels, self.detector, least=self.preprocessing.faces.score)
        return [face.moved(view.to_photo) for face in faces]

    def _exact(self, faces: Sequence[DetectedFace], view: View) -> list[DetectedFace]:
        """Returns faces with exact landmarks."""
        assert self.detector is not None
        assert self.preprocessing.faces is not None
        look = partial(with_exact_landmarks, version=self.preprocessing.faces.version)
        to_view = inverse(view.to_photo)
        return [
            replace(face, landmarks=exact.moved(view.to_photo).landmarks)
            for face in faces
            for exact in [look(face.moved(to_view), view.pixels, self.detector)]
        ]

    def _transform(self, face: DetectedFace) -> Matrix:
        chosen = self.preprocessing.faces
        assert chosen is not None
        return face_transform(
            np.array(face.landmarks),
            size=self.preprocessing.size,
            template=chosen.template,
            margin=chosen.margin,
        )


@dataclass(slots=True)
class DetectionClock:
    """The seconds that face detection took."""

    seconds: float = 0.0


def _selected(faces: Sequence[DetectedFace], selection: FaceSelection, view: View) -> list[DetectedFace]:
    """Returns the faces of a photo that are to be read.

    Raises:
        UnreadableImage: there is none, or there are several where one is asked for.
    """
    if not faces:
        raise UnreadableImage(Reason.NO_FACE, "no face was found in it")
    large = [face for face in faces if face.side >= selection.min_side]
    if selection.faces == "one" and len(large) > 1:
        raise UnreadableImage(Reason.SEVERAL_FACES, f"it shows {len(large)} faces and one is asked for")
    # The choice does not depend on the limit, so that a photo has the same face whatever the limit is.
    chosen = large if selection.faces == "all" else [_main_face(faces, view)]
    if not chosen or chosen[0].side < selection.min_side:
        side = max(face.side for face in chosen or faces)
        raise UnreadableImage(
            Reason.FACE_TOO_SMALL, f"its face has {side:.0f} pixels, and {selection.min_side:g} is the limit"
        )
    return chosen


def _main_face(faces: Sequence[DetectedFace], view: View) -> DetectedFace:
    """Returns the largest and most central of one or more faces."""
    return max(faces, key=lambda face: _prominence(face, view))


def _prominence(face: DetectedFace, view: View) -> float:
    """Returns a number that is high for a large face in the middle of a photo.

    It is the area of the box, times the square of how near its middle is to the middle of the photo: 1 there,
    0 in a corner. Of 461 photos of LFW with several faces this chooses the one in the middle in all, and the
    area alone in 452.
    """
    left, top, width, height = face.box
    middle = np.array([view.width, view.height]) / 2
    away = np.linalg.norm([left + width / 2, top + height / 2] - middle) / np.linalg.norm(middle)
    nearness = max(0.0, 1 - float(away))
    return width * height * nearness**2


def _turn(image: FaceImage) -> float:
    """Returns the yaw of a face to either side."""
    return 0.0 if image.face is None else abs(image.face.yaw)


def _good(faces: list[FaceImage], selection: FaceSelection) -> list[FaceImage]:
    """Returns the faces that are sharp enough and not turned too far.

    Raises:
        UnreadableImage: there is none.
    """
    limit, least = selection.max_yaw, selection.min_sharpness
    frontal = [one for one in faces if limit is None or _turn(one) <= limit]
    if not frontal:
        yaw = min(abs(one.face.yaw) for one in faces if one.face is not None)
        raise UnreadableImage(
            Reason.FACE_TURNED, f"its face is turned by {yaw:.2f}, and {limit:g} is the limit"
        )
    sharp = [one for one in frontal if least is None or one.sharpness >= least]
    if not sharp:
        most = max(one.sharpness for one in frontal)
        raise UnreadableImage(
            Reason.FACE_BLURRED, f"its face has a sharpness of {most:.1f}, and {least:g} is the limit"
        )
    return sharp
