"""The trial of an imported network: it is run on a few pictures before a model is made of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import InputError
from retrieval.models import onnx_wrapper, self_test
from retrieval.models.bundle import MAX_DIMENSION
from retrieval.models.onnx_wrapper import NetworkInput, Signature
from retrieval.system.paths import readable

# Pictures that a network is tried on, alone and together.
_PICTURES: Final = 4


class NetworkTrial:
    """Runs a network on pictures, to find how its output becomes an embedding and whether it is one."""

    def __init__(self, path: Path, data: bytes, found: Signature, takes: NetworkInput, output: str) -> None:
        self._path, self._data, self._found, self._takes, self._output = path, data, found, takes, output
        pictures = [self_test.random_picture(takes.size) for _ in range(_PICTURES - 1)]
        self._pictures = np.stack([self_test.reference_picture(takes.size), *pictures])

    def graph(self, *, unit: bool) -> tuple[bytes, NDArray[np.float32]]:
        """Returns the graph of the model, and the embedding (d,) of the reference picture.

        Raises:
            InputError: the network does not give one embedding for each picture.
        """
        dimension = self._dimension(self._wrapped(replace(self._takes, mirrored=False)))
        graph = self._wrapped(self._takes, dimension=dimension, unit=unit)
        session = self._session(graph)
        together = _run(session, self._pictures)
        alone = np.concatenate([_run(session, one[np.newaxis]) for one in self._pictures])
        self._check_values(together, alone)
        return graph, alone[0]

    def _wrapped(self, takes: NetworkInput, *, dimension: int | None = None, unit: bool = False) -> bytes:
        return onnx_wrapper.wrapped(
            self._data, self._found, takes, output=self._output, dimension=dimension, unit=unit
        )

    def _session(self, graph: bytes) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        # What goes wrong is said in a sentence.
        options.log_severity_level = 4
        try:
            return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # onnxruntime has a dozen exception classes without a common base.
            raise self._does_not_run(error) from error

    def _does_not_run(self, error: Exception) -> InputError:
        size = self._takes.size
        reason = readable(str(error).strip().partition("\n")[0].rstrip("."))[:200]
        return InputError(
            f"{self._path} does not run on pictures of {size} x {size} pixels in the layout "
            f"{self._takes.layout} ({reason}); give another `size` or `layout`, or export the network again."
        )

    def _dimension(self, graph: bytes) -> int:
        """Runs the network on one picture and on two, and returns the number of values for each."""
        session = self._session(graph)
        try:
            one = _run(session, self._pictures[:1])
        except Exception as error:
            raise self._does_not_run(error) from error
        if one.ndim < 2 or one.shape[0] != 1 or any(more != 1 for more in one.shape[2:]):
            raise InputError(
                f"The output {self._output} of {self._path} is {one.shape} for one picture, not one "
                "embedding (1, d); name another `output`."
            )
        if not 1 <= one.shape[1] <= MAX_DIMENSION:
            raise InputError(
                f"{self._path} gives {one.shape[1]:,} numbers for a picture, and a gallery takes at most "
                f"{MAX_DIMENSION:,}; name another `output`."
            )
        try:
            both = _run(session, self._pictures[:2]).shape
        except Exception:
            both = ()
        if both != (2, *one.shape[1:]):
            raise InputError(
                f"{self._path} takes one picture at a time; export the network with a dynamic batch "
                "dimension."
            )
        return int(one.shape[1])

    def _check_values(self, together: NDArray[np.float32], alone: NDArray[np.float32]) -> None:
        if not (np.isfinite(together).all() and np.isfinite(alone).all()):
            raise InputError(
                f"{self._path} gives numbers that are not finite; check `mean`, `std` and `output`, or "
                "export the network again."
            )
        lengths = np.linalg.norm(alone, axis=1)
        apart = np.linalg.norm(alone[1:] - alone[0], axis=1)
        if (apart <= self_test.TOLERANCE * lengths.max()).any():
            raise InputError(
                f"{self._path} gives different pictures the same numbers; check `mean`, `std` and `output`."
            )
        if (np.linalg.norm(together - alone, axis=1) > self_test.TOLERANCE * lengths).any():
            raise InputError(
                f"{self._path} gives a picture other numbers in a batch than alone; export the network for "
                "inference, without dynamic quantization."
            )


def _run(session: Any, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    embedding: NDArray[np.float32] = session.run(["embedding"], {"pixels": pictures})[0]
    return embedding
