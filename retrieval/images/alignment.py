"""Alignment: the similarity transform that moves a face's landmarks onto a template."""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from retrieval.images.picture import Pixels

Matrix = NDArray[np.float64]

# The side of the template's square in pixels.
_SIDE: Final = 112

# Eyes, tip of the nose, corners of the mouth, from left to right in the picture: the positions that the
# recognition models of ArcFace (Deng et al., 2019) and most later ones are trained with, as coordinates of
# pixel centres.
TEMPLATES: Final = {
    "arcface": (
        (38.2946, 51.6963),
        (73.5318, 51.5014),
        (56.0252, 71.7366),
        (41.5493, 92.3655),
        (70.7299, 92.2041),
    )
}


def face_transform(landmarks: NDArray[np.float64], *, size: int, template: str, margin: float) -> Matrix:
    """Returns the matrix that maps points of a picture to points of the aligned face.

    Args:
        landmarks: (5, 2) x and y in pixels, where (0, 0) is the corner of the first pixel.
        size: side of the aligned face in pixels.
        template: one of TEMPLATES.
        margin: context on each side of the template's square, as a share of its side.

    Returns:
        (2, 3): rotation and scale, and the shift.
    """
    points = np.array(TEMPLATES[template]) + 0.5
    wanted = (points + margin * _SIDE) * size / (_SIDE * (1 + 2 * margin))
    return similarity(landmarks, wanted)


def similarity(points: NDArray[np.float64], targets: NDArray[np.float64]) -> Matrix:
    """Returns the similarity transform with the least squared error, (2, 3), without reflection.

    It is the one of Umeyama ("Least-squares estimation of transformation parameters between two point
    patterns", 1991). In a plane, points are complex numbers and a similarity is w = a z + b, so that a linear
    regression finds it.

    Args:
        points, targets: (n, 2); the points must not all coincide.
    """
    z, w = (np.ascontiguousarray(pairs, np.float64).view(np.complex128)[:, 0] for pairs in (points, targets))
    centre, goal = z.mean(), w.mean()
    spread = z - centre
    a = complex(np.vdot(spread, w - goal) / np.vdot(spread, spread).real)
    b = complex(goal - a * centre)
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def magnification(matrix: Matrix) -> float:
    """Returns the factor by which a similarity (2, 3) lengthens; of a scaling of both sides the mean one."""
    (a, b), (c, d) = matrix[:, :2].tolist()
    return math.sqrt(abs(a * d - b * c))


@dataclass(frozen=True, slots=True)
class WarpedPart:
    """The part of a picture that a square is taken from, which is shrunk first and turned then.

    Attributes:
        box: left, top, right and bottom of the part, in whole pixels of the picture.
        size: width and height of the shrunk part in pixels.
        back: (2, 3), from points of the square to points of the shrunk part.
        side: of the square in pixels.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]
    back: Matrix
    side: int

    def warped(self, shrunk: Image.Image) -> Pixels:
        """Returns the square, uint8 (side, side, 3), from the shrunk part; beyond its border it is black."""
        size, how = (self.side, self.side), Image.Resampling.BILINEAR
        return np.array(shrunk.transform(size, Image.Transform.AFFINE, tuple(self.back.ravel()), how))


def warped_part(back: Matrix, side: int, size: tuple[int, int]) -> WarpedPart | None:
    """Returns the part of a picture that a square needs; None where it is outside the picture.

    Pillow's affine transform has no antialiasing, so that a square which is smaller than its part is taken
    from a shrunk one.

    Args:
        back: (2, 3), a similarity from points of the square to points of the picture.
        side: of the square in pixels.
        size: width and height of the picture in pixels.
    """
    step = max(1.0, magnification(back))
    corners = apply(back, np.array([[0.0, 0], [0, 1], [1, 0], [1, 1]]) * side)
    # The filters reach beyond the corners: bilinear by one pixel, before and after shrinking.
    first = np.clip(np.floor(corners.min(0) - 2 * step), 0, size)
    last = np.clip(np.ceil(corners.max(0) + 2 * step), 0, size)
    if (last <= first).any():
        return None
    across, down = (max(1, round(length / step)) for length in last - first)
    shrunk = np.array([[across / (last[0] - first[0])], [down / (last[1] - first[1])]])
    to_part = np.column_stack([back[:, :2], back[:, 2] - first]) * shrunk
    left, top, right, bottom = (int(edge) for edge in (*first, *last))
    return WarpedPart((left, top, right, bottom), (across, down), to_part, side)


def apply(matrix: Matrix, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns points (n, 2) moved by a matrix (2, 3)."""
    moved: NDArray[np.float64] = points @ matrix[:, :2].T + matrix[:, 2]
    return moved


def inverse(matrix: Matrix) -> Matrix:
    """Returns the matrix (2, 3) of the inverse map."""
    (a, b, x), (c, d, y) = matrix.tolist()
    det = a * d - b * c
    a, b, c, d = d / det, -b / det, -c / det, a / det
    return np.array([[a, b, -a * x - b * y], [c, d, -c * x - d * y]])


def composed(after: Matrix, before: Matrix) -> Matrix:
    """Returns the matrix (2, 3) that applies `before` and then `after`."""
    matrix = after[:, :2] @ before
    matrix[:, 2] += after[:, 2]
    return matrix


def upright_to_stored(orientation: int | None, width: int, height: int) -> Matrix:
    """Returns the matrix (2, 3) from points of the upright picture to points of the stored one.

    Args:
        orientation: of EXIF, 1 to 8; None for 1.
        width, height: of the stored picture in pixels.
    """
    identity = np.array([[1.0, 0, 0], [0, 1, 0]])
    mirror = np.array([[-1.0, 0, width], [0, 1, 0]])
    upset = np.array([[1.0, 0, 0], [0, -1, height]])
    swap = np.array([[0.0, 1, 0], [1, 0, 0]])
    half = composed(mirror, upset)
    return {
        2: mirror,
        3: half,
        4: upset,
        5: swap,
        6: composed(upset, swap),
        7: composed(half, swap),
        8: composed(mirror, swap),
    }.get(orientation or 1, identity)
