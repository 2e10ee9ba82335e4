"""The manifest of an export: its origin, the SHA-256 of each file, and a checksum of its own content.

OUT/
  faces-00000.parquet   ids, identities, SHA-256s, times, paths, metadata and vectors, in segment order
  manifest.json         gallery, model, columns and files; written last
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from retrieval.errors import InputError
from retrieval.images.preprocessing import Preprocessing
from retrieval.rates import Upcoming
from retrieval.system.manifests import read_manifest
from retrieval.system.parquet import pyarrow
from retrieval.transfer.parquet_blocks import FINGERPRINT, vector_field

FORMAT: Final = "faceprint-export"
# The versions of the format. An export has the lowest version that can express it, so that older versions of
# faceprint can read it. They do not apply colour profiles, so they must refuse a model that does.
VERSION_WITH_METADATA: Final = 2
VERSION_WITH_COLOUR_PROFILES: Final = 3
# Versions before this one take a photo for a face.
VERSION_WITH_REGIONS: Final = 4
NEWEST_VERSION: Final = VERSION_WITH_REGIONS

MANIFEST: Final = "manifest.json"
GALLERY: Final = b"faceprint.gallery"
_FILE_NAME: Final = re.compile(r"faces-\d{5,}\.parquet")
SHA256: Final = re.compile("[0-9a-f]{64}")
_UUID: Final = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# The largest integer of SQLite and Parquet, and an upper bound on a model's dimension and input size.
_MAX_INTEGER: Final = 2**63 - 1
_MAX_SIZE: Final = 2**20
_COLUMNS: Final = {
    "id": "int64: the face's number in the gallery, never used again there",
    "identity": "string or null: the person on the photo; null if unknown",
    "sha256": "string: SHA-256 of the photo's bytes, 64 hexadecimal digits",
    "enrolled_at": "string: when the photo was enrolled, ISO 8601 in UTC",
    "paths": "list of strings, may be empty: absolute paths of the files that have these bytes, oldest first",
    "metadata": "string or null: a JSON object, the metadata of the face; null without any",
    "identity_metadata": "string or null: a JSON object, the metadata of the identity, in each of its rows",
    "region": "string or null: a JSON object, the place of the face: box, landmarks, score, sharpness",
    "vector": "list of float32 of the model's dimension: the embedding, exactly as the model computed it",
}
METADATA_COLUMNS: Final = ("metadata", "identity_metadata")
_CHECKSUM_DESCRIPTION: Final = (
    "SHA-256 of this object without `checksum`, as UTF-8 JSON with sorted keys, no white space between the "
    "tokens, and no escapes but those that JSON requires"
)


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """A Parquet file of an export: its name, rows, size in bytes and SHA-256 in hex."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Export:
    """An export on disk, as its manifest describes it.

    Attributes:
        folder: the folder of the export.
        created_at: ISO 8601, UTC.
        gallery: the UUID of the exported gallery.
        revision: the revision of the exported snapshot.
        faces, identities: the number of each.
        fingerprint, architecture, dimension, preprocessing: of the model, as in `ModelBundle`.
        files: the Parquet files, in row order.
        version: of the format, at most `NEWEST_VERSION`.
        calibration: of the gallery, as from `Calibration.fields`; None if it was not calibrated.
    """

    folder: Path
    created_at: str
    gallery: str
    revision: int
    faces: int
    identities: int
    fingerprint: str
    architecture: str
    dimension: int
    preprocessing: Preprocessing
    files: tuple[ExportedFile, ...]
    version: int = VERSION_WITH_METADATA
    calibration: dict[str, Any] | None = None

    @property
    def columns(self) -> dict[str, str]:
        """Returns the description of each column of the files, in order."""
        return {
            name: description
            for name, description in _COLUMNS.items()
            if (self.version >= VERSION_WITH_METADATA or name not in METADATA_COLUMNS)
            and (self.version >= VERSION_WITH_REGIONS or name != "region")
        }

    @property
    def bytes(self) -> int:
        """Returns the total size of the Parquet files in bytes."""
        return sum(file.bytes for file in self.files)

    def manifest(self) -> str:
        """Returns the text of manifest.json."""
        fields: dict[str, Any] = {
            "format": FORMAT,
            "version": self.version,
            "created_at": self.created_at,
            "gallery": self.gallery,
            "revision": self.revision,
            "faces": self.faces,
            "identities": self.identities,
            "model": {
                "fingerprint": self.fingerprint,
                "architecture": self.architecture,
                "dimension": self.dimension,
                "preprocessing": self.preprocessing.stated(),
                "distance": "euclidean",
                "dtype": "float32",
            },
            "columns": self.columns,
            "files": [dataclasses.asdict(file) for file in self.files],
            "checksum_is": _CHECKSUM_DESCRIPTION,
        }
        if self.calibration is not None:
            fields["calibration"] = self.calibration
        return json.dumps({**fields, "checksum": _checksum(fields)}, ensure_ascii=False, indent=1) + "\n"


@dataclass(frozen=True)
class _Header:
    format: str
    version: int


@dataclass(frozen=True)
class _Model:
    fingerprint: str
    architecture: str
    dimension: int
    preprocessing: Preprocessing


@dataclass(frozen=True)
class _Rate:
    value: float | None
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class _Point:
    fpir: float
    threshold: float
    seen: _Rate
    missed: _Rate
    upcoming: Upcoming | None = None


@dataclass(frozen=True)
class _Calibration:
    generation: int
    fingerprint: str
    found_at: str
    strangers: str
    faces: int
    identities: int
    searches: int
    people: int
    trained: int
    fpir: float
    points: list[_Point]


