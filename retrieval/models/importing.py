"""Makes a model of an embedding network in ONNX: `import_model` checks its file and writes a bundle."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, cast, get_args

import numpy as np

import retrieval
from retrieval.errors import InputError
from retrieval.images.face_detector import FaceDetector
from retrieval.images.preprocessing import FaceAlignment, Preprocessing
from retrieval.models import onnx_wrapper
from retrieval.models.bundle import IMPORTED, MAX_FILE_BYTES, MAX_SIZE, Embedding, Length, ModelBundle
from retrieval.models.imported_card import describe
from retrieval.models.network_trial import NetworkTrial
from retrieval.models.onnx_wrapper import ChannelOrder, Layout, NetworkInput, Port, Signature
from retrieval.system import onnx_graph
from retrieval.system.files import open_plain, why
from retrieval.system.paths import readable

# Element types of inputs that pixels are converted to.
_INPUT_KINDS: Final = ("float32", "float16", "float64")
# The oldest version of the standard operators that onnxruntime runs, and that has those around the network.
_MIN_OPSET: Final = 7


@dataclass(frozen=True)
class Preset:
    """How the networks of a project take pictures. The attributes are arguments of `import_model`.

    Attributes:
        says: the networks that it is for.
        normalizing: whether some of these networks normalize by themselves; such one takes 0 to 255.
    """

    says: str
    colour: ChannelOrder
    mean: float
    std: float
    size: int = 112
    layout: Layout = "nchw"
    length: Length = "unit"
    normalizing: bool = False


# All are trained with faces that were aligned to the ArcFace template.
PRESETS: Final = {
    # https://github.com/deepinsight/insightface, python-package/insightface/model_zoo/arcface_onnx.py: RGB,
    # 127.5 and 127.5, or 0 and 1 for networks of MXNet, which begin with a subtraction and a multiplication.
    "arcface": Preset("InsightFace's recognition models", "rgb", 127.5, 127.5, normalizing=True),
    # https://github.com/opencv/opencv, modules/objdetect/src/face_recognize.cpp: RGB of 0 to 255.
    "sface": Preset("OpenCV zoo's face_recognition_sface", "rgb", 0.0, 1.0),
    # https://github.com/mk-minchul/AdaFace, inference.py: BGR, (x / 255 - 0.5) / 0.5.
    "adaface": Preset("AdaFace", "bgr", 127.5, 127.5),
}


def import_model(
    network: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    preset: str | None = None,
    size: int | None = None,
    colour: ChannelOrder | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    layout: Layout | None = None,
    length: Length | None = None,
    output: str | None = None,
    detector: FaceDetector | None = None,
    margin: float = 0.0,
    mirrored: bool = False,
) -> ModelBundle:
    """Makes a model of an embedding network in an ONNX file, writes it into a folder and returns it.

    The network is run on a few pictures first: it must give one finite embedding for each, the same alone and
    in a batch. The model has no labels; the same file and arguments give the same fingerprint.

    Args:
        network: an ONNX file: one image in, an embedding (n, d) or (n, d, 1, 1) out, no other files.
        out: the folder of the model; an older model there is replaced.
        preset: a key of PRESETS, which gives what the following arguments leave out.
        size: side of the network's input in pixels; None is what the file states.
        colour: the order of its channels, "rgb" or "bgr".
        mean, std: its input is (x - mean) / std for x of 0 to 255: a number, or one for each channel.
        layout: "nchw" or "nhwc"; None is what the file states.
        length: "unit" divides embeddings by their Euclidean length, "raw" takes them as they are; None is
            "unit".
        output: the tensor that is the embedding: an output, or an inner one; None is the only output.
        detector: finds the faces that are embedded (`open_detector`); None takes pictures as they are.
        margin: context around an aligned face, as a share of its side, on each side.
        mirrored: an embedding is the mean of those of a picture and of its mirror image, before it is divided
            by its length: fewer errors in twice the time.

    Raises:
        InputError: the file cannot be read or is no such network, an argument is missing, or it contradicts
            the file.
        StorageError: `out` cannot be written.
    """
    path = Path(network)
    data = _read(path)
    found = _signature(path, data)
    source = _source(path, found)
    chosen = _chosen(preset, found)
    known_layout = _layout(path, source, layout or chosen.get("layout"))
    takes = NetworkInput(
        size=_size(path, source, known_layout, chosen.get("size") if size is None else size),
        colour=_choice("colour", colour or chosen.get("colour"), get_args(ChannelOrder)),
        mean=_per_channel("mean", mean, chosen),
        std=_per_channel("std", std, chosen),
        layout=known_layout,
        mirrored=mirrored,
    )
    if not all(takes.std):
        raise InputError("`std` is 0 and pixels are divided by it; give another number.")
    chosen_length = cast(Length, _choice("length", length or chosen.get("length", "unit"), get_args(Length)))
    if margin and detector is None:
        raise InputError("A `margin` lies around faces that a `detector` finds; give one, or leave it out.")
    preprocessing = Preprocessing(
        size=takes.size,
        crop=1.0,
        colour="srgb",
        faces=None if detector is None else FaceAlignment(detector.sha256, margin=margin),
    )
    output = _output(path, found, output)
    trial = NetworkTrial(path, data, found, takes, output)
    graph, reference = trial.graph(unit=chosen_length == "unit")
    return ModelBundle.create(
        out,
        tensors=None,
        graph=graph,
        architecture=IMPORTED,
        labels=(),
        preprocessing=preprocessing,
        dimension=len(reference),
        recipe={
            "network": readable(path.name),
            "network_sha256": sha256(data).hexdigest(),
            **({} if preset is None else {"preset": preset}),
            "colour": takes.colour,
            "mean": list(takes.mean),
            "std": list(takes.std),
            "layout": takes.layout,
            "output": output,
            **({"mirrored": True} if mirrored else {}),
        },
        split={},
        figures={},
        versions={
            "faceprint": retrieval.__version__,
            **{name: version(name) for name in ("onnxruntime", "numpy")},
        },
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        embedding=Embedding(chosen_length),
        detector=detector,
        reference=tuple(reference.tolist()),
        describe=describe,
    )


def _read(path: Path) -> bytes:
    try:
        with open_plain(path) as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {why(error)}; give an ONNX file.") from error
    if len(data) > MAX_FILE_BYTES:
        raise InputError(
            f"{path} has more than 2 GiB, which no ONNX file in one piece has; give another file."
        )
    return data


def _signature(path: Path, data: bytes) -> Signature:
    try:
        onnx_graph.check_graph(data)
        found = onnx_wrapper.signature(data)
    except onnx_graph.RefusedGraph as error:
        raise InputError(
            f"{path} cannot be imported: {error}; export the network as one ONNX file of standard operators."
        ) from error
    if found.opset < _MIN_OPSET:
        raise InputError(
            f"{path} has operators of version {found.opset}, and {_MIN_OPSET} is the oldest that runs; "
            "export the network again."
        )
    return found


def _source(path: Path, found: Signature) -> Port:
    """Returns the input of a network that takes one image."""
    if len(found.inputs) != 1:
        names = ", ".join(one.name for one in found.inputs) or "none"
        raise InputError(f"{path} must take one image, and its inputs are {names}; give another network.")
    (source,) = found.inputs
    kind = onnx_wrapper.KINDS.get(source.kind, f"of kind {source.kind}")
    if kind not in _INPUT_KINDS:
        raise InputError(
            f"The input of {path} is {kind}, not {', '.join(_INPUT_KINDS[:-1])} or {_INPUT_KINDS[-1]}; "
            "export the network with an input of one of these."
        )
    if not _may_be_colour(source.shape):
        raise InputError(
            f"{path} takes {_shown(source.shape)} and not pictures of 3 channels; give another network."
        )
    return source


def _may_be_colour(shape: Sequence[int | None] | None) -> bool:
    """Returns whether a stated shape may be one of pictures with 3 channels."""
    return shape is None or (len(shape) == 4 and not {3, None}.isdisjoint({shape[1], shape[3]}))


def _shown(shape: Sequence[int | None] | None) -> str:
    shape = shape or ()
    return f"({', '.join('n' if one is None else str(one) for one in shape)})"


def _chosen(preset: str | None, found: Signature) -> dict[str, Any]:
    """Returns the arguments that a preset gives; none without one."""
    if preset is None:
        return {}
    if preset not in PRESETS:
        raise InputError(f"There is no preset {preset}; choose of {', '.join(PRESETS)}.")
    chosen = vars(PRESETS[preset])
    if found.normalizes and chosen["normalizing"]:
        chosen = {**chosen, "mean": 0.0, "std": 1.0}
    return chosen


def _choice(name: str, value: Any, known: Sequence[str]) -> Any:
    if value is None:
        raise _missing(name)
    if value not in known:
        raise InputError(f"`{name}` is {value}; choose of {', '.join(known)}.")
    return value


def _missing(name: str) -> InputError:
    return InputError(
        f"The file does not say how the network takes pictures: give `{name}`, or a `preset` "
        f"({', '.join(PRESETS)})."
    )


def _per_channel(
    name: str, value: float | Sequence[float] | None, chosen: dict[str, Any]
) -> tuple[float, float, float]:
    given = chosen.get(name) if value is None else value
    if given is None:
        raise _missing(name)
    numbers = [float(one) for one in (given if isinstance(given, Sequence) else [given])]
    if len(numbers) not in (1, 3) or not np.isfinite(numbers).all():
        raise InputError(f"`{name}` is {value}; give one number, or three: one for each channel.")
    first, second, third = numbers * (3 // len(numbers))
    return first, second, third


def _layout(path: Path, source: Port, given: Any) -> Layout:
    stated = _stated_layout(source)
    layout = given or stated
    if layout is None:
        raise InputError(f"{path} does not state where its channels are; give `layout`.")
    chosen = cast(Layout, _choice("layout", layout, get_args(Layout)))
    if stated not in (None, chosen):
        raise InputError(f"{path} takes {_shown(source.shape)}, which is `layout='{stated}'`; give that.")
    return chosen


def _stated_layout(source: Port) -> Layout | None:
    if source.shape is None:
        return None
    first, last = source.shape[1] == 3, source.shape[3] == 3
    return None if first == last else "nchw" if first else "nhwc"


def _size(path: Path, source: Port, layout: Layout, given: int | None) -> int:
    shape = source.shape or (None,) * 4
    stated = set(shape[1:3] if layout == "nhwc" else shape[2:4]) - {None}
    if len(stated) > 1:
        raise InputError(
            f"{path} takes pictures of {_shown(source.shape)}, which are no squares; give another network."
        )
    size = given if given is not None else next(iter(stated), None)
    if size is None:
        raise InputError(f"{path} does not state the size of its pictures; give `size`, in pixels.")
    if not 1 <= size <= MAX_SIZE:
        raise InputError(f"`size` is {size}; it must be between 1 and {MAX_SIZE:,} pixels.")
    if stated and size not in stated:
        raise InputError(
            f"{path} takes pictures of {next(iter(stated))} pixels, not of {size}; give that `size`."
        )
    return int(size)


def _output(path: Path, found: Signature, given: str | None) -> str:
    names = [one.name for one in found.outputs]
    if given is not None:
        if given not in found.tensors:
            raise InputError(
                f"{path} computes no {given}; its outputs are {', '.join(names)}: name one as `output`."
            )
        return given
    if len(names) != 1:
        listed = ", ".join(names) or "none"
        raise InputError(f"The outputs of {path} are {listed}; name the embedding as `output`.")
    return names[0]
