"""The self-test of the `Embedder`: compares an engine with a bundle's weights. The result is cached.

The fingerprint covers weights, architecture, preprocessing and embedding. But an engine runs a graph (a
separate file), a runtime and this machine's arithmetic. The self-test compares its output with
`models.numpy_network` on a random picture, which no file can anticipate. A wrong graph, a wrong card and a
broken runtime give another output.

The fingerprint of an imported model covers the graph itself. Its output on a fixed picture is compared with
the one that it gave when it was imported: that tells a broken runtime, and a machine that computes otherwise.
"""

import hashlib
import os
import platform
import sys
from importlib.metadata import version
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import BundleError
from retrieval.models import numpy_network
from retrieval.models.bundle import ModelBundle
from retrieval.models.engine import Engine, NetworkOutput
from retrieval.system import proof_cache

# The largest difference of the embeddings, as a share of their length, and of a probability. Engines and
# numpy differ by 1e-6 (float32's rounding, summed in another order), other weights by more than 1e-1.
TOLERANCE: Final = 1e-3

# Raise it when the test becomes stricter: models that passed before are then tested again.
_RULES_VERSION: Final = 2
# A picture of squares: smooth parts and edges, at any size.
_SQUARES_PER_SIDE: Final = 8


def check_engine(bundle: ModelBundle, engine: str, device: str, run: Engine) -> None:
    """Compares outputs of a loaded engine with the reference, unless an earlier result is cached.

    The reference is the network in numpy or, for an imported model, the card. A model with an architecture
    outside `numpy_network.ARCHITECTURES` is not tested otherwise. The architecture is part of the
    fingerprint, so such a model cannot have the fingerprint of a tested one.

    Args:
        bundle: the model.
        engine: "onnxruntime" or "torch".
        device: "cpu", "cuda:0", ...
        run: the engine, in float32.

    Raises:
        BundleError: the outputs differ by more than TOLERANCE, or the weights do not fit the architecture.
    """
    fact = _fact(bundle, engine, device)
    if not (bundle.imported or bundle.architecture in numpy_network.ARCHITECTURES) or proof_cache.is_proven(
        fact
    ):
        return
    if bundle.imported:
        picture = reference_picture(bundle.input_size)
        embedding, probabilities = np.array(bundle.reference, np.float32), np.empty(0, np.float32)
    else:
        picture = random_picture(bundle.input_size)
        embedding, probabilities = _reference(bundle, picture)
    if not _agree(run(picture[np.newaxis]), embedding, probabilities) or not _agree(
        _among_others(run, picture), embedding, probabilities
    ):
        if bundle.imported:
            raise BundleError(
                f"The model {bundle.folder} does not answer here as it did where it was imported: this "
                "onnxruntime or machine computes otherwise; install onnxruntime anew, or import it here."
            )
        raise BundleError(
            f"The model {bundle.folder} does not answer as its weights do: {_suspect(bundle, engine)} is "
            "wrong; copy the model whole again, or install that package anew."
        )
    proof_cache.store(fact)


def _reference(bundle: ModelBundle, picture: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns the embedding and probabilities of a picture, by numpy."""
    tensors = bundle.load_weights(_tensors)
    try:
        return numpy_network.embed(tensors, bundle.embedding, picture, architecture=bundle.architecture)
    except (KeyError, ValueError, IndexError) as error:
        raise BundleError(
            f"{bundle.weights_path} are not the weights of a {bundle.architecture}; train the model again."
        ) from error


def _among_others(run: Engine, picture: NDArray[np.uint8]) -> NetworkOutput:
    """Returns the output for a picture in the middle of a batch: a wrong graph may be right for the first."""
    others = [random_picture(len(picture)) for _ in range(2)]
    vectors, probabilities = run(np.stack([others[0], picture, others[1]]))
    return vectors[1:2], probabilities[1:2]


def _agree(answer: NetworkOutput, embedding: NDArray[np.float32], probabilities: NDArray[np.float32]) -> bool:
    vectors, chances = answer
    if (vectors.shape, chances.shape) != ((1, *embedding.shape), (1, *probabilities.shape)):
        return False
    length = float(np.linalg.norm(embedding))
    apart = float(np.linalg.norm(vectors[0] - embedding))
    # NaN fails both comparisons.
    return apart <= TOLERANCE * length and bool((np.abs(chances[0] - probabilities) <= TOLERANCE).all())


def _suspect(bundle: ModelBundle, engine: str) -> str:
    return f"{bundle.graph_path.name} or onnxruntime" if engine == "onnxruntime" else "torch"


def _fact(bundle: ModelBundle, engine: str, device: str) -> proof_cache.Fact:
    """Returns all that the result of the test depends on."""
    graph = bundle.files[bundle.graph_path.name] if engine == "onnxruntime" else ""
    machine = (platform.machine(), os.uname().nodename if hasattr(os, "uname") else "")
    return ("answers", _RULES_VERSION, bundle.fingerprint, graph, engine, _version(engine), device, *machine)


def _version(engine: str) -> str:
    """Returns the version of the imported runtime, or of its package where other processes import it."""
    module = sys.modules.get(engine)
    return str(module.__version__) if module is not None else version(engine)


def _tensors(weights: str | bytes) -> dict[str, NDArray[Any]]:
    from safetensors.numpy import load, load_file

    return load(weights) if isinstance(weights, bytes) else load_file(weights)


def random_picture(size: int) -> NDArray[np.uint8]:
    """Returns a picture, uint8 (size, size, 3), of squares in random colours (seeded by the system)."""
    return _squares(np.random.default_rng().bytes(3 * _SQUARES_PER_SIDE**2), size)


def reference_picture(size: int) -> NDArray[np.uint8]:
    """Returns a picture, uint8 (size, size, 3), of squares in colours that are always the same."""
    # Not by numpy's generators: their streams may change.
    return _squares(hashlib.shake_256(b"faceprint").digest(3 * _SQUARES_PER_SIDE**2), size)


def _squares(colours: bytes, size: int) -> NDArray[np.uint8]:
    side = np.frombuffer(colours, np.uint8).reshape(_SQUARES_PER_SIDE, _SQUARES_PER_SIDE, 3)
    nearest = np.arange(size) * _SQUARES_PER_SIDE // size
    return side[nearest[:, np.newaxis], nearest]
