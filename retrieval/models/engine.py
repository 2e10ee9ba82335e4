"""The interface of engines: vectors and probabilities, precisions, drift."""

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
    """How far distances between photos moved because the network was computed in fewer bits than float32.

    Attributes:
        precision: "bf16" or "fp16".
        largest: the greatest change of a distance between two photos, as a share of that distance.
        mean: the mean of these changes.
        photos: how many photos were compared, each with each.
    """

    precision: str
    largest: float
    mean: float
    photos: int


class Engine(Protocol):
    """A network on a device. May be called from several threads."""

    @property
    def batch_size(self) -> int:
        """How many pictures a call should bring, at least, for the device to be busy to the end of it."""
        ...

    @property
    def drift(self) -> PrecisionDrift | None:
        """None in float32, and until two different photos were embedded together."""
        ...

    def __call__(self, pixels: Pixels) -> NetworkOutput:
        """Embeds uint8 (n, size, size, 3), n at least 1."""
        ...

    def tune(self, sample: Pixels, *, limit: int) -> None:
        """Finds the pass size, up to a limit, at which a device is fastest, with copies of some pictures."""
        ...

    def close(self) -> None:
        """Gives back threads, processes and memory; a second time does nothing."""
        ...


def drift_between(
    precision: str, found: NDArray[np.float32], exact: NDArray[np.float32]
) -> PrecisionDrift | None:
    """What `PrecisionDrift` says of the same photos' embeddings (n, d), in fewer bits and in float32.

    None where no two photos lie apart.
    """
    one, other = _distances(found), _distances(exact)
    apart = other > 0
    if not apart.any():
        return None
    changes = np.abs(one[apart] - other[apart]) / other[apart]
    return PrecisionDrift(precision, float(changes.max()), float(changes.mean()), len(found))


def _distances(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Euclidean distances of each pair of rows, once."""
    wide = vectors.astype(np.float64)
    pairs = [np.linalg.norm(wide[row + 1 :] - wide[row], axis=1) for row in range(len(wide))]
    return np.concatenate(pairs) if pairs else np.empty(0)
