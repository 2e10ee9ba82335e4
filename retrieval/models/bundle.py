"""The `ModelBundle`: a complete model on disk, the contract between training and retrieval.

    my.model/
      model.safetensors   the weights, under torchvision's key names, and the normalisation's mean and std;
                          absent from an imported model
      model.onnx          uint8 pixels (n, H, W, 3) in; embedding (n, d) and probabilities (n, c) out, the
                          latter not of an imported model
      face_detector.onnx  finds the faces that the model embeds; absent where it embeds whole pictures
      MODELCARD.md        what the model is and what it is not, for people; may be edited, and may be missing
      bundle.json         everything else; written last, so a folder with it is complete

A bundle contains no pickle, so that it can be opened without trusting its author.
"""

import base64
import binascii
import dataclasses
import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NotRequired, TypedDict, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from retrieval.errors import BundleError, InputError, StorageError
from retrieval.images.face_detector import FaceDetector
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from retrieval.system import onnx_graph, proof_cache
from retrieval.system.files import (
    copy_durably,
    is_about_path,
    make_output_folder,
    open_plain,
    other_than_file,
    path_in_utf8,
    whole_folder,
    why,
    write_durably,
)
from retrieval.system.manifests import check_tree, read_tree

# The newest format of a card that is read. A card with the paper's embedding keeps format 1, and one that
# ignores colour profiles has at most 2, one without a face detector at most 3, one that was not imported at
# most 4: older versions read these, and refuse the others.
FORMAT: Final = 5

_T = TypeVar("_T")

Length = Literal["raw", "unit"]
Pooling = Literal["avg", "gem"]
# The stages of a ResNet with activations that can be embedded, in the order of a forward pass.
LAYERS: Final = ("layer1", "layer2", "layer3", "layer4")

# Replaces the label of an erased identity.
FORGOTTEN: Final = "(forgotten)"
# The architecture of an imported model: any network in an ONNX file.
IMPORTED: Final = "onnx"
# The name of the card among the files of a bundle.
CARD: Final = "bundle.json"
_WEIGHTS: Final = "model.safetensors"
_GRAPH: Final = "model.onnx"
_DETECTOR: Final = "face_detector.onnx"
_DESCRIPTION: Final = "MODELCARD.md"
# The names of all files that a bundle may have.
FILE_NAMES: Final = frozenset({CARD, _WEIGHTS, _GRAPH, _DETECTOR, _DESCRIPTION})

# The largest weights or graph file in bytes: the limit of protobuf, far above the weights of a ResNet.
MAX_FILE_BYTES: Final = 2**31 - 1
# The largest input side in pixels and the largest dimension: beyond all models, but small enough for memory.
MAX_SIZE: Final = 4096
MAX_DIMENSION: Final = 65_536
_SHA256: Final = re.compile("[0-9a-f]{64}")
# Raise it when `onnx_graph.check_graph` becomes stricter: graphs that passed before are then checked again.
_GRAPH_RULES_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Relabel:
    """A new label for an output of a classifier.

    Attributes:
        label: the name; None for an erased identity.
        keep_photos: whether the identity's photos stay in the split, under the folder of the new name.
        photos: (part of the split, path below the folder) of the photos that this concerns, where the label
            has photos of other identities too; None for all.
    """

    label: str | None
    keep_photos: bool
    photos: tuple[tuple[str, str], ...] | None = None


def _check_choice(kind: str, chosen: object, known: Sequence[str]) -> None:
    if chosen not in known:
        raise InputError(f"There is no {kind} {chosen}; choose of {', '.join(known)}.")