@dataclass(frozen=True)
class _Manifest:
    format: str
    version: int
    created_at: str
    gallery: str
    revision: int
    faces: int
    identities: int
    model: _Model
    files: list[ExportedFile]
    checksum: str
    calibration: _Calibration | None = None


def read_export_manifest(folder: Path) -> Export:
    """Returns the export in a folder, as its manifest describes it; the Parquet files are not read.

    Raises:
        InputError: there is no manifest, or it is damaged, inconsistent or of a newer version.
    """
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise InputError(
            f"{folder} is not an export: it has no {MANIFEST}; make one with `faceprint export`."
        )
    options: dict[str, Any] = {"error": InputError, "advice": "copy the export whole again"}
    header = read_manifest(path, _Header, **options)
    if header.format == FORMAT and header.version > NEWEST_VERSION:
        raise InputError(
            f"The export {folder} has version {header.version} and this version of faceprint reads up "
            f"to {NEWEST_VERSION}; upgrade faceprint."
        )
    card: dict[str, Any] = read_manifest(path, dict[str, Any], **options)
    if header.format != FORMAT or card.pop("checksum", None) != _checksum(card):
        raise InputError(f"{path} is damaged; copy the export whole again.")
    manifest = read_manifest(path, _Manifest, **options)
    for field, valid in _validity(manifest):
        if not valid:
            raise InputError(f"{path} is no manifest of an export: its field {field} cannot be.")
    if not all(_FILE_NAME.fullmatch(file.name) for file in manifest.files):
        raise InputError(f"{path} names files that no export has.")
    model = manifest.model
    return Export(
        folder=folder,
        created_at=manifest.created_at,
        gallery=manifest.gallery,
        revision=manifest.revision,
        faces=manifest.faces,
        identities=manifest.identities,
        fingerprint=model.fingerprint,
        architecture=model.architecture,
        dimension=model.dimension,
        preprocessing=model.preprocessing,
        files=tuple(manifest.files),
        version=manifest.version,
        calibration=None if manifest.calibration is None else dataclasses.asdict(manifest.calibration),
    )


def _validity(manifest: _Manifest) -> Iterator[tuple[str, bool]]:
    """Yields each field that must be checked beyond its type, and whether its value is valid."""
    model, names = manifest.model, [file.name for file in manifest.files]
    yield "version", manifest.version >= 1
    yield "gallery", _UUID.fullmatch(manifest.gallery) is not None
    yield "revision", 0 <= manifest.revision <= _MAX_INTEGER
    yield "faces", 0 <= manifest.faces <= _MAX_INTEGER
    yield "identities", 0 <= manifest.identities <= manifest.faces
    yield "model.fingerprint", SHA256.fullmatch(model.fingerprint) is not None
    yield "model.dimension", 1 <= model.dimension <= _MAX_SIZE
    yield "model.preprocessing.size", 1 <= model.preprocessing.size <= _MAX_SIZE
    yield "model.preprocessing.crop", 0 < model.preprocessing.crop <= 1
    yield "files", bool(names) and len(set(names)) == len(names)
    for index, file in enumerate(manifest.files):
        yield f"files[{index}].rows", 0 <= file.rows <= manifest.faces
        yield f"files[{index}].bytes", file.bytes > 0
        yield f"files[{index}].sha256", SHA256.fullmatch(file.sha256) is not None
    calibration = manifest.calibration
    if calibration is not None:
        yield "calibration.fingerprint", calibration.fingerprint == model.fingerprint
        yield "calibration.strangers", calibration.strangers in ("photos", "gallery")
        for name in ("generation", "faces", "identities", "searches", "people", "trained"):
            yield f"calibration.{name}", 0 <= getattr(calibration, name) <= _MAX_INTEGER
        yield "calibration.fpir", any(point.fpir == calibration.fpir for point in calibration.points)
        for index, point in enumerate(calibration.points):
            yield f"calibration.points[{index}]", _is_valid_point(point)


def _is_valid_point(point: _Point) -> bool:
    """Returns whether the rates of an operating point are consistent and its FPIR is in (0, 0.5]."""
    rates = all(
        rate.n >= 0
        and 0 <= rate.low <= rate.high <= 1
        and ((rate.value is None) if rate.n == 0 else (rate.value is not None and 0 <= rate.value <= 1))
        for rate in (point.seen, point.missed)
    )
    upcoming = point.upcoming
    predicted = upcoming is None or 0 <= upcoming.low <= upcoming.high <= upcoming.n
    return rates and predicted and 0 < point.fpir <= 0.5


def _checksum(fields: dict[str, Any]) -> str:
    """Returns the checksum that `_CHECKSUM_DESCRIPTION` describes."""
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def export_schema(
    fingerprint: str, dimension: int, *, gallery: str, version: int = VERSION_WITH_METADATA
) -> Any:
    """Returns the pyarrow schema of the files of an export."""
    pa, _ = pyarrow()
    has_metadata = version >= VERSION_WITH_METADATA
    return pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("identity", pa.string()),
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("enrolled_at", pa.string(), nullable=False),
            pa.field("paths", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
            *(pa.field(name, pa.string()) for name in METADATA_COLUMNS if has_metadata),
            *([pa.field("region", pa.string())] if version >= VERSION_WITH_REGIONS else []),
            vector_field(dimension),
        ],
        metadata={FINGERPRINT: fingerprint.encode(), GALLERY: gallery.encode()},
    )
