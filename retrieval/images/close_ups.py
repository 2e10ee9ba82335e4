"""Close-ups: a face is looked at again, so that its landmarks depend less on its place in the picture."""

import math
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from retrieval.images.alignment import Matrix, apply, face_transform, inverse, magnification, warped_part
from retrieval.images.detection import DetectedFace, DetectorNetwork, detect, landmarks_of
from retrieval.images.picture import Pixels

# A face is looked at again in a picture of this side, aligned, with this margin around it.
_SIDE: Final = 112
_MARGIN: Final = 0.3
_SCORE: Final = 0.5

# Where each landmark of a mirrored face is found in the list.
_MIRRORED: Final = [1, 0, 2, 4, 3]


def with_exact_landmarks(
    face: DetectedFace, view: Pixels, network: DetectorNetwork, *, version: int
) -> DetectedFace:
    """Returns a face with landmarks that depend less on its place and size in the picture.

    The network's landmarks move by some pixels when a picture is shifted or scaled. The face is aligned by
    them, looked at again in a close-up and in its mirror image, and the mean of both is taken. On 1,000 pairs
    of LFW's development set the mean distance of two photos of one person fell from 0.732 to 0.709, and the
    separation of pairs (d') rose from 5.15 to 5.39.

    Args:
        face: as found in `view`; returned as it is where neither close-up shows it.
        view: uint8 (H, W, 3), RGB.
        network: the detector.
        version: of the alignment, 1 or 2: how the close-up is taken.
    """
    to_close_up = face_transform(np.array(face.landmarks), size=_SIDE, template="arcface", margin=_MARGIN)
    back = inverse(to_close_up)
    close_up = _close_up(view, back) if version > 1 else _close_up_of_version_1(view, back)
    plain = _central_landmarks(close_up, network)
    mirrored = _central_landmarks(np.ascontiguousarray(close_up[:, ::-1]), network)
    found = [] if plain is None else [plain]
    if mirrored is not None:
        found.append(mirrored[_MIRRORED] * [-1, 1] + [_SIDE, 0])
    if not found:
        return face
    return replace(face, landmarks=landmarks_of(apply(back, np.mean(found, axis=0))))


def _close_up(view: Pixels, back: Matrix) -> Pixels:
    """Returns a close-up, uint8 (112, 112, 3); `back` maps its points to points of the picture.

    It is shrunk with an antialiased filter before it is turned, as aligned faces are.
    """
    part = warped_part(back, _SIDE, (view.shape[1], view.shape[0]))
    if part is None:
        return np.zeros((_SIDE, _SIDE, 3), np.uint8)
    left, top, right, bottom = part.box
    shrunk = Image.fromarray(view[top:bottom, left:right]).resize(part.size, Image.Resampling.BILINEAR)
    return part.warped(shrunk)


def _close_up_of_version_1(view: Pixels, back: Matrix) -> Pixels:
    """Returns a close-up as version 1 of the alignment has it: turned at a large size, then shrunk.

    It takes more than twice as long as `_close_up`.
    """
    times = max(1, math.ceil(magnification(back)))
    size = times * _SIDE
    taken = Image.fromarray(view).transform(
        (size, size),
        Image.Transform.AFFINE,
        tuple((back * [1 / times, 1 / times, 1]).ravel()),
        Image.Resampling.BILINEAR,
    )
    if times > 1:
        taken = taken.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
    return np.asarray(taken)


def _central_landmarks(close_up: Pixels, network: DetectorNetwork) -> NDArray[np.float64] | None:
    """Returns the landmarks (5, 2) of the face in the middle of a close-up; None where no face is there."""
    middle = np.array([_SIDE, _SIDE]) / 2

    def away(face: DetectedFace) -> float:
        left, top, width, height = face.box
        return float(np.linalg.norm([left + width / 2, top + height / 2] - middle))

    faces = [face for face in detect(close_up, network, _SCORE) if away(face) < _SIDE / 4]
    return np.array(min(faces, key=away).landmarks) if faces else None
