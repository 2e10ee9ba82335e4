"""Export: writes one snapshot of a gallery as Parquet files and a manifest."""

import dataclasses
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.database.metadata import encoded
from retrieval.database.reader import Reader
from retrieval.database.records import utc_now
from retrieval.errors import GalleryDamaged, InputError, StorageError
from retrieval.index.segments import Ids, Vectors
from retrieval.models.bundle import ModelBundle
from retrieval.storage.any_vault import AnyVault
from retrieval.system.files import create, whole_folder, why, write_durably
from retrieval.system.parquet import pyarrow
from retrieval.transfer.manifest import (
    MANIFEST,
    VERSION_WITH_COLOUR_PROFILES,
    VERSION_WITH_METADATA,
    VERSION_WITH_REGIONS,
    Export,
    ExportedFile,
    export_schema,
)
from retrieval.transfer.parquet_blocks import ROW_GROUP, write_groups


def export(vault: AnyVault, target: Path, *, rows_per_file: int = 100_000) -> Export:
    """Writes one snapshot of a gallery as a folder in an open format, atomically, and logs it.

    An export is a copy outside the gallery: later erasures do not remove names, paths or vectors from it.

    Args:
        vault: of the gallery; a read-only one gets no entry in its audit log.
        target: a folder that does not exist, or is empty.
        rows_per_file: the most rows of a Parquet file, at least 1.

    Returns:
        The export, as its manifest describes it.

    Raises:
        InputError: `target` exists and is not empty, or `rows_per_file` is below 1.
        StorageError, GalleryBusy: nothing was exported.
        GalleryDamaged: a segment has another SHA-256 than its row, or vectors and faces do not match.
        MissingDependency: pyarrow is not installed.
    """
    pyarrow()
    if rows_per_file < 1:
        raise InputError(f"A file must have at least one row, not {rows_per_file}.")
    try:
        with whole_folder(target) as made:
            proven: set[int] = set()
            written = vault.on_a_snapshot(lambda reader: _write(vault, reader, made, rows_per_file, proven))
            # Before the folder gets its final name, so that no export exists without a log entry.
            if not vault.read_only:
                with vault.writing() as writer:
                    vault.log(writer, "export", faces=written.faces)
    except FileExistsError as error:
        raise InputError(f"{target} exists already and is not empty; choose another folder.") from error
    except OSError as error:
        raise StorageError(f"The export {target} cannot be written: {why(error)}.") from error
    return dataclasses.replace(written, folder=target)


def _write(vault: AnyVault, reader: Reader, folder: Path, rows_per_file: int, proven: set[int]) -> Export:
    """Writes a snapshot's files; `proven` holds what earlier attempts compared.

    Raises:
        SegmentMissing: a writer merged a segment meanwhile, so its file is gone; nothing was written.
    """
    state, row = vault.state(reader), reader.gallery()
    parts = vault.proven_parts(reader, proven)
    model = vault.bundle(reader, state.generation)
    faces = reader.count()
    if faces != state.faces:
        raise _damaged(vault, f"has {state.faces:,} vectors and {faces:,} faces")
    group = min(ROW_GROUP, rows_per_file)
    per_file = rows_per_file // group
    groups = _groups(parts, group)
    records = _records(vault, reader, groups)
    version = _version(model, reader)
    schema = export_schema(model.fingerprint, model.dimension, gallery=row.uuid, version=version)
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
        version=version,
        calibration=None if state.calibration is None else state.calibration.fields(),
        files=tuple(
            _write_file(folder / f"faces-{number:05d}.parquet", schema, islice(records, per_file))
            # An empty gallery gives one file without rows, which has the columns.
            for number in range(max(1, -(-faces // (group * per_file))))
        ),
    )
    write_durably(folder / MANIFEST, exported.manifest().encode(), inherit=True)
    return exported


def _version(model: ModelBundle, reader: Reader) -> int:
    """The lowest version of the format that can express the gallery."""
    if model.preprocessing.faces is not None or reader.has_regions():
        return VERSION_WITH_REGIONS
    ignores_profiles = model.preprocessing.colour == "ignore"
    return VERSION_WITH_METADATA if ignores_profiles else VERSION_WITH_COLOUR_PROFILES


def _groups(given: Iterable[tuple[Ids, Vectors]], rows: int) -> Iterator[tuple[Ids, Vectors]]:
    """Yields all rows in groups of `rows`, the last may be smaller; a group within one part is a view."""
    parts: list[tuple[Ids, Vectors]] = []
    remaining = rows
    for ids, vectors in given:
        start = 0
        while start < len(ids):
            end = min(start + remaining, len(ids))
            parts.append((ids[start:end], vectors[start:end]))
            remaining -= end - start
            start = end
            if not remaining:
                yield _joined(parts)
                parts, remaining = [], rows
    if parts:
        yield _joined(parts)


def _joined(parts: Sequence[tuple[Ids, Vectors]]) -> tuple[Ids, Vectors]:
    if len(parts) == 1:
        return parts[0]
    ids, vectors = zip(*parts, strict=True)
    return np.concatenate(ids), np.concatenate(vectors)


def _records(
    vault: AnyVault, reader: Reader, groups: Iterable[tuple[Ids, Vectors]]
) -> Iterator[dict[str, Any]]:
    """Yields the columns of each row group."""
    for ids, vectors in groups:
        by_id = reader.faces(ids.tolist())
        try:
            faces = [by_id[number] for number in ids.tolist()]
        except KeyError as error:
            raise _damaged(vault, f"has a vector {error} without a face") from error
        names = {face.identity for face in faces if face.identity is not None}
        people = {name: encoded(metadata, name) for name, metadata in reader.identity_metadata(names).items()}
        yield {
            "id": ids,
            "identity": [face.identity for face in faces],
            "sha256": [face.sha256 for face in faces],
            "enrolled_at": [face.enrolled_at for face in faces],
            "paths": [face.paths for face in faces],
            "metadata": [encoded(face.metadata, f"face {face.id}") for face in faces],
            "identity_metadata": [None if f.identity is None else people[f.identity] for f in faces],
            "region": [None if face.region is None else face.region.as_json() for face in faces],
            "vector": vectors,
        }


def _damaged(vault: AnyVault, what: str) -> GalleryDamaged:
    return GalleryDamaged(f"{vault.name} {what}; see `faceprint verify {shlex.quote(vault.name)}`.")


def _write_file(path: Path, schema: Any, groups: Iterable[dict[str, Any]]) -> ExportedFile:
    """Writes row groups to a Parquet file durably, and returns its name, rows, size and SHA-256.

    Raises:
        OSError: the file cannot be written.
    """
    with create(path, inherit=True) as file:
        rows, sha256 = write_groups(file, schema, groups)
        file.flush()
        os.fsync(file.fileno())
        return ExportedFile(path.name, rows, file.tell(), sha256)
