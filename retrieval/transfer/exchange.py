"""Exports and imports of galleries as Parquet, and files of vectors made elsewhere.

    OUT/
      faces-00000.parquet   ids, identities, SHA-256s, times, paths, metadata, vectors; as the segments lie
      manifest.json         what they are of; the SHA-256 of each of them, and of itself; written last

Parquet is read and written by pyarrow, which is optional. The vectors lie in the files as they are: float32
in the plainest encoding, not compressed, which every reader knows. (Measured on 16,384 random vectors of
2048 numbers: lz4 saves nothing; zstd on split bytes saves 15% and takes half as long again to write.)
"""

import dataclasses
import hashlib
import json
import os
import re
import stat
import unicodedata
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from retrieval.database.metadata import Metadata, decoded, encoded, filled
from retrieval.database.store import Calibration, Face, NewFace, Reader, Segment, utc_now
from retrieval.database.tables import identity_table
from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import GalleryDamaged, InputError, ModelMismatch, StorageError
from retrieval.index.segments import Ids, SegmentMissing, Vectors
from retrieval.models.bundle import ModelBundle, Preprocessing
from retrieval.rates import Upcoming
from retrieval.storage.vault import Vault
from retrieval.system.files import create, is_no_file, open_plain, replacing, whole_folder, why, write_durably
from retrieval.system.manifests import read_manifest
from retrieval.system.parquet import opened, pyarrow
from retrieval.system.paths import absolute, is_absolute

FORMAT: Final = "faceprint-export"
# The newest version that is read. 2 has metadata; 3 has a model that heeds colour profiles, of which older
# versions of faceprint know nothing: they refuse it. An export of any other model has 2.
VERSION: Final = 3
MANIFEST: Final = "manifest.json"

# Rows of a block that is read: as many as the vectors of 2048 numbers that one segment holds.
BLOCK: Final = 8192

# Rows of a row group that is written: 32 MiB of vectors of 2048 numbers.
_GROUP: Final = 4096

# Rows that pyarrow decodes at a time. It needs some times their size for that; in the cache it is fastest.
_PIECE: Final = 1024

_FINGERPRINT: Final = b"faceprint.fingerprint"
_GALLERY: Final = b"faceprint.gallery"

_FILE_NAME: Final = re.compile(r"faces-\d{5,}\.parquet")
_SHA256: Final = re.compile("[0-9a-f]{64}")
_UUID: Final = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# The greatest number that SQLite and Parquet keep, and more than any model's dimension or input size.
_MOST: Final = 2**63 - 1
_MOST_NUMBERS: Final = 2**20

_COLUMNS: Final = {
    "id": "int64: the face's number in the gallery, never used again there",
    "identity": "string or null: who is on the photo, null where nobody said",
    "sha256": "string: SHA-256 of the photo's bytes, 64 hexadecimal digits",
    "enrolled_at": "string: when the gallery got it, ISO 8601 in UTC",
    "paths": "list of strings, may be empty: absolute paths of the files that have these bytes, oldest first",
    "metadata": "string or null: a JSON object, what was said about the face; null where nothing was",
    "identity_metadata": "string or null: a JSON object, what was said of the identity, in all its rows",
    "vector": "list of float32, as many as the model's dimension: the embedding, as the model gave it",
}

_SINCE_2: Final = ("metadata", "identity_metadata")

_CHECKSUM_IN_WORDS: Final = (
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
        folder: where it lies.
        created_at: ISO 8601, UTC.
        gallery: the UUID of the gallery that it shows.
        revision: the gallery's, which tells its states apart.
        faces, identities: how many.
        fingerprint, architecture, dimension, preprocessing: the model's, as in `ModelBundle`.
        files: in the order of the rows.
        version: of the format, see `VERSION`.
        calibration: of the gallery, as `store.Calibration.fields` says it; None where it had none.
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
    version: int = 2
    calibration: dict[str, Any] | None = None

    @property
    def columns(self) -> dict[str, str]:
        """What the columns of its files are, in their order."""
        return {name: words for name, words in _COLUMNS.items() if self.version > 1 or name not in _SINCE_2}

    @property
    def bytes(self) -> int:
        """Size of the Parquet files."""
        return sum(file.bytes for file in self.files)

    def manifest(self) -> str:
        """The text of manifest.json."""
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
            "checksum_is": _CHECKSUM_IN_WORDS,
        }
        if self.calibration is not None:
            fields["calibration"] = self.calibration
        return json.dumps({**fields, "checksum": _checksum(fields)}, ensure_ascii=False, indent=1) + "\n"


# What manifest.json must hold, type by type.