@dataclass(frozen=True)
class Embedding:
    """The conversion of a network's activations to an embedding. The default is the paper's: plain avg_pool.

    The steps: the activations of each layer are pooled to one number a channel; the layers are concatenated;
    the result is projected; the length is normalized. Distances are always Euclidean.

    Attributes:
        length: "raw", or "unit": divided by its Euclidean length (a distance d then means a cosine of
            1 - d**2 / 2).
        layers: some of LAYERS, in their order.
        pooling: "avg", the mean over the picture, or "gem", its generalized mean with exponent 3
            (Radenovic et al., 2018).
        dimensions: the number of principal components of the training photos' embeddings to keep, centred;
            None for no projection.
        whiten: whether each component is divided by its standard deviation over the training photos.

    Raises:
        InputError: a choice does not exist, or the choices contradict each other.
    """

    length: Length = "raw"
    layers: tuple[str, ...] = ("layer4",)
    pooling: Pooling = "avg"
    dimensions: int | None = None
    whiten: bool = False

    def __post_init__(self) -> None:
        _check_choice("length", self.length, get_args(Length))
        _check_choice("pooling", self.pooling, get_args(Pooling))
        for layer in self.layers:
            _check_choice("layer", layer, LAYERS)
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise InputError(
                "Name at least one layer, each once, in the order in which a picture passes them."
            )
        if self.dimensions is not None and self.dimensions < 1:
            raise InputError("A projection keeps at least 1 dimension.")
        if self.whiten and self.dimensions is None:
            raise InputError("Only a projection can be whitened; say to how many dimensions.")

    @property
    def unprojected(self) -> "Embedding":
        """The same embedding without its projection."""
        return dataclasses.replace(self, dimensions=None, whiten=False)

    def __str__(self) -> str:
        pooled = {"avg": "avg_pool", "gem": "generalized mean (p = 3)"}[self.pooling]
        words = [pooled if self.layers == ("layer4",) else f"{pooled} of {' and '.join(self.layers)}"]
        if self.dimensions is not None:
            whitened = "whitened " if self.whiten else ""
            words.append(f"projected to {self.dimensions} {whitened}principal components")
        return ", ".join([*words, "unit length"] if self.length == "unit" else words)


