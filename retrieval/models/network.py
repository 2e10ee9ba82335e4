"""The network for training and the torch engine: ResNet50 with normalisation and a new last layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

from retrieval.errors import InputError
from retrieval.models.bundle import LAYERS, Embedding

# ImageNet's mean and standard deviation, in the 0..255 of a uint8 pixel.
_MEAN: Final = (0.485 * 255, 0.456 * 255, 0.406 * 255)
_STD: Final = (0.229 * 255, 0.224 * 255, 0.225 * 255)
# The generalized mean of activations x is the p-th root of the mean of x**p (Radenovic et al., 2018, who
# begin with 3). Their floor: a root has no slope at 0.
GEM_EXPONENT: Final = 3.0
GEM_FLOOR: Final = 1e-6


@dataclass(frozen=True)
class Architecture:
    """A member of the ResNet family (He et al., 2015) and its last layer.

    Attributes:
        layers: blocks per stage.
        width_per_group: the blocks' inner width.
        cosine: whether the last layer is a CosineClassifier.
        caffe: whether it is the network as first published for Caffe (He et al., 2015): the first convolution
            of a block has the block's stride, not the second one as in torchvision; the max pooling is not
            padded, and its last windows may reach beyond the edge.
    """

    layers: tuple[int, int, int, int]
    width_per_group: int
    cosine: bool = False
    caffe: bool = False


ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "resnet50": Architecture((3, 4, 6, 3), 64),
    "resnet50-cosine": Architecture((3, 4, 6, 3), 64, cosine=True),
    "resnet50-caffe": Architecture((3, 4, 6, 3), 64, caffe=True),
    "resnet50-caffe-cosine": Architecture((3, 4, 6, 3), 64, cosine=True, caffe=True),
    # The same family at its smallest: one narrow block a stage. For tests of everything around it.
    "resnet14-narrow": Architecture((1, 1, 1, 1), 4),
    "resnet14-narrow-cosine": Architecture((1, 1, 1, 1), 4, cosine=True),
    "resnet14-narrow-caffe": Architecture((1, 1, 1, 1), 4, caffe=True),
    "resnet14-narrow-caffe-cosine": Architecture((1, 1, 1, 1), 4, cosine=True, caffe=True),
}


def architecture_of(family: str, classifier: str) -> str:
    """The key of ARCHITECTURES for a member of the family with a "linear" or a "cosine" classifier."""
    return f"{family}-cosine" if classifier == "cosine" else family


def variant_of(architecture: str, *, caffe: bool) -> str:
    """The key of ARCHITECTURES for the same network in Caffe's form, or in torchvision's."""
    wanted = replace(ARCHITECTURES[architecture], caffe=caffe)
    return next(name for name, one in ARCHITECTURES.items() if one == wanted)


class CosineClassifier(nn.Linear):
    """A last layer with logits of `scale` times the cosines of features with each identity's weights.

    Only the direction of the features then separates identities, as between embeddings of unit length (Wang
    et al., 2018, CosFace). The scale is needed because plain cosines are too close together for a softmax to
    reach high probabilities.
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
    """torchvision's ResNet with another last layer: takes uint8 pixels, gives embeddings and logits.

    Its parameters have torchvision's key names. `mean` and `std` are buffers beside them, so that the
    normalisation is stored with the weights. So are `projection_mean` and `projection_matrix`, where the
    embedding is projected.

    Attributes:
        architecture: a key of ARCHITECTURES.
        embedding: the conversion of activations to an embedding.
        dimension: the number of values of an embedding.
    """

    mean: Tensor
    std: Tensor
    projection_mean: Tensor | None
    projection_matrix: Tensor | None

    def __init__(
        self, labels: int, *, architecture: str = "resnet50", embedding: Embedding = Embedding()
    ) -> None:
        """Makes a network with random weights, and zeros for a projection.

        Raises:
            InputError: the projection has more dimensions than its layers have.
        """
        chosen = ARCHITECTURES[architecture]
        super().__init__(
            Bottleneck, list(chosen.layers), num_classes=labels, width_per_group=chosen.width_per_group
        )
        if chosen.cosine:
            self.fc = CosineClassifier(self.features_of(Embedding()), labels)
        if chosen.caffe:
            self._become_caffes()
        self.architecture = architecture
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))
        self.embed_as(embedding)

    def _become_caffes(self) -> None:
        self.maxpool = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        for block in self.modules():
            if isinstance(block, Bottleneck):
                block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Changes the normalisation to a mean and standard deviation of pixels of 0 to 255, (3,), RGB."""
        self.mean.copy_(torch.tensor(mean).view(1, 3, 1, 1))
        self.std.copy_(torch.tensor(std).view(1, 3, 1, 1))

    def embed_as(self, embedding: Embedding, projection: Projection | None = None) -> None:
        """Changes the embedding; the classifier is unchanged.

        Args:
            embedding: the new conversion of activations.
            projection: its projection, if it has one; None is zeros, until weights are loaded.

        Raises:
            InputError: the projection has more dimensions than its layers have.
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
        """Returns the size of an embedding before its projection: the channels of its layers."""
        return sum(getattr(self, layer)[-1].conv3.out_channels for layer in embedding.layers)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns embeddings and logits of a batch.

        Args:
            pixels: uint8 (n, H, W, 3), RGB.

        Returns:
            The embedding (n, dimension) float32, by default avg_pool (n, 2048); and logits (n, labels)
            float32, which are always avg_pool's.
        """
        x = (pixels.permute(0, 3, 1, 2).to(self.mean.dtype) - self.mean) / self.std
        # Only the convolutions may have lower precision (`retrieval.models.torch_engine`).
        x = self.maxpool(self.relu(self.bn1(self.conv1(x.to(self.conv1.weight.dtype)))))
        maps: dict[str, Tensor] = {}
        for layer in LAYERS:
            x = getattr(self, layer)(x)
            if layer in self.embedding.layers:
                maps[layer] = x.to(self.mean.dtype)
        pooled = torch.flatten(self.avgpool(x.to(self.mean.dtype)), 1)
        return self.finish(self._features(maps, pooled)), self.fc(pooled)

    def _features(self, maps: Mapping[str, Tensor], pooled: Tensor) -> Tensor:
        """Returns the pooled activations of the layers, concatenated (n, f); `pooled` is layer4's mean."""
        if self.embedding.pooling == "gem":
            parts = [_generalized_mean(x) for x in maps.values()]
        else:
            parts = [pooled if layer == LAYERS[-1] else x.mean((2, 3)) for layer, x in maps.items()]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def finish(self, features: Tensor) -> Tensor:
        """Returns embeddings (n, dimension) of pooled activations (n, f): projected and normalized."""
        if self.projection_mean is not None and self.projection_matrix is not None:
            features = nn.functional.linear(features - self.projection_mean, self.projection_matrix)
        return nn.functional.normalize(features) if self.embedding.length == "unit" else features