@dataclass(frozen=True)
class _Head:
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


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows of an export: faces as they were in the gallery, and their vectors (n, d), C order.

    Attributes:
        faces: with their metadata.
        vectors: in the same order.
        people: what was said about their identities, by name; who is not in it had no metadata.
    """

    faces: list[Face]
    vectors: Vectors
    people: dict[str, Metadata]


@dataclass(slots=True)
class Imported:
    """What an import did. `found` is always `enrolled + known + duplicate + rejected`: each row once.

    Attributes:
        enrolled: rows that became faces.
        known: rows of which the gallery knew everything.
        duplicate: rows whose bytes the gallery had, under other paths or none.
        rejected: rows whose bytes the gallery has as somebody else's.
        replaced: paths that led to other faces of the gallery until now.
        interrupted: whether it was stopped before the last row.
    """

    enrolled: int = 0
    known: int = 0
    duplicate: int = 0
    rejected: int = 0
    replaced: int = 0
    interrupted: bool = False

    @property
    def found(self) -> int:
        """Rows that were looked at."""
        return self.enrolled + self.known + self.duplicate + self.rejected


# Exporting


def export(vault: Vault, target: Path, *, rows_per_file: int = 100_000) -> Export:
    """Writes one snapshot of a gallery as an open folder, whole or not at all, and into the audit log.

    What is forgotten later stays in the export, names and paths too: it is a copy outside of the gallery.

    Args:
        vault: the gallery's; nothing is logged where it was opened for reading only.
        target: a folder that does not exist, or is empty.
        rows_per_file: at most.

    Raises:
        InputError: `target` exists and is not empty, or less than one row a file.
        StorageError, GalleryBusy: nothing was exported.
        GalleryDamaged: the vectors are not what was written, or not those of the rows.
        MissingDependency: pyarrow is not installed.
    """
    pyarrow()
    if rows_per_file < 1:
        raise InputError(f"A file must have at least one row, not {rows_per_file}.")
    try:
        with whole_folder(target) as made:
            checked: set[int] = set()
            written = vault.on_a_snapshot(lambda reader: _write(vault, reader, made, rows_per_file, checked))
            # Before the folder gets its name: what leaves the gallery is in its log.
            if not vault.read_only:
                with vault.writing() as writer:
                    vault.log(writer, "export", faces=written.faces)
    except FileExistsError as error:
        raise InputError(f"{target} exists already and is not empty; choose another folder.") from error
    except OSError as error:
        raise StorageError(f"The export {target} cannot be written: {why(error)}.") from error
    return dataclasses.replace(written, folder=target)


def _write(vault: Vault, reader: Reader, folder: Path, rows_per_file: int, checked: set[int]) -> Export:
    """Writes a snapshot's files; `checked` are segments whose files were read and found right before.

    Raises:
        SegmentMissing: a writer merged a segment away meanwhile; nothing was written.
    """
    state, row = vault.state(reader), reader.gallery()
    flat = vault.vectors(state.generation)
    # A mapped file can be read even when its name is gone.
    segments = [flat.rows(segment) for segment in state.segments]
    # The new checksums must not vouch for what was damaged before. Small segments go first, as in merges.
    for segment in sorted(reader.segments(state.generation.id), key=lambda segment: segment.rows):
        if segment.id not in checked:
            _check_segment(vault, flat.path(segment.id), segment)
            checked.add(segment.id)
    model = ModelBundle.load(vault.folder / state.generation.folder)
    faces = sum(len(ids) for ids, _ in segments)
    if faces != reader.count():
        raise _damaged(vault, f"has {faces:,} vectors and {reader.count():,} faces")
    group = min(_GROUP, rows_per_file)
    per_file = rows_per_file // group
    groups = _groups(segments, group)
    records = _records(vault, reader, groups)
    schema = _schema(model.fingerprint, model.dimension, gallery=row.uuid)
    exported = Export(
        folder=folder,
        created_at=utc_now(),
        gallery=row.uuid,
        revision=state.revision,
        faces=faces,
        identities=sum(name is not None for name, _ in reader.identities()),
        fingerprint=model.fingerprint,
        architecture=model.architecture,
        dimension=model.dimension,
        preprocessing=model.preprocessing,
        version=2 if model.preprocessing.colour == "ignore" else 3,
        calibration=None if state.calibration is None else state.calibration.fields(),
        files=tuple(
            _write_file(folder / f"faces-{number:05d}.parquet", schema, islice(records, per_file))
            # An empty gallery gives one file, so that its columns can be read.
            for number in range(max(1, -(-faces // (group * per_file))))
        ),
    )
    write_durably(folder / MANIFEST, exported.manifest().encode(), inherit=True)
    return exported


def _check_segment(vault: Vault, path: Path, segment: Segment) -> None:
    try:
        with open_plain(path) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise SegmentMissing(f"{path} is missing; see `faceprint verify {vault.folder}`.") from error
    except OSError as error:
        if not is_no_file(error):
            raise StorageError(f"{path} cannot be read: {why(error)}.") from error
        found = ""
    if found != segment.sha256:
        raise GalleryDamaged(f"{path} is not what was written; see `faceprint verify {vault.folder}`.")


def _groups(segments: Sequence[tuple[Ids, Vectors]], rows: int) -> Iterator[tuple[Ids, Vectors]]:
    """All rows, `rows` at a time; views of the segments where a group lies in one of them."""
    parts: list[tuple[Ids, Vectors]] = []
    missing = rows
    for ids, vectors in segments:
        start = 0
        while start < len(ids):
            end = min(start + missing, len(ids))
            parts.append((ids[start:end], vectors[start:end]))
            missing -= end - start
            start = end
            if not missing:
                yield _joined(parts)
                parts, missing = [], rows
    if parts:
        yield _joined(parts)


def _joined(parts: Sequence[tuple[Ids, Vectors]]) -> tuple[Ids, Vectors]:
    if len(parts) == 1:
        return parts[0]
    ids, vectors = zip(*parts, strict=True)
    return np.concatenate(ids), np.concatenate(vectors)


def _records(vault: Vault, reader: Reader, groups: Iterable[tuple[Ids, Vectors]]) -> Iterator[dict[str, Any]]:
    """The columns of each row group."""
    for ids, vectors in groups:
        found = reader.faces(ids.tolist())
        try:
            faces = [found[number] for number in ids.tolist()]
        except KeyError as error:
            raise _damaged(vault, f"has a vector {error} without a face") from error
        names = {face.identity for face in faces if face.identity is not None}
        people = {name: encoded(said, name) for name, said in reader.identity_metadata(names).items()}
        yield {
            "id": ids,
            "identity": [face.identity for face in faces],
            "sha256": [face.sha256 for face in faces],
            "enrolled_at": [face.enrolled_at for face in faces],
            "paths": [face.paths for face in faces],
            "metadata": [encoded(face.metadata, f"face {face.id}") for face in faces],
            "identity_metadata": [None if f.identity is None else people[f.identity] for f in faces],
            "vector": vectors,
        }


def _damaged(vault: Vault, what: str) -> GalleryDamaged:
    return GalleryDamaged(f"{vault.folder} {what}; see `faceprint verify {vault.folder}`.")


def _schema(fingerprint: str, dimension: int, *, gallery: str, version: int = 2) -> Any:
    """The columns of an export's files."""
    pa, _ = pyarrow()
    said = [pa.field(name, pa.string()) for name in _SINCE_2] if version > 1 else []
    return pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("identity", pa.string()),
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("enrolled_at", pa.string(), nullable=False),
            pa.field("paths", pa.list_(pa.field("element", pa.string(), nullable=False)), nullable=False),
            *said,
            _vector_field(dimension),
        ],
        metadata={_FINGERPRINT: fingerprint.encode(), _GALLERY: gallery.encode()},
    )