@dataclass(frozen=True)
class ModelBundle:
    """A model on disk: its labels, preprocessing, recipe and figures.

    Attributes:
        folder: the folder of the bundle.
        architecture: its key in `retrieval.models.network.ARCHITECTURES`, or "onnx" for an imported model.
        labels: the identities of the classifier, in the order of its outputs; none for an imported model.
        preprocessing: the conversion of a picture to pixels.
        dimension: the number of float32 values of an embedding.
        fingerprint: SHA-256, in hex, over weights (of an imported model: the graph), architecture,
            preprocessing and embedding. Two bundles with the same fingerprint give the same embeddings;
            galleries refuse any other.
        recipe: the training options; of an imported model the file and how it takes pictures.
        split: the training and the held-out photos, relative to the data folder.
        figures: the measurements after training.
        versions: the versions of the packages that made it.
        created_at: ISO 8601, UTC.
        files: SHA-256, in hex, of each file by its name: the weights, the graph and the face detector.
        embedding: the conversion of activations to an embedding; the paper's where a card has none.
        reference: (dimension,) float32, the embedding of `self_test.reference_picture` when the model was
            imported; None for a trained model.
    """

    folder: Path
    architecture: str
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    dimension: int
    fingerprint: str
    recipe: Mapping[str, Any]
    split: Mapping[str, Any]
    figures: Mapping[str, Any]
    versions: Mapping[str, str]
    created_at: str
    files: Mapping[str, str]
    embedding: Embedding = Embedding()
    reference: tuple[float, ...] | None = None

    @property
    def imported(self) -> bool:
        """Whether the model was imported: it has no labels, and no weights outside its graph."""
        return self.architecture == IMPORTED

    @property
    def input_size(self) -> int:
        """Side of the input square in pixels."""
        return self.preprocessing.size

    @property
    def weights_path(self) -> Path:
        """The safetensors file."""
        return self.folder / _WEIGHTS

    @property
    def graph_path(self) -> Path:
        """The ONNX file."""
        return self.folder / _GRAPH

    @property
    def description_path(self) -> Path:
        """The model card, for people; the file may be missing. Nothing is checked against it."""
        return self.folder / _DESCRIPTION

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "ModelBundle":
        """Opens a bundle: reads its card and checks that its files exist. It does not read the weights.

        Raises:
            BundleError: the folder does not exist or is not a bundle, the card is damaged, a file is missing,
                or a newer version made the bundle.
        """
        folder = Path(folder)
        card = _read_card(folder)
        stated = card.get("embedding", {})
        layers = tuple(stated.get("layers", Embedding().layers))
        try:
            embedding = Embedding(**{**stated, "layers": layers})
            preprocessing = Preprocessing.of(card["preprocessing"])
        except (InputError, TypeError) as error:
            # TypeError: a field that this version does not have.
            kind = "an embedding" if isinstance(error, InputError) else "options"
            raise BundleError(
                f"{folder / CARD} states {kind} that this version of faceprint does not know "
                f"({str(error).partition(';')[0]}); upgrade faceprint."
            ) from error
        bundle = cls(
            folder=folder,
            labels=tuple(card["labels"]),
            preprocessing=preprocessing,
            embedding=embedding,
            reference=_decoded(card["reference"]) if "reference" in card else None,
            **{name: card[name] for name in _PLAIN_FIELDS},
        )
        for path in (folder / name for name in bundle.files):
            if (other := other_than_file(path)) is not None:
                raise BundleError(f"{path} is {other}, not a file; copy the model whole again.")
            if not path.is_file():
                raise BundleError(
                    f"The model {folder} is incomplete: {path.name} is missing; copy it whole again."
                )
        return bundle

    @staticmethod
    def stated_files(folder: Path) -> dict[str, str]:
        """Returns the SHA-256 that a card states for each file, whether or not the files exist.

        Raises:
            BundleError: the card is missing or damaged.
        """
        return dict(_read_card(folder).get("files", {}))

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        *,
        tensors: Mapping[str, NDArray[Any]] | None,
        graph: bytes,
        architecture: str,
        labels: tuple[str, ...],
        preprocessing: Preprocessing,
        dimension: int,
        recipe: Mapping[str, Any],
        split: Mapping[str, Any],
        figures: Mapping[str, Any],
        versions: Mapping[str, str],
        created_at: str,
        embedding: Embedding = Embedding(),
        detector: FaceDetector | None = None,
        reference: tuple[float, ...] | None = None,
        describe: Callable[["ModelBundle"], str] | None = None,
    ) -> "ModelBundle":
        """Writes a bundle into `folder`, which may exist, and returns it; the card last, and durably.

        `describe` returns the text of the model card; without it none is written. `detector` is the one that
        `preprocessing` states. `tensors` is None for an imported model, and only that has a `reference`.

        Raises:
            StorageError: the folder cannot be written.
        """
        from safetensors.numpy import save

        folder = Path(folder)
        contents = {_GRAPH: graph}
        if tensors is not None:
            weights = save({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()})
            contents = {_WEIGHTS: weights, **contents}
        if detector is not None:
            contents[_DETECTOR] = detector.graph
        bundle = cls(
            folder=folder,
            architecture=architecture,
            labels=labels,
            preprocessing=preprocessing,
            dimension=dimension,
            fingerprint=fingerprint_of(
                graph if tensors is None else tensors,
                architecture=architecture,
                preprocessing=preprocessing,
                embedding=embedding,
            ),
            recipe=recipe,
            split=split,
            figures=figures,
            versions=versions,
            created_at=created_at,
            files={name: hashlib.sha256(content).hexdigest() for name, content in contents.items()},
            embedding=embedding,
            reference=reference,
        )
        try:
            make_output_folder(folder)
            # An older card would state the hashes of files that are about to change.
            (folder / CARD).unlink(missing_ok=True)
            for name in FILE_NAMES - contents.keys():
                (folder / name).unlink(missing_ok=True)
            for name, content in contents.items():
                write_durably(folder / name, content)
            if describe is not None:
                write_durably(bundle.description_path, describe(bundle).encode("utf-8", "backslashreplace"))
            write_durably(folder / CARD, bundle.card().encode())
        except OSError as error:
            raise StorageError(f"The model cannot be written to {folder}: {why(error)}.") from error
        return bundle

    def file_names(self) -> tuple[str, ...]:
        """Returns the names of the files that a copy needs, the card last."""
        described = (_DESCRIPTION,) if self.description_path.is_file() else ()
        return (*self.files, *described, CARD)

    def card(self) -> str:
        """Returns the text of bundle.json."""
        fields = dataclasses.asdict(self)
        del fields["folder"]
        fields["preprocessing"] = self.preprocessing.stated()
        version = 2
        if self.embedding == Embedding():
            del fields["embedding"]
            version = 1
        if "colour" in fields["preprocessing"]:
            version = 3
        if "faces" in fields["preprocessing"]:
            version = 4
        if self.reference is None:
            del fields["reference"]
        else:
            fields["reference"] = _encoded(self.reference)
        if self.imported:
            version = 5
        return json.dumps({"format": version, **fields}, ensure_ascii=False, indent=1) + "\n"

    def card_sha256(self) -> str:
        """Returns the SHA-256, in hex, of bundle.json on disk; of empty bytes where it is missing."""
        path = self.folder / CARD
        return hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()

    def relabelled(self, changes: Mapping[int, "Relabel"]) -> "ModelBundle":
        """Returns the same model with changed labels, by output number; the fingerprint is unchanged."""
        labels = list(self.labels)
        split = dict(self.split)
        # All changes at once: two identities may have exchanged their names.
        folders: dict[str, str | None] = {}
        for number, change in changes.items():
            name = FORGOTTEN if change.label is None else change.label
            folder = f"{name}/" if change.keep_photos and change.label is not None else None
            if change.photos is None:
                folders[f"{labels[number]}/"] = folder
            else:
                split |= _with_photos_moved(split, f"{labels[number]}/", folder, change.photos)
            labels[number] = name
        for part, photos in split.items():
            if folders and isinstance(photos, list):
                split[part] = _with_folders_renamed(photos, folders)
        return dataclasses.replace(self, labels=tuple(labels), split=split)

    def photos_in_split(self, label: str) -> tuple[tuple[str, str], ...]:
        """Returns (part of the split, path below the folder) of each photo in the folder of a label."""
        return tuple(
            (part, composed[len(label) + 1 :])
            for part, photos in self.split.items()
            if isinstance(photos, list)
            for composed in map(_composed, photos)
            if composed.startswith(f"{label}/")
        )

    def rewrite_card(self) -> None:
        """Rewrites bundle.json, durably.

        Raises:
            StorageError: the file system refused.
        """
        try:
            write_durably(self.folder / CARD, self.card().encode(), inherit=True)
        except OSError as error:
            raise StorageError(f"{self.folder / CARD} cannot be written: {why(error)}.") from error

    def save(self, folder: str | os.PathLike[str], *, inherit: bool = False) -> "ModelBundle":
        """Copies the bundle atomically, after checking its files, and returns the copy.

        Args:
            folder: the folder of the copy; it must not exist.
            inherit: the copy gets the permissions of its parent folder. Otherwise only its owner may read it.

        Raises:
            BundleError: a file does not match the card.
            StorageError: the copy cannot be written, or `folder` exists.
        """
        target = Path(folder)
        if os.path.lexists(target):
            raise StorageError(f"{target} exists already; choose another folder for the copy.")
        self.verify()
        try:
            with whole_folder(target, like=target.parent if inherit else None) as copy:
                for name in self.file_names():
                    copy_durably(self.folder / name, copy / name, inherit=True)
        except OSError as error:
            raise StorageError(f"The model cannot be copied to {target}: {why(error)}.") from error
        return dataclasses.replace(self, folder=target)

    def load_graph(self, use: Callable[[str | bytes], _T]) -> _T:
        """Returns the graph loaded by `use`, after a check of its SHA-256 and its operators.

        The result of the check is cached by the identity of the file (`retrieval.system.proof_cache`).

        Args:
            use: loads bytes, or a file by a name in UTF-8 (see `files.path_in_utf8`).

        Raises:
            BundleError: the file does not match the card, cannot be read, or holds what
                `onnx_graph.check_graph` refuses.
            StorageError: the disk refused.
        """
        checked: proof_cache.Fact = ("graph", _GRAPH_RULES_VERSION)
        if not self.imported:
            return self._load(_GRAPH, use, check=onnx_graph.check_graph, checked=checked)

        def check(graph: bytes) -> None:
            self._check_fingerprint(graph)
            onnx_graph.check_graph(graph)

        return self._load(_GRAPH, use, check=check, checked=(*checked, *self._fingerprint_fact()))

    def load_photo_reader(self) -> PhotoReader:
        """Returns what reads photos for this model, with its face detector where it states one.

        Raises:
            BundleError, StorageError: as `load_graph`, for the detector's file.
        """
        if self.preprocessing.faces is None:
            return PhotoReader(self.preprocessing)

        def use(found: str | bytes) -> FaceDetector:
            graph = found if isinstance(found, bytes) else Path(found).read_bytes()
            try:
                return FaceDetector(graph, str(self.folder / _DETECTOR))
            except InputError as error:
                raise _mismatch(self.folder / _DETECTOR) from error

        checked = ("graph", _GRAPH_RULES_VERSION)
        detector = self._load(_DETECTOR, use, check=onnx_graph.check_graph, checked=checked)
        return PhotoReader(self.preprocessing, detector)

    def load_weights(self, use: Callable[[str | bytes], _T]) -> _T:
        """Returns the weights loaded by `use`, after a check of their SHA-256 and fingerprint.

        The result of the check is cached by the identity of the file (`retrieval.system.proof_cache`).

        Args:
            use: loads bytes, or a file by a name in UTF-8 (see `files.path_in_utf8`).

        Raises:
            BundleError: the file does not match the card, cannot be read, or has another fingerprint.
            StorageError: the disk refused.
        """
        self.require_trained("loaded as weights")
        return self._load(_WEIGHTS, use, check=self._check_fingerprint, checked=self._fingerprint_fact())

    def require_trained(self, used: str) -> None:
        """Refuses an imported model where one is needed that faceprint trained.

        Args:
            used: what the model is used for, as words that follow "cannot be".

        Raises:
            InputError: the model was imported.
        """
        if self.imported:
            raise InputError(
                f"The model {self.folder} was imported and cannot be {used}; name a model of "
                "`faceprint train`."
            )

    def _fingerprint_fact(self) -> proof_cache.Fact:
        contract = json.dumps(_contract(self.architecture, self.preprocessing, self.embedding))
        return ("fingerprint", self.fingerprint, contract)

    def _load(
        self,
        name: str,
        use: Callable[[str | bytes], _T],
        *,
        check: Callable[[bytes], None],
        checked: proof_cache.Fact,
    ) -> _T:
        path = self.folder / name

        def load(found: Path | bytes) -> _T:
            if isinstance(found, bytes):
                return use(found)
            with path_in_utf8(found) as named:
                return use(named)

        try:
            return proof_cache.load(
                path, self.files[name], check=check, checked=checked, use=load, most=MAX_FILE_BYTES
            )
        except proof_cache.NotTheFile as error:
            raise _mismatch(path) from error
        except onnx_graph.RefusedGraph as error:
            raise BundleError(
                f"{path} is not run: {error}; export the model again with faceprint."
            ) from error
        except OSError as error:
            raise _read_error(path, error) from error

    def _check_fingerprint(self, data: bytes) -> None:
        """Compares the card's fingerprint with that of the weights or, of an imported model, the graph."""
        from safetensors.numpy import load

        try:
            content = data if self.imported else load(data)
        except Exception as error:
            # safetensors raises its own exceptions, and numpy others for types that it lacks.
            raise BundleError(f"{self.weights_path} holds no tensors; copy the model whole again.") from error
        actual = fingerprint_of(
            content,
            architecture=self.architecture,
            preprocessing=self.preprocessing,
            embedding=self.embedding,
        )
        if actual != self.fingerprint:
            what = "graph has" if self.imported else "weights have"
            raise BundleError(f"{self.folder / CARD} states another fingerprint than its {what}.")

    def verify(self) -> None:
        """Reads all files and compares them with the card.

        Raises:
            BundleError: a file does not match its SHA-256, or the weights do not have the stated fingerprint.
            StorageError: the machine cannot read a file.
        """
        for name, expected in self.files.items():
            try:
                with open_plain(self.folder / name) as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise _read_error(self.folder / name, error) from error
            if found != expected:
                raise _mismatch(self.folder / name)
        self._check_fingerprint((self.graph_path if self.imported else self.weights_path).read_bytes())


