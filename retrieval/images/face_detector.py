"""The `FaceDetector`: a face detector's file, opened by onnxruntime."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import InputError
from retrieval.images.detection import STRIDES
from retrieval.system import onnx_graph

# For each stride, the outputs of the cells of its grid: two scores, a box of 4 numbers, 5 landmarks of 2.
_OUTPUTS: Final = tuple(f"{part}_{stride}" for part in ("cls", "obj", "bbox", "kps") for stride in STRIDES)

# The most pixels of a picture that goes to the session with a memory arena: 100 MB for each thread.
_SMALL_PIXELS: Final = 704 * 512


class FaceDetector:
    """A network of the YuNet family; see `detection.DetectorNetwork`. Safe to share between threads.

    Graphs of a fixed size, such as OpenCV's face_detection_yunet_2023mar.onnx, are run at any size.

    Attributes:
        sha256: of the file, in hex.
        graph: the bytes of the file.
    """

    def __init__(self, graph: bytes, name: str = "The detector") -> None:
        """Opens a detector, for one core for each calling thread.

        Args:
            graph: the bytes of an ONNX file.
            name: of the file, for errors.

        Raises:
            InputError: it is not an ONNX file, or not a detector of this family.
        """
        self.sha256: Final = hashlib.sha256(graph).hexdigest()
        self.graph: Final = graph
        try:
            onnx_graph.check_graph(graph)
            self._for_any_size: Final = onnx_graph.for_any_size(graph)
            # onnxruntime's arena saves a third of the time, but keeps the memory of each thread's largest
            # picture.
            self._small: Final = _session(self._for_any_size, arena=True)
        except onnx_graph.RefusedGraph as error:
            raise InputError(f"{name} is not run as a face detector: {error}; name another file.") from error
        except Exception as error:
            # onnxruntime has a dozen exception classes without a common base.
            raise InputError(f"{name} cannot be loaded as a face detector; name another file.") from error
        inputs = [one.name for one in self._small.get_inputs()]
        if len(inputs) != 1 or not set(_OUTPUTS) <= {one.name for one in self._small.get_outputs()}:
            raise InputError(
                f"{name} is not a face detector of the YuNet family (it lacks outputs such as "
                f"{_OUTPUTS[0]} or takes several inputs); name another file."
            )
        self._input = inputs[0]
        self._check(name)

    @cached_property
    def _large(self) -> Any:
        # Opened when it is needed: most photos are looked at in a small size only.
        return _session(self._for_any_size, arena=False)

    def __reduce__(self) -> tuple[type["FaceDetector"], tuple[bytes]]:
        return type(self), (self.graph,)

    def __call__(self, pixels: NDArray[np.float32]) -> Sequence[NDArray[np.float32]]:
        """See `detection.DetectorNetwork`."""
        session = self._small if pixels.shape[2] * pixels.shape[3] <= _SMALL_PIXELS else self._large
        found: Sequence[NDArray[np.float32]] = session.run(_OUTPUTS, {self._input: pixels})
        return found

    def _check(self, name: str) -> None:
        """Runs the detector on a small picture that is not a square, and checks the shapes of its outputs."""
        height, width = 64, 96
        try:
            found = [array.shape for array in self(np.zeros((1, 3, height, width), np.float32))]
        except Exception as error:
            raise InputError(f"{name} does not detect faces at any size; name another file.") from error
        cells = [height * width // stride**2 for stride in STRIDES]
        if found != [(1, count, columns) for columns in (1, 1, 4, 10) for count in cells]:
            raise InputError(f"{name} gives outputs of other shapes than YuNet; name another file.")


def _session(graph: bytes, *, arena: bool) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = arena
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