def _vector_field(dimension: int) -> Any:
    pa, _ = pyarrow()
    element = pa.field("element", pa.float32(), nullable=False)
    return pa.field("vector", pa.list_(element, dimension), nullable=False)


class _Hashed:
    """A file that knows the SHA-256 of what was written to it."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.tell = file.tell
        self.flush = file.flush

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self._file.write(data)


def _write_file(path: Path, schema: Any, groups: Iterable[dict[str, Any]]) -> ExportedFile:
    """Writes row groups to a Parquet file, durably.

    Raises:
        OSError: the disk refused.
    """
    with create(path, inherit=True) as file:
        rows, sha256 = _write_groups(file, schema, groups)
        file.flush()
        os.fsync(file.fileno())
        return ExportedFile(path.name, rows, file.tell(), sha256)


def _write_groups(file: BinaryIO, schema: Any, groups: Iterable[dict[str, Any]]) -> tuple[int, str]:
    """Writes row groups as Parquet; returns how many rows there are, and the SHA-256 of what was written."""
    pa, pq = pyarrow()
    texts = [name for name in schema.names if name not in ("id", "vector")]
    rows, hashed = 0, _Hashed(file)
    options = {
        "use_dictionary": ["identity", "identity_metadata"],
        "compression": {
            "id": "snappy",
            "vector.list.element": "none",
            **{"paths.list.element" if name == "paths" else name: "snappy" for name in texts},
        },
        "write_statistics": ["id", "identity"],
        "write_page_checksum": True,
    }
    with pq.ParquetWriter(hashed, schema, **options) as writer:
        for columns in groups:
            arrays = [_array(columns[field.name], field.type) for field in schema]
            writer.write_batch(pa.record_batch(arrays, schema=schema))
            rows += len(columns["vector"])
    return rows, hashed.digest.hexdigest()


def _array(column: Any, kind: Any) -> Any:
    """A column as pyarrow has it; the numbers of arrays are not copied."""
    pa, _ = pyarrow()
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(column.reshape(-1)), type=kind)
    return pa.array(column, kind)


# Reading an export


def read_export(folder: Path) -> Export:
    """Opens an export and reads every byte of it: whoever has its Export can trust its files.

    Raises:
        InputError: there is none, a newer version made it, or a file is not what its manifest says.
        MissingDependency: pyarrow is not installed.
    """
    exported = _read_manifest(folder)
    for file in exported.files:
        _verify(folder / file.name, file)
        with opened(folder / file.name) as parquet:
            _check_schema(folder / file.name, parquet, exported)
            rows = parquet.metadata.num_rows
        if rows != file.rows:
            raise InputError(f"{folder / file.name} has {rows:,} rows and should have {file.rows:,}.")
    if sum(file.rows for file in exported.files) != exported.faces:
        raise InputError(f"The files of {folder} do not have as many rows as {MANIFEST} says.")
    _check_rows(exported)
    return exported


def _read_manifest(folder: Path) -> Export:
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise InputError(f"{folder} is not an export: it has no {MANIFEST}.")
    options: dict[str, Any] = {"error": InputError, "advice": "copy the export whole again"}
    head = read_manifest(path, _Head, **options)
    if head.format == FORMAT and head.version > VERSION:
        raise InputError(
            f"The export {folder} has version {head.version} and this version of faceprint reads up "
            f"to {VERSION}; upgrade faceprint."
        )
    card: dict[str, Any] = read_manifest(path, dict[str, Any], **options)
    if head.format != FORMAT or card.pop("checksum", None) != _checksum(card):
        raise InputError(f"{path} is damaged; copy the export whole again.")
    manifest = read_manifest(path, _Manifest, **options)
    for field, holds in _holds(manifest):
        if not holds:
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


def _holds(manifest: _Manifest) -> Iterator[tuple[str, bool]]:
    """Each field of a manifest whose type is right, and whether its value can be."""
    model, names = manifest.model, [file.name for file in manifest.files]
    yield "version", manifest.version >= 1
    yield "gallery", _UUID.fullmatch(manifest.gallery) is not None
    yield "revision", 0 <= manifest.revision <= _MOST
    yield "faces", 0 <= manifest.faces <= _MOST
    yield "identities", 0 <= manifest.identities <= manifest.faces
    yield "model.fingerprint", _SHA256.fullmatch(model.fingerprint) is not None
    yield "model.dimension", 1 <= model.dimension <= _MOST_NUMBERS
    yield "model.preprocessing.size", 1 <= model.preprocessing.size <= _MOST_NUMBERS
    yield "model.preprocessing.crop", 0 < model.preprocessing.crop <= 1
    yield "files", bool(names) and len(set(names)) == len(names)
    for place, file in enumerate(manifest.files):
        yield f"files[{place}].rows", 0 <= file.rows <= manifest.faces
        yield f"files[{place}].bytes", file.bytes > 0
        yield f"files[{place}].sha256", _SHA256.fullmatch(file.sha256) is not None
    found = manifest.calibration
    if found is not None:
        yield "calibration.fingerprint", found.fingerprint == model.fingerprint
        yield "calibration.strangers", found.strangers in ("photos", "gallery")
        for name in ("generation", "faces", "identities", "searches", "people", "trained"):
            yield f"calibration.{name}", 0 <= getattr(found, name) <= _MOST
        yield "calibration.fpir", any(point.fpir == found.fpir for point in found.points)
        for place, point in enumerate(found.points):
            yield f"calibration.points[{place}]", _can_be(point)


def _can_be(point: _Point) -> bool:
    """Whether an operating point is one."""
    rates = all(
        rate.n >= 0
        and 0 <= rate.low <= rate.high <= 1
        and ((rate.value is None) if rate.n == 0 else (rate.value is not None and 0 <= rate.value <= 1))
        for rate in (point.seen, point.missed)
    )
    next_ones = point.upcoming
    foretold = next_ones is None or 0 <= next_ones.low <= next_ones.high <= next_ones.n
    return rates and foretold and 0 < point.fpir <= 0.5


def _checksum(fields: dict[str, Any]) -> str:
    """What `_CHECKSUM_IN_WORDS` says."""
    text = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _verify(path: Path, file: ExportedFile) -> None:
    try:
        # Neither a link nor a pipe: what was copied whole is a file of its own.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as opened:
            status = os.fstat(opened.fileno())
            is_whole = stat.S_ISREG(status.st_mode) and status.st_size == file.bytes
            found = hashlib.file_digest(opened, "sha256").hexdigest() if is_whole else ""
    except OSError as error:
        raise InputError(f"{path} cannot be read ({why(error)}); copy the export whole again.") from error
    if found != file.sha256:
        raise InputError(f"{path} is not the file that {MANIFEST} names; copy the export whole again.")


def _check_schema(path: Path, parquet: Any, exported: Export) -> None:
    schema = parquet.schema_arrow
    expected = _schema(
        exported.fingerprint, exported.dimension, gallery=exported.gallery, version=exported.version
    )
    for field in expected:
        if schema.names.count(field.name) != 1 or schema.field(field.name).type != field.type:
            raise InputError(f"{path} has no column {field.name} of type {field.type}, as every export has.")


def _check_rows(exported: Export) -> None:
    """Reads every row before one is enrolled: no face, no photo and no path may come twice.

    Raises:
        InputError: a row that no export has, or another number of rows or identities than the manifest says.
    """
    ids, digests, paths = [np.empty(0, np.int64)], [np.empty(0, "S64")], [np.empty(0, "S16")]
    names: set[str] = set()
    for batch in rows(exported):
        ids.append(np.array([face.id for face in batch.faces], np.int64))
        digests.append(np.array([face.sha256 for face in batch.faces], "S64"))
        # 16 bytes of each path, so that memory is that of numbers.
        known = [_short(path) for face in batch.faces for path in face.paths]
        paths.append(np.array(known, "V16").view("S16") if known else np.empty(0, "S16"))
        names |= {face.identity for face in batch.faces if face.identity is not None}
    for what, parts in (("face id", ids), ("SHA-256", digests), ("path", paths)):
        values = np.concatenate(parts)
        if len(np.unique(values)) != len(values):
            raise InputError(f"A {what} comes twice in the export {exported.folder}; export again.")
    if (len(np.concatenate(ids)), len(names)) != (exported.faces, exported.identities):
        raise InputError(
            f"The files of {exported.folder} do not have as many faces or identities as {MANIFEST} says."
        )


def _short(path: str) -> bytes:
    # No zero byte at the end, which numpy would not tell from a shorter text.
    return hashlib.blake2b(path.encode(), digest_size=15).digest() + b"."


def rows(exported: Export, *, size: int = BLOCK) -> Iterator[Batch]:
    """Every row of an export, at most `size` at a time and never from two files at once.

    Raises:
        InputError: a file cannot be read, a vector is not finite, or a row is one that no export has.
    """
    names = [name for name in exported.columns if name != "vector"]
    for file in exported.files:
        path, row = exported.folder / file.name, 0
        for columns, vectors in _blocks(path, names, exported.dimension, size):
            _check_columns_of(path, columns, row)
            said = _metadata(path, columns.pop("metadata", None), len(vectors), row)
            people = _metadata(path, columns.pop("identity_metadata", None), len(vectors), row)
            faces = [
                Face(number, identity, tuple(paths), sha256, enrolled_at, metadata)
                for number, identity, sha256, enrolled_at, paths, metadata in zip(
                    *columns.values(), said, strict=True
                )
            ]
            named = zip((face.identity for face in faces), people, strict=True)
            yield Batch(faces, vectors, {name: own for name, own in named if name is not None and own})
            row += len(vectors)


def _check_columns_of(path: Path, columns: dict[str, list[Any]], first: int) -> None:
    """Checks the values of some rows of an export, the first of which is row number `first` of its file.

    Raises:
        InputError: one cannot be stored; the sentence names the row and the column.
    """
    checks: dict[str, Callable[[Any], bool]] = {
        "id": lambda number: number is not None and number > 0,
        "identity": lambda name: name is None or "\0" not in name,
        "sha256": lambda digest: digest is not None and _SHA256.fullmatch(digest) is not None,
        "enrolled_at": lambda when: when is not None,
        "paths": lambda paths: paths is not None and all(map(_is_path, paths)),
    }
    for name, check in checks.items():
        for row, value in enumerate(columns[name], first):
            if not check(value):
                raise InputError(f"Row {row} of {path} has a value of {name} that no export has.")


def _is_path(path: str | None) -> bool:
    return path is not None and "\0" not in path and is_absolute(path)


def _metadata(path: Path, texts: Sequence[str | None] | None, rows: int, first: int) -> list[Metadata]:
    """A column of JSON; nothing in each row where there is no such column.

    Raises:
        InputError: a text is no JSON object that can be stored.
    """
    if texts is None:
        return [{} for _ in range(rows)]
    return [decoded(text, f"row {number} of {path}") for number, text in enumerate(texts, first)]


# Importing


def import_export(
    vault: Vault,
    exported: Export,
    enroll: Callable[[Sequence[NewFace], NDArray[Any]], list[Outcome]],
    *,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Imported:
    """Offers every face of an export to a gallery: its SHA-256, its identity, all of its paths, its vector.

    Duplicates, conflicts and older names are judged as always. Face ids are new, and so are the times of
    enrolling. What the gallery says about a face or a person stays; metadata of the export fill in what it
    has no key for. A path that leads to other bytes in the gallery leads to the exported face from then on.

    Args:
        vault: the gallery's.
        exported: what `read_export` gave.
        enroll: `Gallery.enroll_vectors`.
        on_outcome: called once for every row that was not enrolled, after its batch is durable.
        should_stop: asked between batches; True ends the import, with everything so far enrolled.

    Raises:
        ModelMismatch: the gallery's model is not the one that made the vectors.
        InputError: a file of the export cannot be read any more.
        StorageError, GalleryBusy: the rows in flight were not enrolled; those before them were.
    """
    report = Imported()
    _require(vault, exported)
    for batch in rows(exported):
        if should_stop():
            report.interrupted = True
            break
        _require(vault, exported)
        _import_batch(batch, enroll, report, on_outcome)
        _import_people(vault, batch)
    if not (report.interrupted or report.rejected):
        _import_calibration(vault, exported)
    return report


def _import_calibration(vault: Vault, exported: Export) -> None:
    """Takes over the thresholds of a gallery that this one has become: it has these faces and no other."""

    def wanted(reader: Reader) -> Calibration | None:
        serving = vault.serving(reader)
        if exported.calibration is None or reader.calibration(serving) is not None:
            return None
        same = serving.fingerprint == exported.fingerprint and reader.count() == exported.faces
        return Calibration.of({**exported.calibration, "generation": serving.id}) if same else None

    with vault.store.read() as reader:
        if wanted(reader) is None:
            return
    with vault.writing() as writer:
        found = wanted(writer)
        if found is not None:
            writer.set_calibration(found)
            vault.log(writer, "calibrate", faces=found.faces, fpir=found.fpir, searches=found.searches)


def _require(vault: Vault, exported: Export) -> None:
    with vault.store.read() as reader:
        fingerprint = vault.state(reader).generation.fingerprint
    if fingerprint != exported.fingerprint:
        raise ModelMismatch(
            f"The export {exported.folder} was made with another model (fingerprint "
            f"{exported.fingerprint[:12]}, not {fingerprint[:12]}); import it into a gallery of that model."
        )


def _import_batch(
    batch: Batch,
    enroll: Callable[[Sequence[NewFace], NDArray[Any]], list[Outcome]],
    report: Imported,
    on_outcome: Callable[[Outcome], None],
) -> None:
    """Offers a row once for each of its paths; the later ones are found to be duplicates of the first."""
    offers = [
        (row, NewFace(face.identity, path, face.sha256, face.metadata))
        for row, face in enumerate(batch.faces)
        for path in face.paths or (None,)
    ]
    outcomes: list[list[Outcome]] = [[] for _ in batch.faces]
    for start in range(0, len(offers), BLOCK):
        numbers, faces = zip(*offers[start : start + BLOCK], strict=True)
        once = len(offers) == len(batch.faces) <= BLOCK
        vectors = batch.vectors if once else batch.vectors[list(numbers)]
        for row, outcome in zip(numbers, enroll(faces, vectors), strict=True):
            outcomes[row].append(outcome)
    for found in outcomes:
        outcome = min(found, key=lambda one: _WEIGHTS.index(one.status))
        report.replaced += sum(one.replaced is not None for one in found)
        if outcome.status is Status.ENROLLED:
            report.enrolled += 1
            continue
        report.known += outcome.status is Status.KNOWN
        report.duplicate += outcome.status is Status.DUPLICATE
        report.rejected += outcome.status is Status.REJECTED
        on_outcome(outcome)


def _import_people(vault: Vault, batch: Batch) -> None:
    """Fills in what is said about the people of a batch. Who has no faces here is nobody here."""

    def missing(reader: Reader) -> dict[int, Metadata]:
        own: dict[int, Metadata] = {}
        said: dict[int, Metadata] = {}
        for name, (number, here) in reader.identities_named(batch.people).items():
            own[number] = here
            said[number] = filled(said.get(number, here), batch.people[name])
        return {number: one for number, one in said.items() if one.keys() != own[number].keys()}

    with vault.store.read() as reader:
        if not missing(reader):
            return
    with vault.writing() as writer:
        people = missing(writer)
        for metadata in people.values():
            encoded(metadata, "somebody together with those of the export")
        writer.set_metadata(identity_table, people)
        vault.log(writer, "annotate", identities=len(people))


# Of several verdicts on the paths of one face, the first of these is the face's.
_WEIGHTS: Final = (Status.ENROLLED, Status.REJECTED, Status.DUPLICATE, Status.KNOWN)


# Embeddings that were made elsewhere


def read_embeddings(
    path: Path, *, fingerprint: str, dimension: int, trusted: bool, size: int = BLOCK
) -> Iterator[tuple[list[NewFace], Vectors]]:
    """The rows of a Parquet file of embeddings, or of a file of an export, for `Gallery.enroll_vectors`.

    Columns: `vector`, lists of `dimension` floats (of 16, 32 or 64 bits); and, all optional, `sha256` of the
    photo's bytes in hex; `identity`; `path`, relative to the current directory, or `paths`, of which the
    first is taken; `metadata`, a JSON object as text. What is null or empty is not there. A row without a
    SHA-256 is known by that of its vector, as little-endian float32. Other columns are passed over.

    Args:
        path: of the file.
        fingerprint, dimension: of the gallery's model.
        trusted: whether somebody asserts that this model made the vectors of a file that does not say so.
        size: how many rows at a time, at most.

    Returns:
        Faces and their vectors (n, d), C order. The columns are checked before this returns.

    Raises:
        ModelMismatch: the file says that another model made it.
        InputError: it is not a Parquet file, does not say which model made it, or has columns that do not
            fit; while iterating, a vector of another length or not finite, a malformed SHA-256 or metadata.
        MissingDependency: pyarrow is not installed.
    """
    with opened(path) as parquet:
        _check_model(path, (parquet.metadata.metadata or {}).get(_FINGERPRINT), fingerprint, trusted=trusted)
        _check_columns(path, parquet.schema_arrow, dimension)
        texts = ("sha256", "identity", "path", "metadata")
        names = [name for name in texts if name in parquet.schema_arrow.names]
        if "path" not in names and "paths" in parquet.schema_arrow.names:
            names.append("paths")
    return _embeddings(path, names, dimension, size)


def count_embeddings(path: Path) -> int:
    """How many rows a Parquet file has.

    Raises:
        InputError: it is not a Parquet file.
        MissingDependency: pyarrow is not installed.
    """
    with opened(path) as parquet:
        return int(parquet.metadata.num_rows)


def _embeddings(
    path: Path, names: Sequence[str], dimension: int, size: int
) -> Iterator[tuple[list[NewFace], Vectors]]:
    row = 0
    for columns, vectors in _blocks(path, names, dimension, size):
        nothing = [None] * len(vectors)
        if "paths" in columns:
            columns["path"] = [paths[0] if paths else None for paths in columns["paths"]]
        digests = _digests(path, columns.get("sha256", nothing), vectors, row)
        identities = _composed(columns.get("identity", nothing))
        paths = [absolute(name) if name else None for name in columns.get("path", nothing)]
        said = _metadata(path, columns.get("metadata"), len(vectors), row)
        yield list(map(NewFace, identities, paths, digests, said)), vectors
        row += len(vectors)


def _digests(path: Path, given: Sequence[str | None], vectors: Vectors, row: int) -> list[str]:
    digests = [
        digest.lower() if digest else hashlib.sha256(vector).hexdigest()
        for digest, vector in zip(given, vectors, strict=True)
    ]
    for offset, digest in enumerate(digests):
        if not _SHA256.fullmatch(digest):
            raise InputError(f"Row {row + offset} of {path} has a sha256 that is not 64 hexadecimal digits.")
    return digests


def _composed(names: Sequence[str | None]) -> list[str | None]:
    """Names in Unicode's composed form, as those of folders are."""
    known = {name: unicodedata.normalize("NFC", name) if name else None for name in set(names)}
    return [known[name] for name in names]