_PLAIN_FIELDS: Final = tuple(
    field.name
    for field in dataclasses.fields(ModelBundle)
    if field.name not in ("folder", "labels", "preprocessing", "embedding", "reference")
)


def fingerprint_of(
    content: Mapping[str, NDArray[Any]] | bytes,
    *,
    architecture: str,
    preprocessing: Preprocessing,
    embedding: Embedding = Embedding(),
) -> str:
    """Returns the SHA-256, in hex, over all that decides an embedding.

    These are the architecture, the preprocessing, the embedding options, and the content: tensors by name, or
    the bytes of an imported model's graph.
    """
    digest = hashlib.sha256()
    contract = _contract(architecture, preprocessing, embedding)
    digest.update(json.dumps(contract, sort_keys=True).encode())
    if isinstance(content, bytes):
        digest.update(b"\ngraph\n" + content)
        return digest.hexdigest()
    for name in sorted(content):
        tensor = np.asarray(content[name], order="C")
        digest.update(f"\n{name} {tensor.dtype.str} {tensor.shape}\n".encode())
        digest.update(tensor.data)
    return digest.hexdigest()


def _contract(architecture: str, preprocessing: Preprocessing, embedding: Embedding) -> dict[str, Any]:
    """Returns all that decides an embedding besides the weights."""
    contract: dict[str, Any] = {"architecture": architecture, "preprocessing": preprocessing.stated()}
    # The paper's embedding is omitted: fingerprints of older galleries do not contain it.
    if embedding != Embedding():
        contract["embedding"] = dataclasses.asdict(embedding)
    return contract


