"""A fitted Network -> a ModelBundle with its model card on disk, checked against the network beforehand."""

import contextlib
import io
import platform
import warnings
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import retrieval
from retrieval.errors import RunError
from retrieval.models.bundle import ModelBundle, Preprocessing
from retrieval.models.network import Network

# The largest relative difference between the network's embeddings and its graph's.
TOLERANCE: Final = 1e-4
_OPSET: Final = 18


class _WithSoftmax(nn.Module):
    """The network as the graph shows it: probabilities instead of logits."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        embedding, logits = self.network(pixels)
        return embedding, torch.softmax(logits, 1)


def export(
    network: Network,
    folder: Path,
    *,
    labels: tuple[str, ...],
    preprocessing: Preprocessing,
    recipe: Mapping[str, Any],
    split: Mapping[str, Any],
    figures: Mapping[str, Any],
    sample: NDArray[np.uint8],
    describe: Callable[[ModelBundle], str] | None = None,
) -> ModelBundle:
    """Writes a network as a bundle.

    Args:
        network: fitted; left on the CPU and in evaluation mode.
        folder: gets the bundle's files.
        labels: the identities, in the order of the logits.
        preprocessing: how photos become pixels.
        recipe, split, figures: written into the card.
        sample: uint8 (n, size, size, 3), real photos that the graph is tried on.
        describe: gives the text of the model card; without it there is none.

    Raises:
        RunError: the graph's embeddings differ from the network's by more than TOLERANCE.
        StorageError: the folder cannot be written.
    """
    network.cpu().eval()
    graph = graph_of(network, preprocessing.size)
    _check(network, graph, sample)
    return ModelBundle.create(
        folder,
        tensors={name: tensor.contiguous().numpy() for name, tensor in network.state_dict().items()},
        graph=graph,
        architecture=network.architecture,
        labels=labels,
        preprocessing=preprocessing,
        dimension=network.dimension,
        embedding=network.embedding,
        recipe=recipe,
        split=split,
        figures=figures,
        versions=versions(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        describe=describe,
    )


def graph_of(network: Network, size: int) -> bytes:
    """The network as ONNX: `pixels` uint8 (n, size, size, 3) to `embedding` and `probabilities`."""
    pixels = torch.zeros(2, size, size, 3, dtype=torch.uint8)
    # The exporter prints its progress and warns of its own deprecations; neither is the user's concern.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _WithSoftmax(network).eval(),
            (pixels,),
            input_names=["pixels"],
            output_names=["embedding", "probabilities"],
            opset_version=_OPSET,
            dynamic_shapes={"pixels": {0: torch.export.Dim("n")}},
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise RunError("torch's ONNX exporter gave nothing back; upgrade torch and onnxscript.")
    return bytes(program.model_proto.SerializeToString())


def versions() -> dict[str, str]:
    """Of everything that a result may depend on."""
    packages = ("torch", "torchvision", "onnx", "onnxscript", "numpy", "pillow")
    return {
        "faceprint": retrieval.__version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def _check(network: Network, graph: bytes, sample: NDArray[np.uint8]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (found,) = session.run(["embedding"], {"pixels": sample})
    with torch.inference_mode():
        expected = network(torch.from_numpy(sample))[0].numpy()
    difference = np.linalg.norm(found - expected, axis=1).max() / np.linalg.norm(expected, axis=1).max()
    if not difference <= TOLERANCE:
        raise RunError(
            f"The exported graph differs from the network by {difference:.1e} (at most {TOLERANCE:.0e} is "
            "allowed); the model was not written."
        )