def _check_model(path: Path, found: bytes | None, fingerprint: str, *, trusted: bool) -> None:
    if found is None and not trusted:
        raise InputError(
            f"{path} does not say which model made its vectors; pass `trusted=True` to assert "
            "that the gallery's model did."
        )
    if found not in (None, fingerprint.encode()):
        shown = (found or b"").decode(errors="backslashreplace")[:12]
        raise ModelMismatch(
            f"The vectors of {path} were made by another model (fingerprint {shown}, not "
            f"{fingerprint[:12]}); embed the photos with this gallery's model, or enroll elsewhere."
        )


def _check_columns(path: Path, schema: Any, dimension: int) -> None:
    found = {field.name: field.type for field in schema}
    vector = found.get("vector")
    if vector is None:
        raise InputError(f"{path} has no column `vector`; its columns are {', '.join(found) or 'none'}.")
    kinds = pyarrow()[0].types
    if not (_is_list(vector) and kinds.is_floating(vector.value_type)):
        raise InputError(f"The column `vector` of {path} holds {vector}; lists of floats are needed.")
    if kinds.is_fixed_size_list(vector) and vector.list_size != dimension:
        raise InputError(
            f"The vectors of {path} have {vector.list_size:,} numbers; the gallery's have {dimension:,}."
        )
    for name in ("sha256", "identity", "path", "metadata"):
        if name in found and not _is_text(found[name]):
            raise InputError(f"The column `{name}` of {path} holds {found[name]}; texts are needed.")
    paths = found.get("paths")
    if paths is not None and not (_is_list(paths) and _is_text(paths.value_type)):
        raise InputError(f"The column `paths` of {path} holds {paths}; lists of texts are needed.")