def _encoded(embedding: Sequence[float]) -> str:
    """Returns an embedding as text for a card: float32, little-endian, in base64."""
    return base64.b64encode(np.array(embedding, "<f4").tobytes()).decode()


def _decoded(text: str) -> tuple[float, ...]:
    """Returns the result of `_encoded` as numbers.

    Raises:
        ValueError: the text is something else.
    """
    try:
        return tuple(np.frombuffer(base64.b64decode(text, validate=True), "<f4").tolist())
    except binascii.Error as error:
        raise ValueError(str(error)) from error


def _read_error(path: Path, error: OSError) -> BundleError | StorageError:
    if not is_about_path(error):
        return StorageError(f"{path} cannot be read: {why(error)}.")
    return BundleError(f"{path} cannot be read ({why(error)}); copy the model whole again.")


def _mismatch(path: Path) -> BundleError:
    return BundleError(f"{path} is not the file that {CARD} names; copy the model whole again.")


def _composed(photo: Any) -> str:
    """Returns a photo of a split with accents composed; empty where it is not text."""
    return unicodedata.normalize("NFC", photo) if isinstance(photo, str) else ""


def _with_photos_moved(
    split: Mapping[str, Any], folder: str, target: str | None, photos: Iterable[tuple[str, str]]
) -> dict[str, list[Any]]:
    """Returns the parts of a split from which photos of a folder were moved to another, or removed (None).

    Each given photo stands for one entry: two identities may have photos of the same name.
    """
    wanted: dict[str, Counter[str]] = {}
    for part, name in photos:
        wanted.setdefault(part, Counter())[name] += 1
    return {
        part: _with_entries_moved(split[part], folder, target, names)
        for part, names in wanted.items()
        if isinstance(split.get(part), list)
    }


