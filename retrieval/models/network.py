"""Network: ResNet50 with its own normalisation and its new last layer."""

import http.client
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights
from torchvision.models.resnet import Bottleneck, ResNet

from retrieval.errors import InputError, WeightsError
from retrieval.models.bundle import LAYERS, Embedding
from retrieval.system.files import path_in_utf8, why
from retrieval.system.paths import readable

# ImageNet's mean and standard deviation, in the 0..255 of a uint8 pixel.
_MEAN: Final = (0.485 * 255, 0.456 * 255, 0.406 * 255)
_STD: Final = (0.229 * 255, 0.224 * 255, 0.225 * 255)
# The generalized mean of activations x is the p-th root of the mean of x**p (Radenovic et al., 2018, who
# begin with 3). Their floor: a root has no slope at 0.
_GEM_EXPONENT: Final = 3.0
_GEM_FLOOR: Final = 1e-6


@dataclass(frozen=True)
class Architecture:
    """A member of the ResNet family (He et al., 2015) and its last layer.

    Attributes:
        layers: blocks per stage.
        width_per_group: the blocks' inner width.
        cosine: whether the last layer is a CosineClassifier.
    """

    layers: tuple[int, int, int, int]
    width_per_group: int
    cosine: bool = False


ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "resnet50": Architecture((3, 4, 6, 3), 64),
    "resnet50-cosine": Architecture((3, 4, 6, 3), 64, cosine=True),
    # The same family at its smallest: one narrow block a stage. For tests of everything around it.
    "resnet14-narrow": Architecture((1, 1, 1, 1), 4),
    "resnet14-narrow-cosine": Architecture((1, 1, 1, 1), 4, cosine=True),
}


def architecture_of(family: str, classifier: str) -> str:
    """The key of ARCHITECTURES for a member of the family with a "linear" or a "cosine" classifier."""
    return f"{family}-cosine" if classifier == "cosine" else family


