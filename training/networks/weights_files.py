"""Files of a ResNet50's weights: their formats, their layouts, and how a layout is recognized.

Files of two layouts have the same names and shapes of tensors, and are weights of different networks.
VGGFace2's ResNet50 (Cao et al., 2018) was trained in Caffe and is in use as a pickled dict of numpy arrays
under torchvision's names. torchvision's ResNet50 takes them without a complaint, and computes something else.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from retrieval.errors import InputError, WeightsError
from retrieval.system.files import path_in_utf8
from training.networks import numpy_pickle

_T = TypeVar("_T")


@dataclass(frozen=True)
class Layout:
    """What the numbers of a weights file were trained for, which the names of its tensors do not say.

    Attributes:
        caffe: as in `retrieval.models.network.Architecture`.
        bgr: whether the input channels of conv1 are blue, green, red.
        normalisation: mean and standard deviation of a pixel of 0 to 255, in red, green, blue; None for
            ImageNet's.
    """

    caffe: bool = False
    bgr: bool = False
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None


LAYOUTS: Final[Mapping[str, Layout]] = {
    "torchvision": Layout(),
    "vggface2": Layout(caffe=True, bgr=True, normalisation=((131.0912, 103.8827, 91.4953), (1.0, 1.0, 1.0))),
}

# What training programs put before the names of a network within a network.
_PREFIXES: Final = re.compile(r"^((module|backbone|model)\.)+")

# The largest pickle in bytes, which is read whole. A ResNet50 with VGGFace2's 8,631 identities has 165 MB.
_MAX_PICKLE_BYTES: Final = 2**31

_ZIP: Final = b"PK\x03\x04"
# The number with which a file of torch before 1.6 begins, as its pickle writes it.
_TORCH_MAGIC: Final = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

# The sum of bn1's variances divided by that of conv1's squared weights estimates the variance of a normalised
# pixel, up to the correlation of neighbours: 1.4 for torchvision's ImageNet weights. Pixels of 0 to 255 have
# about 58**2 times the variance. The limit lies between, on a logarithmic scale.
_MOST_VARIANCE: Final = 100.0


@dataclass(frozen=True)
class WeightsFile:
    """Tensors of a file under torchvision's names.

    Attributes:
        tensors: by name, in the layout of the file.
        arrays: whether the file is a pickle of numpy arrays.
    """

    tensors: dict[str, Tensor]
    arrays: bool


def read(path: Path) -> WeightsFile:
    """Returns the tensors of a file: safetensors (by its suffix), torch's format or a pickle (by its bytes).

    The state dict may be the entry `state_dict` of the file's dict. The prefixes `module.`, `backbone.` and
    `model.` of names are removed.

    Raises:
        InputError: the file does not exist.
        WeightsError: it cannot be read, asks for more than tensors, or holds no state dict.
    """
    if not path.is_file():
        raise InputError(f"There is no weights file {path}; give imagenet, none or the path of a file.")
    arrays = False
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            with path_in_utf8(path) as name:
                found: Mapping[str, Tensor] | None = load_file(name)
        elif _is_of_torch(path):
            found = _state_dict(_load_torch(path), Tensor)
        else:
            arrays, found = True, _read_pickle(path)
    except numpy_pickle.RefusedPickle as error:
        raise WeightsError(
            f"{path} is refused, and nothing in it was run: it asks for {error}, and only tensors and numpy "
            "arrays are read; give the weights as safetensors."
        ) from error
    except Exception as error:
        # Each library raises its own exceptions for a file in another format.
        raise WeightsError(
            f"{path} cannot be read as safetensors, as a torch state dict of tensors or as a pickle of numpy "
            "arrays; copy it whole again, or give a file in one of these formats."
        ) from error
    if found is None:
        raise WeightsError(f"{path} does not hold a state dict (names with tensors).")
    return WeightsFile(_without_prefixes(found, path), arrays)


def recognize(file: WeightsFile, source: str) -> str:
    """Returns the layout of a file: "vggface2" for a pickle of numpy arrays, otherwise "torchvision".

    Args:
        file: the tensors of a ResNet50.
        source: the name of the file, for the error.

    Raises:
        WeightsError: the file is not a pickle, but its first layer was trained on pixels of 0 to 255.
    """
    if file.arrays:
        return "vggface2"
    if _takes_raw_pixels(file.tensors):
        raise WeightsError(
            f"{source} has torchvision's names, but its first layer expects pixels of 0 to 255, as "
            "VGGFace2's ResNet50 does and torchvision's does not; say `weights_layout='vggface2'` or "
            "`weights_layout='torchvision'`."
        )
    return "torchvision"


def check_layout(name: str) -> None:
    """Checks the name of a layout, or "auto".

    Raises:
        InputError: there is no such layout.
    """
    known = ("auto", *LAYOUTS)
    if name not in known:
        raise InputError(f"There is no layout {name} of weights; choose of {', '.join(known)}.")


def _is_of_torch(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(len(_ZIP) + len(_TORCH_MAGIC))
    return head.startswith(_ZIP) or _TORCH_MAGIC in head


def _load_torch(path: Path) -> object:
    try:
        # weights_only: torch refuses a pickle that could run code.
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise numpy_pickle.RefusedPickle("objects other than tensors") from error


def _read_pickle(path: Path) -> dict[str, Tensor] | None:
    if path.stat().st_size > _MAX_PICKLE_BYTES:
        raise ValueError("larger than any ResNet50")
    data = path.read_bytes()
    found = _state_dict(numpy_pickle.loads(data), numpy_pickle.PickledArray)
    if found is None:
        return None
    # Many arrays may name the same numbers, and be larger together than memory.
    if sum(array.stated_bytes for array in found.values()) > len(data):
        raise ValueError("more numbers than the file has")
    return {name: torch.from_numpy(array.made()) for name, array in found.items()}


def _state_dict(state: object, kind: type[_T]) -> dict[str, _T] | None:
    """Returns a dict of names and values of a kind, which may be an entry of `state`; None for all else."""
    inner: Any = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(inner, dict):
        return None
    fits = all(isinstance(name, str) and isinstance(value, kind) for name, value in inner.items())
    return inner if fits else None


def _without_prefixes(found: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, tensor in found.items():
        plain = _PREFIXES.sub("", name)
        if plain in tensors:
            raise WeightsError(
                f"{path} holds {plain} of two networks; give a file with the tensors of one of them."
            )
        tensors[plain] = tensor
    return tensors


def _takes_raw_pixels(tensors: Mapping[str, Tensor]) -> bool:
    """Whether pixels reach conv1 undivided; False where the file lacks conv1 or bn1."""
    weight, variance = tensors.get("conv1.weight"), tensors.get("bn1.running_var")
    if weight is None or variance is None:
        return False
    return bool(variance.float().sum() > _MOST_VARIANCE * weight.float().square().sum())