def _with_entries_moved(
    entries: Sequence[Any], folder: str, target: str | None, wanted: Counter[str]
) -> list[Any]:
    """Returns the photos of a part, of which the last `wanted` ones of a folder were moved or removed."""
    kept: list[Any] = []
    for entry in reversed(entries):
        composed = _composed(entry)
        name = composed[len(folder) :] if composed.startswith(folder) else ""
        if not wanted[name]:
            kept.append(entry)
            continue
        wanted[name] -= 1
        if target is not None:
            kept.append(target + name)
    return kept[::-1]


def _with_folders_renamed(photos: Sequence[Any], folders: Mapping[str, str | None]) -> list[Any]:
    """Returns photo paths with some folders renamed, or removed (None); entries that are not text stay."""
    found: list[Any] = []
    for photo in photos:
        composed = _composed(photo)
        name = composed.partition("/")[0] + "/"
        if name not in folders or "/" not in composed:
            found.append(photo)
        elif (target := folders[name]) is not None:
            found.append(target + composed[len(name) :])
    return found


class _Training(TypedDict, total=False):
    """The types of the recipe fields that are read back; other fields are only displayed."""

    seed: int
    weights: str | None
    weights_layout: str | None
    started_fresh: list[str]
    derived_from: str | None


class _Split(TypedDict, total=False):
    data: str | None
    validation_fraction: float | None
    min_images: int | None
    train: list[str]
    validation: list[str]