def _is_list(kind: Any) -> bool:
    kinds = pyarrow()[0].types
    return bool(kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))


def _is_text(kind: Any) -> bool:
    kinds = pyarrow()[0].types
    if kinds.is_dictionary(kind):
        kind = kind.value_type
    return bool(kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_null(kind))


def write_embeddings(
    path: Path,
    batches: Iterable[tuple[Sequence[NewFace], NDArray[Any]]],
    *,
    fingerprint: str,
    dimension: int,
) -> int:
    """Writes embeddings as `read_embeddings` reads them, whole or not at all; an older file is replaced.

    Args:
        path: of the file.
        batches: faces and their vectors (n, dimension).
        fingerprint, dimension: of the model that made them.

    Returns:
        How many rows there are.

    Raises:
        InputError: not as many vectors as faces, or of another length.
        StorageError: the disk refused.
        MissingDependency: pyarrow is not installed.
    """
    pa, _ = pyarrow()
    schema = pa.schema(
        [
            pa.field("sha256", pa.string(), nullable=False),
            pa.field("identity", pa.string()),
            pa.field("path", pa.string()),
            pa.field("metadata", pa.string()),
            _vector_field(dimension),
        ],
        metadata={_FINGERPRINT: fingerprint.encode()},
    )
    try:
        with replacing(path) as file:
            rows, _ = _write_groups(file, schema, _embedding_columns(batches, dimension))
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {why(error)}.") from error
    return rows


