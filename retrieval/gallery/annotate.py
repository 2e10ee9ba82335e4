"""Annotating: metadata of faces and identities is replaced in one transaction."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from retrieval.database.metadata import decoded, encoded
from retrieval.database.reader import Reader
from retrieval.database.tables import face_table, identity_table
from retrieval.storage.vault import Vault
from retrieval.system.paths import absolute, is_utf8


@dataclass(frozen=True, slots=True)
class Annotated:
    """What annotating did.

    Attributes:
        faces, identities: how many have other metadata now.
        unchanged: how many of either had the same already.
        unknown: ids, paths and names that the gallery does not know, as they were given.
    """

    faces: int
    identities: int
    unchanged: int
    unknown: tuple[int | str, ...]


def annotate(
    vault: Vault,
    *,
    faces: Mapping[int, Mapping[str, Any] | None],
    paths: Mapping[str, Mapping[str, Any] | None],
    identities: Mapping[str, Mapping[str, Any] | None],
) -> Annotated:
    """Replaces the metadata of some faces and identities; see `Gallery.annotate`."""
    for number, metadata in faces.items():
        encoded(metadata, f"face {number}")
    for name, metadata in (*paths.items(), *identities.items()):
        encoded(metadata, str(name))
    with vault.writing() as writer:
        faces_by_id, strange = _faces_by_id(writer, faces, paths)
        people = writer.identities_named(filter(is_utf8, identities))
        strange += [name for name in identities if name not in people]
        stored = {number: face.metadata for number, face in writer.faces(faces_by_id).items()}
        new_faces = _changes(stored, faces_by_id)
        new_people = _changes(
            dict(people.values()), {people[n][0]: said for n, said in identities.items() if n in people}
        )
        writer.set_metadata(face_table, new_faces)
        writer.set_metadata(identity_table, new_people)
        if writer.changed:
            vault.log(writer, "annotate", faces=len(new_faces), identities=len(new_people))
    known = len(faces_by_id) + len({number for number, _ in people.values()})
    changed = len(new_faces) + len(new_people)
    return Annotated(len(new_faces), len(new_people), known - changed, tuple(strange))


def _faces_by_id(
    reader: Reader,
    faces: Mapping[int, Mapping[str, Any] | None],
    paths: Mapping[str, Mapping[str, Any] | None],
) -> tuple[dict[int, Mapping[str, Any] | None], list[int | str]]:
    """Metadata by the ids of faces that exist, and the ids and paths of those that do not."""
    places = {path: absolute(path) for path in paths}
    owners = reader.files(filter(is_utf8, places.values()))
    known = reader.faces(number for number in faces if 0 < number < 2**63)
    found = {number: said for number, said in faces.items() if number in known}
    found |= {owners[places[path]]: said for path, said in paths.items() if places[path] in owners}
    strange: list[int | str] = [number for number in faces if number not in known]
    return found, [*strange, *(path for path in paths if places[path] not in owners)]


def _changes(
    stored: Mapping[int, Mapping[str, Any]], wanted: Mapping[int, Mapping[str, Any] | None]
) -> dict[int, dict[str, Any]]:
    """What is wanted and not stored; 1, 1.0 and true are different things here, not as in Python."""
    texts = {number: encoded(said, str(number)) for number, said in wanted.items()}
    return {
        number: decoded(said, str(number))
        for number, said in texts.items()
        if said != encoded(stored[number], str(number))
    }