class _Figures(TypedDict, total=False):
    device: str | None
    left_out: int | None
    validation_images: int | None
    validation_accuracy: float | None
    closest_image_agreement: float | None


class _Pixels(TypedDict):
    size: int
    crop: float
    colour: NotRequired[str]
    faces: NotRequired["_Faces"]


class _Activations(TypedDict, total=False):
    length: str
    layers: list[str]
    pooling: str
    dimensions: int | None
    whiten: bool


class _Faces(TypedDict):
    detector: str
    score: float
    template: str
    margin: float
    version: int


# File names are not Python identifiers.
_Files = TypedDict(
    "_Files",
    {"model.safetensors": NotRequired[str], "model.onnx": str, "face_detector.onnx": NotRequired[str]},
)


class _Card(TypedDict):
    """The types of bundle.json."""

    format: int
    architecture: str
    labels: list[str]
    preprocessing: _Pixels
    dimension: int
    fingerprint: str
    recipe: _Training
    split: _Split
    figures: _Figures
    versions: dict[str, str]
    created_at: str
    files: _Files
    embedding: NotRequired[_Activations]
    reference: NotRequired[str]


class _Format(TypedDict):
    format: int


def _read_card(folder: Path) -> dict[str, Any]:
    path = folder / CARD
    if not folder.is_dir():
        raise BundleError(f"There is no model folder {folder}; make one with `faceprint train`.")
    if (other := other_than_file(path)) is not None:
        raise BundleError(f"{path} is {other}, not a file; copy the model whole again.")
    if not path.is_file():
        raise BundleError(f"{folder} is not a model: it has no {CARD}; make one with `faceprint train`.")
    advice = "copy the model whole again"
    # The values as `json` reads them: the card is written back when an identity is renamed or erased.
    card: dict[str, Any] = read_tree(path, _Format, error=BundleError, advice=advice)
    if card["format"] > FORMAT:
        raise BundleError(
            f"The model {folder} has format {card['format']} and this version of faceprint reads up to "
            f"{FORMAT}; upgrade faceprint."
        )
    check_tree(card, _Card, name=path, error=BundleError, advice=advice)
    if (problem := _value_problem(card)) is not None:
        raise BundleError(f"{path} is damaged ({problem}); {advice}.")
    return card


def _value_problem(card: Mapping[str, Any]) -> str | None:
    """Returns the problem of a value that has the right type; None without one."""
    pixels, dimension = card["preprocessing"], card["dimension"]
    if not 1 <= pixels["size"] <= MAX_SIZE:
        return f"the field preprocessing.size: {pixels['size']} is not between 1 and {MAX_SIZE:,}"
    if not 0 < pixels["crop"] <= 1:
        return f"the field preprocessing.crop: {pixels['crop']} is not above 0 and at most 1"
    if not 1 <= dimension <= MAX_DIMENSION:
        return f"the field dimension: {dimension} is not between 1 and {MAX_DIMENSION:,}"
    sums = {"fingerprint": card["fingerprint"], **{f"files.{n}": s for n, s in card["files"].items()}}
    for name, text in sums.items():
        if not _SHA256.fullmatch(text):
            return f"the field {name}: it is not a SHA-256 in hex"
    faces = pixels.get("faces")
    imported = card["architecture"] == IMPORTED
    expected = {_GRAPH} | ({_DETECTOR} if faces is not None else set()) | (set() if imported else {_WEIGHTS})
    if card["files"].keys() != expected:
        return f"the field files: it does not name {', '.join(sorted(expected))} and no other file"
    if faces is not None and card["files"][_DETECTOR] != faces["detector"]:
        return "the field preprocessing.faces.detector: it is not the detector's SHA-256"
    return _imported_problem(card) if imported else None


def _imported_problem(card: Mapping[str, Any]) -> str | None:
    """Returns the problem of a value in the card of an imported model; None without one."""
    if card["labels"]:
        return "the field labels: an imported model has none"
    try:
        reference = _decoded(card.get("reference", ""))
    except ValueError:
        reference = ()
    if len(reference) != card["dimension"] or not np.isfinite(reference).all():
        return "the field reference: it is not the embedding of a picture"
    return None
