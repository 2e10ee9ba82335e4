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
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from retrieval.images.alignment import Matrix, apply
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

# Two boxes with a larger intersection over union are one face.
_MAX_OVERLAP: Final = 0.3

# Less than 1 by more than float32 rounds: a first test with it misses no cell.
_NEARLY: Final = 0.999

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
        return DetectedFace(_box(*first, *(last - first)), landmarks_of(points), self.score)


def _box(left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
    return float(left), float(top), float(width), float(height)


def landmarks_of(points: NDArray[np.float64]) -> tuple[tuple[float, float], ...]:
    """Returns points (5, 2) as `DetectedFace.landmarks`."""
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
        found = detect(coarse, network, least)
        largest = max((face.side for face in found), default=0.0)
        if largest >= _SMALL_FACE or (not found and not again):
            back = np.array([[width / size[0], 0, 0], [0, height / size[1], 0]])
            return [face.moved(back) for face in found]
    return detect(view, network, least)


def detect(picture: Pixels, network: DetectorNetwork, least: float) -> list[DetectedFace]:
    """Returns the faces that the network finds in a picture at the size that it has, by falling score.

    Args:
        picture: uint8 (H, W, 3), RGB.
        network: the detector.
        least: the least score of a face.
    """
    height, width = picture.shape[:2]
    down, across = (-(-side // STRIDES[-1]) * STRIDES[-1] for side in (height, width))
    pixels = np.zeros((1, 3, down, across), np.float32)
    pixels[0, :, :height, :width] = picture[:, :, ::-1].transpose(2, 0, 1)
    boxes, points, scores = _candidates(network(pixels), across, least)
    order = np.argsort(-scores, kind="stable")[:_MAX_CANDIDATES]
    return [
        DetectedFace(_box(*boxes[row]), landmarks_of(points[row]), float(scores[row]))
        for row in _without_duplicates(boxes, order)
    ]


def _candidates(
    outputs: Sequence[NDArray[np.float32]], across: int, least: float
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Returns boxes (n, 4), landmarks (n, 5, 2) and scores (n,) of the cells with at least a score."""
    kind, there, box, marks = (
        np.concatenate(outputs[first : first + len(STRIDES)], axis=1)[0]
        for first in range(0, len(outputs), len(STRIDES))
    )
    # Neither share is above 1, so that both of a cell that passes are above the square of the least score.
    # Few cells do, and the rest of the work is for these alone.
    above = least * least * _NEARLY
    cells = np.flatnonzero((kind[:, 0] > above) & (there[:, 0] > above))
    scores = np.sqrt(_share(kind[cells]) * _share(there[cells]))
    cells, scores = cells[scores >= least], scores[scores >= least]
    box, marks = box[cells].astype(np.float64), marks[cells].astype(np.float64).reshape(-1, 5, 2)
    starts = np.cumsum([0, *(part.shape[1] for part in outputs[: len(STRIDES) - 1])])
    grid = np.searchsorted(starts, cells, side="right") - 1
    stride = np.array(STRIDES)[grid][:, None]
    row, column = np.divmod((cells - starts[grid])[:, None], across // stride)
    corner = np.concatenate([column, row], axis=1)
    centre, sides = (corner + box[:, :2]) * stride, np.exp(np.minimum(box[:, 2:], 20.0)) * stride
    # The network counts from the centre of the first pixel.
    boxes = np.concatenate([centre - sides / 2 + 0.5, sides], axis=1)
    return boxes, (corner[:, None] + marks) * stride[:, None] + 0.5, scores


def _share(output: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns an output (n, 1) as (n,), at most 1."""
    return np.minimum(output[:, 0].astype(np.float64), 1.0)


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