def _embedding_columns(
    batches: Iterable[tuple[Sequence[NewFace], NDArray[Any]]], dimension: int
) -> Iterator[dict[str, Any]]:
    for faces, vectors in batches:
        if np.shape(vectors) != (len(faces), dimension):
            raise InputError(
                f"{len(faces):,} faces need vectors of shape ({len(faces)}, {dimension}), "
                f"not {np.shape(vectors)}."
            )
        vectors = np.ascontiguousarray(vectors, np.float32)
        for start in range(0, len(faces), _GROUP):
            part = faces[start : start + _GROUP]
            yield {
                "sha256": [face.sha256 for face in part],
                "identity": [face.identity for face in part],
                "path": [face.path for face in part],
                "metadata": [encoded(face.metadata, face.path or face.sha256) for face in part],
                "vector": vectors[start : start + _GROUP],
            }


# Reading Parquet

_Block: TypeAlias = tuple[dict[str, list[Any]], Vectors]  # columns by their names, and vectors


def _blocks(path: Path, names: Sequence[str], dimension: int, size: int) -> Iterator[_Block]:
    """What `_read_blocks` gives, each block read by a thread while the one before it is used."""
    with (
        closing(_read_blocks(path, names, dimension, size)) as blocks,
        ThreadPoolExecutor(1, thread_name_prefix="faceprint-read") as thread,
    ):
        coming = thread.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = thread.submit(next, blocks, None)
            yield block


