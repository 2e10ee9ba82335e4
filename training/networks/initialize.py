"""The network to train, and the origin of its parameters: a download, a file or random numbers."""

import http.client
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights
from torchvision.models.resnet import Bottleneck

from retrieval.errors import InputError, WeightsError
from retrieval.models.network import Network, variant_of
from retrieval.system.files import why
from retrieval.system.paths import readable
from training.networks import weights_files
from training.networks.weights_files import LAYOUTS, Layout


@dataclass(frozen=True)
class Start:
    """The origin of a network's parameters.

    Attributes:
        source: "imagenet", "none" or the name of the file.
        fresh: the modules that start from random numbers, by name, the new last layer left out.
        layout: "torchvision" or "vggface2", the layout by which a file was read; None without a file.
    """

    source: str
    fresh: tuple[str, ...]
    layout: str | None = None


def build(
    labels: int, *, weights: str, architecture: str = "resnet50", layout: str = "auto"
) -> tuple[Network, Start]:
    """Returns a network for `labels` identities, and the origin of its parameters.

    Parameters that the weights lack are initialized at random, and the last batch norm of each such block at
    zero (Goyal et al., 2017: the block then starts as the identity function). Otherwise a fresh stage after
    trained ones makes the loss explode at the paper's learning rate.

    The network computes what the weights were trained for: for a file in VGGFace2's layout, its architecture
    is Caffe's variant of `architecture`, its normalisation VGGFace2's, and its first convolution takes red,
    green, blue.

    Args:
        labels: the number of identities of the classifier.
        weights: "imagenet" (torchvision's download and cache), "none", or the path of a file as
            `weights_files.read` reads it, which may be partial.
        architecture: a key of ARCHITECTURES.
        layout: "torchvision", "vggface2" or "auto" (`weights_files.recognize`), of a file.

    Raises:
        InputError: the download fails, the file or the layout does not exist, or a layout is given without a
            file.
        WeightsError: the file does not hold weights of a ResNet50, or its layout must be said.
    """
    weights_files.check_layout(layout)
    if weights in ("none", "imagenet"):
        if layout != "auto":
            raise InputError(
                f"`weights_layout` describes a file, and `weights={weights!r}` is none; leave it out."
            )
        if weights == "imagenet":
            architecture = variant_of(architecture, caffe=False)
        network = Network(labels, architecture=architecture)
        missing = _load(network, _download() if weights == "imagenet" else {})
        start = Start(weights, _modules(missing))
    else:
        network, missing, start = _from_file(labels, Path(weights), architecture, layout)
    _zero_fresh_blocks(network, missing)
    return network, start


def _from_file(labels: int, path: Path, architecture: str, layout: str) -> tuple[Network, list[str], Start]:
    """Returns a network with a file's tensors, the names that the file lacks, and the origin."""
    source, file = readable(os.path.basename(path)), weights_files.read(path)
    # Both variants of an architecture have these tensors. On "meta", which draws no random numbers.
    with torch.device("meta"):
        body = _body(Network(labels, architecture=architecture))
    if misfit := _misfit(file.tensors, body):
        raise WeightsError(f"{source} is not a ResNet50's weights: {misfit}; give a file made for ResNet50.")
    name = weights_files.recognize(file, source) if layout == "auto" else layout
    chosen = LAYOUTS[name]
    network = Network(labels, architecture=variant_of(architecture, caffe=chosen.caffe))
    missing = _load(network, _for_rgb(file.tensors, chosen))
    if chosen.normalisation is not None:
        network.normalise(*chosen.normalisation)
    return network, missing, Start(source, _modules(missing), name)


def _for_rgb(tensors: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Returns the tensors of a layout for a network that takes red, green, blue."""
    if not layout.bgr or "conv1.weight" not in tensors:
        return tensors
    return {**tensors, "conv1.weight": tensors["conv1.weight"].flip(1)}


def _download() -> dict[str, Tensor]:
    try:
        return dict(ResNet50_Weights.IMAGENET1K_V2.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        # RuntimeError: what arrived is not the file that torchvision's checksum names.
        reason = getattr(error, "reason", None) or (why(error) if isinstance(error, OSError) else error)
        raise InputError(
            "ImageNet weights cannot be downloaded from torchvision's server "
            f"({reason}); give a file as `weights`, or start from nothing with `weights='none'`."
        ) from error


def _load(network: Network, given: dict[str, Tensor]) -> list[str]:
    """Copies the given tensors; returns the names of the body's parameters and buffers that are missing."""
    body = _body(network)
    network.load_state_dict({name: given[name] for name in body if name in given}, strict=False)
    return [name for name in body if name not in given and not name.endswith("num_batches_tracked")]


def _body(network: Network) -> dict[str, Tensor]:
    """Returns all tensors by name, except the last layer, the normalisation and a projection."""
    everything = network.state_dict()
    return {
        name: tensor
        for name, tensor in everything.items()
        if not name.startswith(("fc.", "mean", "std", "projection_"))
    }


def _misfit(given: dict[str, Tensor], body: dict[str, Tensor]) -> str | None:
    """Returns why tensors are not of a ResNet50; None if they are all or a part of one."""
    for name, tensor in given.items():
        if name in body and tensor.shape != body[name].shape:
            return f"{name} has another shape"
        # A deeper ResNet has every tensor of a ResNet50, and more blocks.
        if name not in body and name.startswith(("layer1.", "layer2.", "layer3.", "layer4.")):
            return f"a ResNet50 has no {name}"
    if not any(name.endswith("conv1.weight") for name in given.keys() & body.keys()):
        return "none of its tensors has a ResNet50's name"
    return None


def _zero_fresh_blocks(network: Network, missing: list[str]) -> None:
    """Makes each fresh block start as the identity function."""
    fresh = set(missing)
    for name, module in network.named_modules():
        if isinstance(module, Bottleneck) and f"{name}.bn3.weight" in fresh:
            nn.init.zeros_(module.bn3.weight)


def _modules(missing: list[str]) -> tuple[str, ...]:
    """Returns the top-level modules of parameter names: `layer4` for `layer4.0.bn1.weight`."""
    return tuple(dict.fromkeys(name.split(".")[0] for name in missing))
