"""The engines of the `Embedder` that run a bundle's graph by onnxruntime.

On a CPU there are parallel passes of one core each, for every model; on a GPU one pass at a time, for
imported models, which torch cannot run.

`benchmarks/engines.py` measured the choices made here; docs/benchmarks.md has the table.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from retrieval.errors import BundleError, InputError, MissingDependency, RunError
from retrieval.models.bundle import ModelBundle
from retrieval.models.engine import NetworkOutput, Pixels
from retrieval.models.onnx_prelu import in_blocked_form
from retrieval.system.cpu import usable_cores

# The most pictures in a pass.
_MAX_PASS_SIZE: Final = 16
# The pictures in a pass on a GPU: the default of the torch engine there too.
_GPU_PASS_SIZE: Final = 64

_CUDA: Final = "CUDAExecutionProvider"


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


class OnnxGpuEngine:
    """An imported model on one GPU; see `engine.Engine`."""

    drift: Final = None

    def __init__(self, bundle: ModelBundle, number: int) -> None:
        """Loads a bundle's graph onto a GPU.

        Args:
            bundle: an imported model.
            number: of the GPU.

        Raises:
            MissingDependency: this onnxruntime has no CUDA provider, or that cannot load the graph.
            BundleError: the graph does not match the card.
        """
        options = {
            "device_id": str(number),
            # In TF32 products have 10 bits, and distances between photos would move.
            "use_tf32": "0",
            # An exhaustive search for the fastest convolutions would start over with each size of a pass.
            "cudnn_conv_algo_search": "HEURISTIC",
        }
        self._session = _session(bundle, 1, providers=[(_CUDA, options), "CPUExecutionProvider"])
        # Where a library is missing, onnxruntime takes the other provider.
        if _CUDA not in self._session.get_providers():
            raise _no_cuda()

    @property
    def batch_size(self) -> int:
        """See `engine.Engine`."""
        return _GPU_PASS_SIZE

    def __call__(self, pixels: Pixels) -> NetworkOutput:
        """See `engine.Engine`.

        Raises:
            RunError: the GPU failed.
        """
        try:
            return _joined([_run(self._session, part) for part in _parts(pixels, _GPU_PASS_SIZE)])
        except Exception as error:
            # onnxruntime has a dozen exception classes without a common base.
            reason = str(error).strip().partition("\n")[0].rstrip(".")[:200]
            raise RunError(f"The GPU could not run the model ({reason}); use `device='cpu'`.") from error

    def tune(self, sample: Pixels, *, limit: int) -> None:
        """Does nothing: the pass size is fixed."""

    def close(self) -> None:
        """Does nothing: the memory is released with the last reference."""


def has_cuda() -> bool:
    """Returns whether this onnxruntime has a CUDA provider (of the package onnxruntime-gpu)."""
    import onnxruntime

    return _CUDA in onnxruntime.get_available_providers()


def gpu_number(device: str) -> int:
    """Returns the number of a GPU from the name of a device: 0 for "cuda", 1 for "cuda:1".

    Raises:
        InputError: it is no name of one GPU.
        MissingDependency: this onnxruntime has no CUDA provider.
    """
    name, _, number = device.partition(":")
    if name != "cuda" or not (number or "0").isdecimal():
        raise InputError(f"An imported model runs on one device, cpu, cuda or cuda:1, and not on {device}.")
    if not has_cuda():
        raise _no_cuda()
    return int(number or "0")


def _no_cuda() -> MissingDependency:
    return MissingDependency(
        "An imported model runs on a GPU by onnxruntime's CUDA provider, which does not work here; install "
        "onnxruntime-gpu in place of onnxruntime, with the CUDA libraries that it asks for, or use "
        "`device='cpu'`."
    )


def _session(
    bundle: ModelBundle, threads: int, *, providers: Sequence[Any] = ("CPUExecutionProvider",)
) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # A spinning thread would take the core of a decoding thread.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Errors only: the graph of an imported model may have tensors that nothing uses.
    options.log_severity_level = 3

    def open_session(graph: str | bytes) -> Any:
        try:
            if bundle.imported and len(providers) == 1:
                read = graph if isinstance(graph, bytes) else Path(graph).read_bytes()
                changed = in_blocked_form(read)
                graph = graph if changed is read else changed
                del read, changed  # onnxruntime has its own copy in a moment
            # Otherwise onnxruntime prints what a GPU lacks, and goes on without it.
            return onnxruntime.InferenceSession(graph, options, providers=list(providers), enable_fallback=0)
        except Exception as error:
            # onnxruntime has a dozen exception classes without a common base.
            if len(providers) > 1:
                raise _no_cuda() from error
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
    }
    if not bundle.imported:
        wanted["probabilities"] = ("tensor(float)", (len(bundle.labels),))
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
    # The graph of an imported model has no second output.
    names = ["embedding", "probabilities"][: len(session.get_outputs())]
    vectors, *rest = session.run(names, {"pixels": pixels})
    return vectors, rest[0] if rest else np.empty((len(pixels), 0), np.float32)


def _joined(answers: list[NetworkOutput]) -> NetworkOutput:
    vectors, probabilities = zip(*answers, strict=True)
    return np.concatenate(vectors), np.concatenate(probabilities)