def _read_blocks(
    path: Path, names: Sequence[str], dimension: int, size: int
) -> Generator[_Block, None, None]:
    """Some columns of a Parquet file, `size` rows at a time, and the vectors (n, d) of the same rows.

    Raises:
        InputError: the file is damaged, or a vector has another length or is not finite.
    """
    with opened(path) as parquet:
        pieces = parquet.iter_batches(batch_size=min(_PIECE, size), columns=[*names, "vector"])
        row, block, columns = 0, np.empty((size, dimension), np.float32), _empty(names)
        for piece in pieces:
            start = 0
            while start < len(piece):
                filled = row % size
                part = piece.slice(start, size - filled)
                _fill(path, block[filled : filled + len(part)], part.column("vector"), row)
                for name in names:
                    columns[name] += part.column(name).to_pylist()
                row, start = row + len(part), start + len(part)
                if row % size == 0:
                    yield columns, block
                    block, columns = np.empty((size, dimension), np.float32), _empty(names)
        if row % size:
            yield columns, block[: row % size]


def _empty(names: Sequence[str]) -> dict[str, list[Any]]:
    return {name: [] for name in names}


def _fill(path: Path, block: Vectors, column: Any, row: int) -> None:
    """Copies a column of vectors, whose first is row number `row` of the file, into a block (n, d)."""
    if column.null_count:
        first = row + int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise InputError(f"Row {first} of {path} has no vector.")
    values = column.flatten()
    if not pyarrow()[0].types.is_fixed_size_list(column.type):
        lengths = column.value_lengths().to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero(lengths != block.shape[1])
        if len(wrong):
            raise InputError(
                f"The vector in row {row + wrong[0]} of {path} has {lengths[wrong[0]]:,} numbers; "
                f"the gallery's have {block.shape[1]:,}."
            )
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes an infinity, refused below
        block[:] = values.to_numpy(zero_copy_only=False).reshape(block.shape)  # a null becomes a NaN
    finite = np.isfinite(block)
    if not finite.all():
        first = row + int(np.argmin(finite.all(axis=1)))
        raise InputError(f"The vector in row {first} of {path} has a number that is null or not finite.")