class CosineClassifier(nn.Linear):
    """A last layer whose logits are `scale` times the cosines of features with each identity's weights.

    What tells identities apart is then the direction of the features alone, as between embeddings of unit
    length (Wang et al., 2018, who call it CosFace). The scale is theirs to choose: cosines themselves are
    too close together for a softmax to become sure.
    """

    scale: Final = 16.0

    def __init__(self, features: int, labels: int) -> None:
        super().__init__(features, labels, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (n, labels) of features (n, f)."""
        directions = nn.functional.normalize(self.weight)
        return self.scale * nn.functional.linear(nn.functional.normalize(features), directions)


@dataclass(frozen=True)
class Projection:
    """A centred linear map: embedding x becomes matrix @ (x - mean).

    Attributes:
        mean: (f,) float32.
        matrix: (d, f) float32, d at most f.
    """

    mean: Tensor
    matrix: Tensor


class Network(ResNet):  # type: ignore[misc]  # torchvision ships no types
    """torchvision's ResNet, last layer replaced, that takes uint8 pixels and gives two answers in a pass.

    Its parameters have torchvision's key names; `mean` and `std` are buffers beside them, so that
    normalisation travels with the weights and nobody else can get it wrong. So do `projection_mean` and
    `projection_matrix`, where the embedding is projected.

    Attributes:
        architecture: a key of ARCHITECTURES.
        embedding: how activations become an embedding.
        dimension: how many numbers an embedding has.
    """

    mean: Tensor
    std: Tensor
    projection_mean: Tensor | None
    projection_matrix: Tensor | None

    def __init__(
        self, labels: int, *, architecture: str = "resnet50", embedding: Embedding = Embedding()
    ) -> None:
        """A network with random weights, and with zeros for a projection.

        Raises:
            InputError: a projection to more dimensions than there are.
        """
        chosen = ARCHITECTURES[architecture]
        super().__init__(
            Bottleneck, list(chosen.layers), num_classes=labels, width_per_group=chosen.width_per_group
        )
        if chosen.cosine:
            self.fc = CosineClassifier(self.features_of(Embedding()), labels)
        self.architecture = architecture
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))
        self.embed_as(embedding)

    def embed_as(self, embedding: Embedding, projection: Projection | None = None) -> None:
        """Gives other embeddings from now on; the classifier is not touched.

        Args:
            embedding: how.
            projection: where it projects; None is zeros, until weights are loaded.

        Raises:
            InputError: a projection to more dimensions than there are.
        """
        features, dimensions = self.features_of(embedding), embedding.dimensions
        if dimensions is not None and dimensions > features:
            raise InputError(
                f"{' and '.join(embedding.layers)} give {features:,} numbers, which cannot be projected to "
                f"{dimensions:,} dimensions; choose fewer."
            )
        if dimensions is None:
            projection = None
        elif projection is None:
            projection = Projection(torch.zeros(features), torch.zeros(dimensions, features))
        self.embedding = embedding
        self.dimension = features if dimensions is None else dimensions
        for name in ("mean", "matrix"):
            tensor = None if projection is None else getattr(projection, name).to(self.mean)
            self.register_buffer(f"projection_{name}", tensor)

    def features_of(self, embedding: Embedding) -> int:
        """How many numbers an embedding has before its projection: the channels of its layers."""
        return sum(getattr(self, layer)[-1].conv3.out_channels for layer in embedding.layers)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """One pass.

        Args:
            pixels: uint8 (n, H, W, 3), RGB.

        Returns:
            The embedding (n, dimension) float32, by default avg_pool (n, 2048); and logits (n, labels)
            float32, which are always avg_pool's.
        """
        x = (pixels.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        # The convolutions may have fewer bits (`retrieval.models.torch_engine`), and nothing else.
        x = self.maxpool(self.relu(self.bn1(self.conv1(x.to(self.conv1.weight.dtype)))))
        maps: dict[str, Tensor] = {}
        for layer in LAYERS:
            x = getattr(self, layer)(x)
            if layer in self.embedding.layers:
                maps[layer] = x.to(self.mean.dtype)
        pooled = torch.flatten(self.avgpool(x.to(self.mean.dtype)), 1)
        return self.finish(self._features(maps, pooled)), self.fc(pooled)

    def _features(self, maps: Mapping[str, Tensor], pooled: Tensor) -> Tensor:
        """The chosen layers' activations, pooled, side by side (n, f); layer4's average is given."""
        if self.embedding.pooling == "gem":
            parts = [_generalized_mean(x) for x in maps.values()]
        else:
            parts = [pooled if layer == LAYERS[-1] else x.mean((2, 3)) for layer, x in maps.items()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def finish(self, features: Tensor) -> Tensor:
        """Embeddings (n, dimension) of pooled activations (n, f): their projection and their length."""
        if self.projection_mean is not None and self.projection_matrix is not None:
            features = nn.functional.linear(features - self.projection_mean, self.projection_matrix)
        return nn.functional.normalize(features) if self.embedding.length == "unit" else features


def _generalized_mean(x: Tensor) -> Tensor:
    return x.clamp(min=_GEM_FLOOR).pow(_GEM_EXPONENT).mean((2, 3)).pow(1 / _GEM_EXPONENT)


@dataclass(frozen=True)
class Start:
    """Where a network's parameters came from.

    Attributes:
        source: "imagenet", "none" or the name of the file.
        fresh: the modules that start from random numbers, by name, the new last layer left out.
    """

    source: str
    fresh: tuple[str, ...]


def build(labels: int, *, weights: str, architecture: str = "resnet50") -> tuple[Network, Start]:
    """A network for `labels` identities.

    What the weights do not have starts fresh, and the last batch norm of each fresh block starts at
    zero (Goyal et al., 2017: a block then begins as the identity), without which a fresh stage behind
    trained ones makes the loss explode at the paper's rate.

    Args:
        labels: how many identities the classifier tells apart.
        weights: "imagenet" (torchvision's download and cache), "none", or the path of a safetensors
            file or of a torch state dict, which may be partial.
        architecture: a key of ARCHITECTURES.

    Raises:
        InputError: the download cannot be reached, or there is no such file.
        WeightsError: the file is not a ResNet50's.
    """
    network = Network(labels, architecture=architecture)
    if weights == "none":
        source, given = "none", dict[str, Tensor]()
    elif weights == "imagenet":
        source, given = "imagenet", _download()
    else:
        source, given = readable(os.path.basename(weights)), _read_weights(Path(weights))
        if misfit := _misfit(given, _body(network)):
            raise WeightsError(
                f"{source} is not a ResNet50's weights: {misfit}; give a file made for ResNet50."
            )
    missing = _load(network, given)
    _soften(network, missing)
    return network, Start(source, _modules(missing))


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


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"There is no weights file {path}; give imagenet, none or the path of a file.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            with path_in_utf8(path) as name:
                state: object = load_file(name)
        else:
            # weights_only: a pickle that could run code is refused by torch.
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Every library has its own exceptions for a file that is something else.
        raise WeightsError(
            f"{path} cannot be read as safetensors or as a torch state dict of tensors."
        ) from error
    inner = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(inner, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in inner.items()
    ):
        raise WeightsError(f"{path} does not hold a state dict (names with tensors).")
    return {name.removeprefix("module."): tensor for name, tensor in inner.items()}


def _load(network: Network, given: dict[str, Tensor]) -> list[str]:
    """Copies what fits; returns the parameters and buffers of the body that were not given."""
    body = _body(network)
    network.load_state_dict({name: given[name] for name in body if name in given}, strict=False)
    return [name for name in body if name not in given and not name.endswith("num_batches_tracked")]


def _body(network: Network) -> dict[str, Tensor]:
    """Everything but the last layer, the normalisation and a projection, under torchvision's key names."""
    everything = network.state_dict()
    return {
        name: tensor
        for name, tensor in everything.items()
        if not name.startswith(("fc.", "mean", "std", "projection_"))
    }


def _misfit(given: dict[str, Tensor], body: dict[str, Tensor]) -> str | None:
    """Why tensors are not a ResNet50's; None when they are, or are a part of it."""
    for name, tensor in given.items():
        if name in body and tensor.shape != body[name].shape:
            return f"{name} has another shape"
        # A deeper ResNet has every tensor of a ResNet50, and more blocks.
        if name not in body and name.startswith(("layer1.", "layer2.", "layer3.", "layer4.")):
            return f"a ResNet50 has no {name}"
    if not any(name.endswith("conv1.weight") for name in given.keys() & body.keys()):
        return "none of its tensors has a ResNet50's name"
    return None


def _soften(network: Network, missing: list[str]) -> None:
    """Starts each fresh block as the identity."""
    fresh = set(missing)
    for name, module in network.named_modules():
        if isinstance(module, Bottleneck) and f"{name}.bn3.weight" in fresh:
            nn.init.zeros_(module.bn3.weight)


def _modules(missing: list[str]) -> tuple[str, ...]:
    """`layer4.0.bn1.weight` and its siblings are, for a person, `layer4`."""
    return tuple(dict.fromkeys(name.split(".")[0] for name in missing))


@dataclass(frozen=True)
class Layer:
    """A row of the layer table.

    Attributes:
        name: dotted, as in the weights file.
        kind: the type of layer.
        activations: the shape that comes out for one picture, height x width x channels.
        learnables: sizes of the learnable parameters, such as "Weight 7x7x3x64".
        states: sizes of what is kept but not learned (running mean and variance).
    """

    name: str
    kind: str
    activations: tuple[int, ...]
    learnables: tuple[str, ...]
    states: tuple[str, ...]

    @property
    def total_learnables(self) -> int:
        """How many numbers are learned."""
        return sum(_product(text.split(" ")[1]) for text in self.learnables)


def layer_table(network: Network, size: int) -> list[Layer]:
    """The network's layers in the order in which a picture of `size` x `size` passes them."""
    rows = [Layer("input", "Image Input", (size, size, 3), (), ("Mean 1x1x3", "Std 1x1x3"))]
    names = {module: name for name, module in network.named_modules()}

    def note(module: nn.Module, _inputs: object, output: Tensor) -> None:
        rows.append(_row(names[module], module, output))

    leaves = [module for module in network.modules() if not list(module.children())]
    hooks = [leaf.register_forward_hook(note) for leaf in leaves]
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode():
            network(torch.zeros(1, size, size, 3, dtype=torch.uint8, device=network.mean.device))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    classes = rows[-1].activations
    return [*rows, Layer("probabilities", "Softmax", classes, (), ()), *_embedding_rows(network)]


def _embedding_rows(network: Network) -> list[Layer]:
    """What comes out beside the probabilities, where it is not avg_pool, which has its row."""
    if network.embedding == Embedding():
        return []
    buffers = {"Mean": network.projection_mean, "Matrix": network.projection_matrix}
    states = tuple(f"{name} {_size(buffer)}" for name, buffer in buffers.items() if buffer is not None)
    return [Layer("embedding", str(network.embedding), (network.dimension,), (), states)]


_KINDS: Final[Mapping[type, str]] = {
    nn.Conv2d: "Convolution",
    nn.BatchNorm2d: "Batch Normalization",
    nn.ReLU: "ReLU",
    nn.MaxPool2d: "Max Pooling",
    nn.AdaptiveAvgPool2d: "Global Average Pooling",
    nn.Linear: "Fully Connected",
    CosineClassifier: "Fully Connected (cosines)",
}


def _row(name: str, module: nn.Module, output: Tensor) -> Layer:
    shape = tuple(output.shape[1:])
    activations = (*shape[1:], shape[0]) if len(shape) == 3 else shape
    learnables = [f"{_title(key)} {_size(value)}" for key, value in module.named_parameters(recurse=False)]
    states = [
        f"{_title(key)} {_size(value)}"
        for key, value in module.named_buffers(recurse=False)
        if value.ndim  # num_batches_tracked is a counter, not a state of the layer
    ]
    kind = _KINDS.get(type(module), type(module).__name__)
    return Layer(name, kind, activations, tuple(learnables), tuple(states))


def _title(key: str) -> str:
    return key.replace("_", " ").capitalize().replace(" ", "-")


def _size(tensor: Tensor) -> str:
    """Height x width x in x out for a filter, as papers write it; torch has out x in x height x width."""
    shape = tensor.shape
    order = (shape[2], shape[3], shape[1], shape[0]) if tensor.ndim == 4 else tuple(shape)
    return "x".join(str(number) for number in order)


def _product(size: str) -> int:
    product = 1
    for number in size.split("x"):
        product *= int(number)
    return product
