"""Detection: finds faces in a picture with a network of the YuNet family, whatever its size and rotation.

YuNet (Wu et al., "YuNet: A Tiny Millisecond-level Face Detector", 2023) predicts a box, five landmarks and a
score for each cell of three grids. It gives several boxes for a face that is much larger than those it was
trained on, so a picture is searched at the size of 640 x 480 pixels first.

It knows upright faces. Of 500 photos of LFW that were turned by 90 degrees it still finds 35 %, and of those
that stand on their head 86 %, but with landmarks as if they were upright, and with lower scores: at most 0.89
for 99 %, where 99 % of the upright ones have at least 0.90. So a picture without a score of 0.89 is searched
in all four directions, and the one with the highest score counts: the right one for 500 of 500.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from retrieval.images.alignment import Matrix, apply, face_transform, inverse
from retrieval.images.picture import Pixels

# The sides of a cell of the three grids, in pixels.
STRIDES: Final = (8, 16, 32)

# The pixels of a picture in the first search, and at most in the second one.
_COARSE_PIXELS: Final = 640 * 480
VIEW_PIXELS: Final = 1280 * 960

# A picture is searched at the larger size if its largest face has fewer pixels than this at the smaller one.
_SMALL_FACE: Final = 40

# A picture whose best face has a lower score is searched in all four directions.
_UPRIGHT_SCORE: Final = 0.89

# A face is looked at again in a picture of this side, aligned, with this margin around it.
_CLOSE_UP: Final = 112
_CLOSE_UP_MARGIN: Final = 0.3
_CLOSE_UP_SCORE: Final = 0.5

# Where each landmark of a mirrored face is found in the list.
_MIRRORED: Final = [1, 0, 2, 4, 3]

# Two boxes with a larger intersection over union are one face.
_MAX_OVERLAP: Final = 0.3

# Candidates with the highest scores that are compared with each other.
_MAX_CANDIDATES: Final = 5000

# A network: float32 (1, 3, H, W), BGR 0..255, sides multiples of 32, to the arrays cls, obj, bbox and kps,
# each for the three strides: (1, cells, 1), (1, cells, 1), (1, cells, 4) and (1, cells, 10) float32.
DetectorNetwork: TypeAlias = Callable[[NDArray[np.float32]], Sequence[NDArray[np.float32]]]


@dataclass(frozen=True, slots=True)
class DetectedFace:
    """A face in a picture. Coordinates are pixels; (0, 0) is the corner of the picture's first pixel.

    Attributes:
        box: left, top, width and height of the upright box; it may reach beyond the picture.
        landmarks: x and y of the eyes, the tip of the nose and the corners of the mouth, each pair from left
            to right in the picture for a face that is upright.
        score: the detector's, above 0 and at most 1.
    """

    box: tuple[float, float, float, float]
    landmarks: tuple[tuple[float, float], ...]
    score: float

    @property
    def side(self) -> float:
        """The shorter side of the box in pixels."""
        return min(self.box[2:])

    @property
    def yaw(self) -> float:
        """How far the face is turned to a side: 0 for a frontal face, about 1 for a profile.

        It is the distance of the nose from the middle of the eyes, along the line through them, as a share of
        half the distance of the eyes; negative for a nose to the left.
        """
        left, right, nose = (np.array(point) for point in self.landmarks[:3])
        between = right - left
        length = float(between @ between)
        return float(2 * ((nose - left) @ between) / length - 1) if length else 0.0

    def overlap(self, other: "DetectedFace") -> float:
        """Returns the intersection over union of the boxes of two faces in one picture, 0 to 1."""
        (left, top, width, height), (x, y, across, down) = self.box, other.box
        wide = min(left + width, x + across) - max(left, x)
        high = min(top + height, y + down) - max(top, y)
        shared = max(0.0, wide) * max(0.0, high)
        union = width * height + across * down - shared
        return shared / union if union > 0 else 0.0

    def is_same_as(self, other: "DetectedFace") -> bool:
        """Returns whether another detection in the same picture is of this face.

        Of one detection, no two faces overlap as much.
        """
        return self.overlap(other) > _MAX_OVERLAP

    def moved(self, matrix: Matrix) -> "DetectedFace":
        """Returns the face at its place in another picture, by the matrix (2, 3) that maps points to it."""
        left, top, width, height = self.box
        # A turn by quarters moves two opposite corners to two opposite corners.
        turned = apply(matrix, np.array([[left, top], [left + width, top + height]]))
        first, last = turned.min(0), turned.max(0)
        points = apply(matrix, np.array(self.landmarks))
        return DetectedFace(_box(*first, *(last - first)), _points(points), self.score)


def _box(left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
    return float(left), float(top), float(width), float(height)


def _points(points: NDArray[np.float64]) -> tuple[tuple[float, float], ...]:
    return tuple((float(x), float(y)) for x, y in points)


def find_faces(view: Pixels, network: DetectorNetwork, *, least: float) -> list[DetectedFace]:
    """Returns the faces of a picture, from left to right.

    The picture is searched at the size of 640 x 480 pixels, and at full size as well where that finds no face
    of at least 40 pixels. Where no face has a score of 0.89, it is searched in all four directions.

    Args:
        view: uint8 (H, W, 3), RGB, with at most `VIEW_PIXELS`.
        network: the detector.
        least: the least score of a face.
    """
    found = _at_two_sizes(view, network, least, again=True)
    if _best_score(found) < _UPRIGHT_SCORE:
        turned = [_turned(view, network, least, quarters) for quarters in (1, 2, 3)]
        found = max(found, *turned, key=_best_score)
    return sorted(found, key=lambda face: face.box[0] + face.box[2] / 2)


def with_exact_landmarks(face: DetectedFace, view: Pixels, network: DetectorNetwork) -> DetectedFace:
    """Returns a face with landmarks that depend less on its place and size in the picture.

    The network's landmarks move by some pixels when a picture is shifted or scaled. The face is aligned by
    them, looked at again in a close-up and in its mirror image, and the mean of both is taken. On 1,000 pairs
    of LFW's development set the mean distance of two photos of one person fell from 0.732 to 0.709, and the
    separation of pairs (d') rose from 5.15 to 5.39.

    Args:
        face: as found in `view`; returned as it is where neither close-up shows it.
        view: uint8 (H, W, 3), RGB.
        network: the detector.
    """
    to_close_up = face_transform(
        np.array(face.landmarks), size=_CLOSE_UP, template="arcface", margin=_CLOSE_UP_MARGIN
    )
    back = inverse(to_close_up)
    # Pillow's transform does not antialias: a large face is taken at a larger size and shrunk afterwards.
    times = max(1, math.ceil(math.sqrt(abs(np.linalg.det(back[:, :2])))))
    size = times * _CLOSE_UP
    taken = Image.fromarray(view).transform(
        (size, size),
        Image.Transform.AFFINE,
        tuple((back * [1 / times, 1 / times, 1]).ravel()),
        Image.Resampling.BILINEAR,
    )
    if times > 1:
        taken = taken.resize((_CLOSE_UP, _CLOSE_UP), Image.Resampling.BILINEAR)
    close_up = np.asarray(taken)
    plain = _central_landmarks(close_up, network)
    mirrored = _central_landmarks(np.ascontiguousarray(close_up[:, ::-1]), network)
    found = [] if plain is None else [plain]
    if mirrored is not None:
        found.append(mirrored[_MIRRORED] * [-1, 1] + [_CLOSE_UP, 0])
    if not found:
        return face
    return replace(face, landmarks=_points(apply(back, np.mean(found, axis=0))))


def _central_landmarks(close_up: Pixels, network: DetectorNetwork) -> NDArray[np.float64] | None:
    """Returns the landmarks (5, 2) of the face in the middle of a close-up; None where no face is there."""
    middle = np.array([_CLOSE_UP, _CLOSE_UP]) / 2

    def away(face: DetectedFace) -> float:
        left, top, width, height = face.box
        return float(np.linalg.norm([left + width / 2, top + height / 2] - middle))

    faces = [face for face in _detect(close_up, network, _CLOSE_UP_SCORE) if away(face) < _CLOSE_UP / 4]
    return np.array(min(faces, key=away).landmarks) if faces else None


def _best_score(faces: Sequence[DetectedFace]) -> float:
    return max((face.score for face in faces), default=0.0)


def _turned(view: Pixels, network: DetectorNetwork, least: float, quarters: int) -> list[DetectedFace]:
    """Returns the faces of a picture that is searched after it was turned counterclockwise."""
    height, width = view.shape[:2]
    found = _at_two_sizes(np.ascontiguousarray(np.rot90(view, quarters)), network, least, again=False)
    back = {
        1: np.array([[0.0, -1.0, width], [1.0, 0.0, 0.0]]),
        2: np.array([[-1.0, 0.0, width], [0.0, -1.0, height]]),
        3: np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, height]]),
    }[quarters]
    return [face.moved(back) for face in found]


def _at_two_sizes(view: Pixels, network: DetectorNetwork, least: float, *, again: bool) -> list[DetectedFace]:
    """Returns the faces found at 640 x 480 pixels, or at full size where all of them are small.

    Args:
        again: whether a picture in which no face was found is searched at full size too.
    """
    height, width = view.shape[:2]
    shrink = math.sqrt(_COARSE_PIXELS / (width * height))
    if shrink < 1:
        size = max(1, round(width * shrink)), max(1, round(height * shrink))
        coarse = np.asarray(Image.fromarray(view).resize(size, Image.Resampling.BILINEAR))
        found = _detect(coarse, network, least)
        largest = max((face.side for face in found), default=0.0)
        if largest >= _SMALL_FACE or (not found and not again):
            back = np.array([[width / size[0], 0, 0], [0, height / size[1], 0]])
            return [face.moved(back) for face in found]
    return _detect(view, network, least)


def _detect(picture: Pixels, network: DetectorNetwork, least: float) -> list[DetectedFace]:
    """Returns the faces that the network finds in a picture, by falling score."""
    height, width = picture.shape[:2]
    down, across = (-(-side // STRIDES[-1]) * STRIDES[-1] for side in (height, width))
    pixels = np.zeros((1, 3, down, across), np.float32)
    pixels[0, :, :height, :width] = picture[:, :, ::-1].transpose(2, 0, 1)
    boxes, points, scores = _candidates(network(pixels), across, least)
    order = np.argsort(-scores, kind="stable")[:_MAX_CANDIDATES]
    return [
        DetectedFace(_box(*boxes[row]), _points(points[row]), float(scores[row]))
        for row in _without_duplicates(boxes, order)
    ]


def _candidates(
    outputs: Sequence[NDArray[np.float32]], across: int, least: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Returns boxes (n, 4), landmarks (n, 5, 2) and scores (n,) of the cells with at least a score."""
    boxes, points, scores = [], [], []
    for number, stride in enumerate(STRIDES):
        kind, there, box, marks = (outputs[number + 3 * part][0] for part in range(4))
        score = np.sqrt(_share(kind) * _share(there))
        cells = np.flatnonzero(score >= least)
        # Few cells pass, so that the rest of the work is for these alone.
        box, marks = box[cells].astype(np.float64), marks[cells].astype(np.float64)
        corner = np.column_stack([cells % (across // stride), cells // (across // stride)])
        scores.append(score[cells])
        centre, sides = (corner + box[:, :2]) * stride, np.exp(np.minimum(box[:, 2:], 20.0)) * stride
        # The network counts from the centre of the first pixel.
        boxes.append(np.column_stack([centre - sides / 2 + 0.5, sides]))
        points.append((corner[:, None] + marks.reshape(-1, 5, 2)) * stride + 0.5)
    return np.concatenate(boxes), np.concatenate(points), np.concatenate(scores)


def _share(output: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns an output (n, 1) of 0 to 1 as (n,)."""
    return np.clip(output[:, 0].astype(np.float64), 0, 1)


def _without_duplicates(boxes: NDArray[np.float64], order: NDArray[np.intp]) -> list[int]:
    """Returns the rows of boxes that overlap none with a higher score (non-maximum suppression)."""
    kept: list[int] = []
    left, top = boxes[order, 0], boxes[order, 1]
    right, bottom = left + boxes[order, 2], top + boxes[order, 3]
    areas = boxes[order, 2] * boxes[order, 3]
    remaining = np.arange(len(order))
    while len(remaining):
        best, others = remaining[0], remaining[1:]
        kept.append(int(order[best]))
        width = np.minimum(right[best], right[others]) - np.maximum(left[best], left[others])
        height = np.minimum(bottom[best], bottom[others]) - np.maximum(top[best], top[others])
        shared = np.clip(width, 0, None) * np.clip(height, 0, None)
        remaining = others[shared <= _MAX_OVERLAP * (areas[best] + areas[others] - shared)]
    return kept