def _generalized_mean(x: Tensor) -> Tensor:
    return x.clamp(min=GEM_FLOOR).pow(GEM_EXPONENT).mean((2, 3)).pow(1 / GEM_EXPONENT)


@dataclass(frozen=True)
class Layer:
    """A row of the layer table.

    Attributes:
        name: dotted, as in the weights file.
        kind: the type of layer.
        activations: the output shape for one picture, height x width x channels.
        learnables: sizes of the learnable parameters, such as "Weight 7x7x3x64".
        states: sizes of the state that is not learned (running mean and variance).
    """

    name: str
    kind: str
    activations: tuple[int, ...]
    learnables: tuple[str, ...]
    states: tuple[str, ...]

    @property
    def total_learnables(self) -> int:
        """The number of learnable parameters."""
        return sum(_product(text.split(" ")[1]) for text in self.learnables)


def layer_table(network: Network, size: int) -> list[Layer]:
    """Returns the network's layers in the order of a forward pass of a `size` x `size` picture."""
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
    """Returns the row of the embedding, unless it is avg_pool, which has a row already."""
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
    """Returns a filter's size as height x width x in x out, as in papers; torch has out x in x h x w."""
    shape = tensor.shape
    order = (shape[2], shape[3], shape[1], shape[0]) if tensor.ndim == 4 else tuple(shape)
    return "x".join(str(number) for number in order)


def _product(size: str) -> int:
    product = 1
    for number in size.split("x"):
        product *= int(number)
    return product
