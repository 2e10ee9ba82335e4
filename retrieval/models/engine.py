"""The interface of engines for the `Embedder`: outputs, precisions and precision drift."""

from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

PRECISIONS: Final = ("float32", "bf16", "fp16")

Pixels: TypeAlias = NDArray[np.uint8]
# (n, d) and (n, c) float32: embeddings and probabilities.
NetworkOutput: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class PrecisionDrift:
    """The change of distances between photos by a precision lower than float32.

    Attributes:
        precision: "bf16" or "fp16".
        largest: the largest change of a distance between two photos, as a share of that distance.
        mean: the mean of these changes.
        photos: the number of photos that were compared pairwise.
    """

    precision: str
    largest: float
    mean: float
    photos: int


class Engine(Protocol):
    """A network on a device. Several threads may call it."""

    @property
    def batch_size(self) -> int:
        """The least number of pictures in a call that keeps the device busy."""
        ...

    @property
    def drift(self) -> PrecisionDrift | None:
        """The precision drift; None in float32, and until two different photos were embedded together."""
        ...

    def __call__(self, pixels: Pixels) -> NetworkOutput:
        """Returns the output for uint8 (n, size, size, 3), n at least 1."""
        ...

    def tune(self, sample: Pixels, *, limit: int) -> None:
        """Finds the fastest pass size of the device, up to `limit`, with repetitions of the sample."""
        ...

    def close(self) -> None:
        """Releases threads, processes and memory; a second call does nothing."""
        ...


def drift_between(
    precision: str, found: NDArray[np.float32], exact: NDArray[np.float32]
) -> PrecisionDrift | None:
    """Returns the drift between embeddings (n, d) of the same photos in low precision and in float32.

    Returns None where all distances are 0.
    """
    one, other = _distances(found), _distances(exact)
    apart = other > 0
    if not apart.any():
        return None
    changes = np.abs(one[apart] - other[apart]) / other[apart]
    return PrecisionDrift(precision, float(changes.max()), float(changes.mean()), len(found))


def _distances(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Returns the Euclidean distance of each pair of rows, once."""
    wide = vectors.astype(np.float64)
    pairs = [np.linalg.norm(wide[row + 1 :] - wide[row], axis=1) for row in range(len(wide))]
    return np.concatenate(pairs) if pairs else np.empty(0)
