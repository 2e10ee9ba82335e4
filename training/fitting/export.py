"""Export of a fitted network as a bundle with its model card; the ONNX graph is checked before writing."""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval.errors import RunError
from retrieval.images.photo_reader import PhotoReader
from retrieval.models.bundle import ModelBundle
from retrieval.models.network import Network
from training.fitting.graph import graph_of
from training.fitting.versions import versions

# The largest allowed relative difference between the embeddings of the network and those of its graph.
TOLERANCE: Final = 1e-4


def export(
    network: Network,
    folder: Path,
    *,
    labels: tuple[str, ...],
    reader: PhotoReader,
    recipe: Mapping[str, Any],
    split: Mapping[str, Any],
    figures: Mapping[str, Any],
    sample: NDArray[np.uint8],
    describe: Callable[[ModelBundle], str] | None = None,
) -> ModelBundle:
    """Writes a network as a bundle.

    Args:
        network: fitted; moved to the CPU and left in evaluation mode.
        folder: gets the bundle's files.
        labels: the identities, in the order of the logits.
        reader: its preprocessing and its face detector become the bundle's.
        recipe, split, figures: written into the card.
        sample: uint8 (n, size, size, 3), real photos on which the graph is checked.
        describe: returns the text of the model card; None writes no card.

    Raises:
        RunError: the graph's embeddings differ from the network's by more than TOLERANCE.
        StorageError: the folder cannot be written.
    """
    network.cpu().eval()
    graph = graph_of(network, reader.preprocessing.size)
    _check(network, graph, sample)
    return ModelBundle.create(
        folder,
        tensors={name: tensor.contiguous().numpy() for name, tensor in network.state_dict().items()},
        graph=graph,
        architecture=network.architecture,
        labels=labels,
        preprocessing=reader.preprocessing,
        detector=reader.detector,
        dimension=network.dimension,
        embedding=network.embedding,
        recipe=recipe,
        split=split,
        figures=figures,
        versions=versions(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        describe=describe,
    )


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
