"""The CPU engine for the `Embedder`: onnxruntime, with parallel passes of one core each.

`benchmarks/engines.py` measured the choices made here; docs/benchmarks.md has the table.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final

import numpy as np

from retrieval.errors import BundleError
from retrieval.models.bundle import ModelBundle
from retrieval.models.engine import NetworkOutput, Pixels
from retrieval.system.cpu import usable_cores

# The most pictures in a pass.
_MAX_PASS_SIZE: Final = 16


class OnnxEngine:
    """The CPU engine; see `engine.Engine`. A picture gives the same bits in any batch: `test_embedder.py`."""

    drift: Final = None

    def __init__(self, bundle: ModelBundle, *, threads: int | None = None) -> None:
        """Loads a bundle's graph.

        Args:
            bundle: the model.
            threads: the number of cores; None is all that this process may use.

        Raises:
            BundleError: the graph cannot be loaded.
        """
        self._bundle = bundle
        self._threads = threads or usable_cores()
        # A few pictures are fastest when all cores work on each.
        self._wide = _session(bundle, self._threads)
        self._narrow: Any = None
        self._lanes: ThreadPoolExecutor | None = None
        self._opening = threading.Lock()

    @property
    def batch_size(self) -> int:
        """One pass for each core; see `engine.Engine`."""
        return _MAX_PASS_SIZE * self._threads

    def __call__(self, pixels: Pixels) -> NetworkOutput:
        """See `engine.Engine`."""
        return self._side_by_side(pixels) if self._fills_cores(pixels) else self._in_turn(pixels)

    def tune(self, sample: Pixels, *, limit: int) -> None:
        """Does nothing: the pass size was measured once, and has little effect."""

    def close(self) -> None:
        """Ends the threads."""
        with self._opening:
            lanes, self._lanes = self._lanes, None
        if lanes is not None:
            lanes.shutdown()

    def _fills_cores(self, pixels: Pixels) -> bool:
        """Returns whether there are at least two pictures for each of several cores."""
        return self._threads > 1 and len(pixels) >= 2 * self._threads

    def _in_turn(self, pixels: Pixels) -> NetworkOutput:
        return _joined([_run(self._wide, part) for part in _parts(pixels, _MAX_PASS_SIZE)])

    def _side_by_side(self, pixels: Pixels) -> NetworkOutput:
        # Each thread gets the same number of passes of the same size, so that all finish together.
        rounds = -(-len(pixels) // (_MAX_PASS_SIZE * self._threads))
        size = -(-len(pixels) // (rounds * self._threads))
        with self._opening:
            # A second copy of the weights, only for callers that embed large batches.
            self._narrow = self._narrow or _session(self._bundle, 1)
            if self._lanes is None:
                self._lanes = ThreadPoolExecutor(self._threads, thread_name_prefix="faceprint-embed")
            lanes = self._lanes
        return _joined(list(lanes.map(partial(_run, self._narrow), _parts(pixels, size))))


def _session(bundle: ModelBundle, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # A spinning thread would take the core of a decoding thread.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")

    def open_session(graph: str | bytes) -> Any:
        try:
            return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # onnxruntime has a dozen exception classes without a common base.
            raise BundleError(f"{bundle.graph_path} cannot be loaded; copy the model whole again.") from error

    session = bundle.load_graph(open_session)
    _check_signature(bundle, session)
    return session


def _check_signature(bundle: ModelBundle, session: Any) -> None:
    """Compares the inputs and outputs of a graph with the card."""
    size = bundle.input_size
    wanted = {
        "pixels": ("tensor(uint8)", (size, size, 3)),
        "embedding": ("tensor(float)", (bundle.dimension,)),
        "probabilities": ("tensor(float)", (len(bundle.labels),)),
    }
    found = {one.name: one for one in (*session.get_inputs(), *session.get_outputs())}
    if found.keys() != wanted.keys():
        names = ", ".join(sorted(found))
        raise BundleError(
            f"{bundle.graph_path} must take pixels and give embedding and probabilities, and has "
            f"{names[:200]}; copy the model whole again."
        )
    for name, (kind, shape) in wanted.items():
        one = found[name]
        # The first dimension is the batch. A dimension without a number is dynamic.
        fits = len(one.shape) == 1 + len(shape) and all(
            stated == expected or not isinstance(stated, int)
            for stated, expected in zip(one.shape[1:], shape, strict=True)
        )
        if one.type != kind or not fits or isinstance(one.shape[0], int):
            raise BundleError(
                f"{bundle.graph_path} and bundle.json disagree: {name} should be {kind} of shape "
                f"{('n', *shape)}, and is {one.type} of shape {tuple(one.shape)}; copy the model whole again."
            )


def _parts(pixels: Pixels, size: int) -> list[Pixels]:
    return [pixels[start : start + size] for start in range(0, len(pixels), size)]


def _run(session: Any, pixels: Pixels) -> NetworkOutput:
    vectors, probabilities = session.run(["embedding", "probabilities"], {"pixels": pixels})
    return vectors, probabilities


def _joined(answers: list[NetworkOutput]) -> NetworkOutput:
    vectors, probabilities = zip(*answers, strict=True)
    return np.concatenate(vectors), np.concatenate(probabilities)
