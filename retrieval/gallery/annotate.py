"""Replaces the metadata of faces and identities in one transaction, for `Gallery.annotate`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from retrieval.database.metadata import decoded, encoded
from retrieval.database.reader import Reader
from retrieval.database.tables import face_table, identity_table
from retrieval.storage.any_vault import AnyVault
from retrieval.system.paths import absolute, is_utf8


@dataclass(frozen=True, slots=True)
class Annotated:
    """The result of annotating.

    Attributes:
        faces, identities: how many faces and identities have new metadata.
        unchanged: how many faces and identities had the same metadata before.
        unknown: the given ids, paths and names that are not in the gallery.
    """

    faces: int
    identities: int
    unchanged: int
    unknown: tuple[int | str, ...]


def annotate(
    vault: AnyVault,
    *,
    faces: Mapping[int, Mapping[str, Any] | None],
    paths: Mapping[str, Mapping[str, Any] | None],
    identities: Mapping[str, Mapping[str, Any] | None] | Mapping[int, Mapping[str, Any] | None],
) -> Annotated:
    """Replaces the metadata of some faces and identities; see `Gallery.annotate`."""
    for number, metadata in faces.items():
        encoded(metadata, f"face {number}")
    for name, metadata in (*paths.items(), *identities.items()):
        encoded(metadata, str(name))
    with vault.writing() as writer:
        faces_by_id, unknown = _faces_by_id(writer, faces, paths)
        known_identities = _identities(writer, identities)
        unknown += [key for key in identities if key not in known_identities]
        stored = {number: face.metadata for number, face in writer.faces(faces_by_id).items()}
        new_faces = _changes(stored, faces_by_id)
        new_identities = _changes(
            dict(known_identities.values()),
            {
                known_identities[key][0]: metadata
                for key, metadata in identities.items()
                if key in known_identities
            },
        )
        writer.set_metadata(face_table, new_faces)
        writer.set_metadata(identity_table, new_identities)
        if writer.changed:
            vault.log(writer, "annotate", faces=len(new_faces), identities=len(new_identities))
    known = len(faces_by_id) + len({number for number, _ in known_identities.values()})
    changed = len(new_faces) + len(new_identities)
    return Annotated(len(new_faces), len(new_identities), known - changed, tuple(unknown))


def _identities(reader: Reader, keys: Iterable[str | int]) -> dict[str | int, tuple[int, Mapping[str, Any]]]:
    """Returns ids and metadata of identities by the given names or ids; unknown ones are absent."""
    names = [key for key in keys if isinstance(key, str) and is_utf8(key)]
    ids = [key for key in keys if isinstance(key, int) and 0 < key < 2**63]
    found: dict[str | int, tuple[int, Mapping[str, Any]]] = {}
    found.update(reader.identities_named(names).items())
    found.update((number, (number, one.metadata)) for number, one in reader.people_by_id(ids).items())
    return found


def _faces_by_id(
    reader: Reader,
    faces: Mapping[int, Mapping[str, Any] | None],
    paths: Mapping[str, Mapping[str, Any] | None],
) -> tuple[dict[int, Mapping[str, Any] | None], list[int | str]]:
    """Returns the metadata of existing faces by id, and the given ids and paths without a face."""
    absolute_paths = {path: absolute(path) for path in paths}
    files = reader.known_files(filter(is_utf8, absolute_paths.values()))
    known = reader.faces(number for number in faces if 0 < number < 2**63)
    found = {number: metadata for number, metadata in faces.items() if number in known}
    found |= {
        number: metadata
        for path, metadata in paths.items()
        if absolute_paths[path] in files
        for number in files[absolute_paths[path]].face_ids
    }
    unknown: list[int | str] = [number for number in faces if number not in known]
    return found, [*unknown, *(path for path in paths if absolute_paths[path] not in files)]


def _changes(
    stored: Mapping[int, Mapping[str, Any]], wanted: Mapping[int, Mapping[str, Any] | None]
) -> dict[int, dict[str, Any]]:
    """Returns the wanted metadata that differ from the stored; unlike in Python, 1, 1.0 and true differ."""
    texts = {number: encoded(metadata, str(number)) for number, metadata in wanted.items()}
    return {
        number: decoded(text, str(number))
        for number, text in texts.items()
        if text != encoded(stored[number], str(number))
    }
