"""Renames and forgets identities, for `Gallery`. A forgotten identity leaves nothing on disk.

`merges` merges identities. The search for the nearest ones is in `retrieval.search.people`.
"""

import os
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from retrieval.database.identity_names import check_identity, nearest
from retrieval.database.metadata import encoded, filled
from retrieval.database.reader import Reader
from retrieval.database.records import Face, Receipt, utc_now
from retrieval.database.tables import identity_table
from retrieval.database.writer import Writer
from retrieval.errors import InputError, NotFound
from retrieval.gallery.sync import Renamed
from retrieval.models.bundle import FORGOTTEN, Relabel
from retrieval.storage.any_vault import AnyVault, who
from retrieval.system.paths import absolute, is_utf8, readable


@dataclass(frozen=True, slots=True)
class _Target:
    """What to forget, and the names for which the model's labels are removed too."""

    what: str
    face_ids: tuple[int, ...]
    identity_ids: tuple[int, ...]
    names: frozenset[str]


def rename(vault: AnyVault, identity: str | int, new_name: str, *, keep_alias: bool) -> int:
    """Renames an identity and returns its number of faces; see `Gallery.rename_identity`."""
    check_identity(new_name)
    with vault.writing() as writer:
        number = require_identity(vault, writer, identity)
        names, name = writer.names_of([number]), writer.names_of_identities([number])[number]
        if new_name != name and writer.identity_id(new_name) is not None:
            raise InputError(
                f"{vault.name} already has an identity {new_name}; "
                "if they are the same person, merge the two with `faceprint merge-identities`."
            )
        faces = len(writer.face_ids_of(name))
        writer.rename_identity(number, new_name)
        writer.remove_alias(new_name)
        if keep_alias and name != new_name:
            writer.add_alias(name, number)
        if not keep_alias:
            writer.erase_merged_name(name)
            writer.erase_merged_photos(number)
        change = Relabel(new_name, keep_photos=keep_alias)
        defer_relabel(vault, writer, names, change, erase=not keep_alias)
        vault.log(writer, "rename-identity", faces=faces, identity=number, alias_kept=keep_alias)
    return faces


def assign(vault: AnyVault, face_ids: Iterable[int], name: str | None) -> int:
    """Gives faces an identity and returns how many changed theirs; see `Gallery.assign_identity`."""
    if name is not None:
        check_identity(name)
    with vault.writing() as writer:
        return assign_in(vault, writer, face_ids, name)


def assign_in(vault: AnyVault, writer: Writer, face_ids: Iterable[int], name: str | None) -> int:
    """Gives faces an identity in a transaction; see `Gallery.assign_identity`."""
    wanted = list(dict.fromkeys(face_ids))
    if name is not None:
        name = writer.current_names([name]).get(name, name)
    found = writer.faces([number for number in wanted if 0 < number < 2**63])
    unknown = [number for number in wanted if number not in found]
    if unknown:
        raise NotFound(f"There is no face {unknown[0]} in {vault.name}.")
    changed = [number for number, face in found.items() if face.identity != name]
    for number in changed:
        writer.name_face(number, name)
    if changed:
        writer.remove_orphaned_identities()
        vault.log(writer, "assign-identity", faces=len(changed))
    return len(changed)


def planned(reader: Reader, people: Mapping[str, str]) -> list[Renamed]:
    """Returns what `rename_together` would do; changes nothing."""
    owners = _new_owners(reader, people)
    return [
        Renamed(name, new, len(reader.face_ids_of(name)), merged=owners[new] != reader.identity_id(name))
        for name, new in sorted(people.items())
    ]


def rename_together(vault: AnyVault, writer: Writer, people: Mapping[str, str]) -> list[Renamed]:
    """Renames identities and the models' labels, all at once, so that identities may exchange names.

    Identities that get the same name are merged: into the identity that keeps this name, if there is one,
    otherwise into the oldest of them. The remaining identity keeps its metadata; keys that it lacks are
    filled in from the others. Old names do not become aliases: a folder of such a name that appears later may
    be of another person.

    Args:
        vault, writer: the gallery, and the transaction.
        people: new name by current name.

    Returns:
        The changes, by current name.

    Raises:
        InputError: the metadata of merged identities are too large together.
    """
    done, owners = planned(writer, people), _new_owners(writer, people)
    known = writer.identities_named({*people, *people.values()})
    metadata = dict(known.values())
    labels: dict[str, dict[int, Relabel]] = defaultdict(dict)
    for name, new in people.items():
        change = Relabel(new, keep_photos=True)
        for folder, found in _label_changes(vault, writer, writer.names_of([known[name][0]]), change).items():
            labels[folder] |= found
    for name in people:  # placeholders, so that no new name is still in use
        writer.rename_identity(known[name][0], f"\x01{known[name][0]}")
    for new, owner in owners.items():
        if owner in {known[name][0] for name in people}:
            writer.rename_identity(owner, new)
            writer.remove_alias(new)
    for name, new in sorted(people.items(), key=lambda pair: known[pair[0]][0]):
        number, owner = known[name][0], owners[new]
        if number != owner:
            merged = filled(metadata[owner], metadata[number])
            encoded(merged, f"{name} and {new} together")
            if merged != metadata[owner]:
                writer.set_metadata(identity_table, {owner: merged})
                metadata[owner] = merged
            writer.merge_identities(number, owner)
    if labels:
        vault.defer(writer, erase=False, labels=labels)
    return done


def _new_owners(reader: Reader, people: Mapping[str, str]) -> dict[str, int]:
    """Returns the number of the identity that has each new name after the change."""
    numbers = {name: number for name, (number, _) in reader.identities_named(people).items()}
    owners: dict[str, int] = {}
    for new in set(people.values()):
        keeper = reader.identity_id(new) if new not in people else None
        first = min(numbers[name] for name, wanted in people.items() if wanted == new)
        owners[new] = first if keeper is None else keeper
    return owners


def _label_changes(
    vault: AnyVault, reader: Reader, names: Collection[str], change: Relabel
) -> dict[str, dict[int, Relabel]]:
    """Returns the label changes of some names: by the folder of the model, then by output number."""
    labels: dict[str, dict[int, Relabel]] = {}
    for generation in reader.generations().values():
        current = vault.bundle(reader, generation).labels
        found = {number: change for number, label in enumerate(current) if label in names}
        if found:
            labels[generation.folder] = found
    return labels


def require_identity(vault: AnyVault, reader: Reader, name: str | int) -> int:
    """Returns the id of an identity, given by its current name or by its id.

    Raises:
        NotFound: no identity has that name or id.
    """
    if isinstance(name, int):
        if not (0 < name < 2**63 and reader.names_of_identities([name])):
            raise NotFound(f"There is no person {name} in {vault.name}.")
        return name
    number = reader.identity_id(name)
    if number is None:
        current = reader.current_names([name]).get(name)
        instead = f"; {name} is called {current} now" if current else _similar_names_hint(reader, name)
        raise NotFound(f"There is no identity {readable(name)} in {vault.name}{instead}.")
    return number


def require(vault: AnyVault, reader: Reader, names: Iterable[str]) -> None:
    """Checks that an identity has each of some names, current or former.

    Raises:
        InputError: no identity has one of them.
    """
    names = list(names)
    known = reader.identities_named(filter(is_utf8, names))
    for name in names:
        if name not in known:
            require_identity(vault, reader, name)


def _similar_names_hint(reader: Reader, name: str) -> str:
    """Returns the end of an error sentence: the names most similar to an unknown one; empty if none is."""
    found = nearest(readable(name), reader.identity_names())
    if not found:
        return ""
    return f"; the nearest {'name is' if len(found) == 1 else 'names are'} {', '.join(found)}"


def defer_relabel(
    vault: AnyVault, writer: Writer, names: Collection[str], change: Relabel, *, erase: bool
) -> None:
    """Defers the change of the labels of some names in every model, and the erasure of traces if asked."""
    labels = _label_changes(vault, writer, names, change)
    if erase or labels:
        vault.defer(writer, erase=erase, labels=labels)


def forget(
    vault: AnyVault, identity: str | int | None, face_id: int | None, path: str | os.PathLike[str] | None
) -> Receipt:
    """Erases an identity, one face, or a photo, and returns the receipt; see `Gallery.forget`."""
    if sum(asked is not None for asked in (identity, face_id, path)) != 1:
        raise InputError("Say what to forget: an identity, or a face, or a path; one of the three.")
    with vault.writing() as writer:
        target = _forget_target(vault, writer, identity, face_id, path)
        receipt = Receipt(
            id=str(uuid.uuid4()),
            gallery=writer.gallery().uuid,
            at=utc_now(),
            who=who(),
            what=target.what,
            faces=len(target.face_ids),
            face_ids=target.face_ids,
            identity_ids=target.identity_ids,
        )
        vault.remove(writer, target.face_ids)
        writer.add_receipt(receipt)
        defer_relabel(vault, writer, target.names, Relabel(None, keep_photos=False), erase=True)
        vault.log(writer, "forget", faces=receipt.faces, receipt=receipt.id)
    return receipt


def _forget_target(
    vault: AnyVault,
    reader: Reader,
    identity: str | int | None,
    face_id: int | None,
    path: str | os.PathLike[str] | None,
) -> _Target:
    if identity is not None:
        return _identity_target(vault, reader, identity)
    if path is not None:
        return _faces_target(vault, reader, "path", _faces_at(vault, reader, absolute(path)))
    assert face_id is not None
    found = reader.faces([face_id]) if 0 < face_id < 2**63 else {}
    if not found:
        raise NotFound(f"There is no face {face_id} in {vault.name}.")
    return _faces_target(vault, reader, "face", tuple(found.values()))


def _faces_at(vault: AnyVault, reader: Reader, path: str) -> tuple[Face, ...]:
    """Returns all faces of the photo at a path.

    Raises:
        NotFound: no photo has that path.
    """
    known = reader.known_files([path] if is_utf8(path) else []).get(path)
    if known is None:
        raise NotFound(f"There is no face of {readable(path)} in {vault.name}.")
    return reader.photos([known.photo_id])[known.photo_id].faces


def _faces_target(vault: AnyVault, reader: Reader, what: str, faces: tuple[Face, ...]) -> _Target:
    """Some faces, and all names of the identities that lose their last face with them."""
    ids = {face.id for face in faces}
    people = {face.identity for face in faces if face.identity is not None}
    emptied = [name for name in sorted(people) if ids.issuperset(reader.face_ids_of(name))]
    names = reader.names_of([require_identity(vault, reader, name) for name in emptied])
    return _Target(what, tuple(sorted(ids)), (), frozenset(names))


def _identity_target(vault: AnyVault, reader: Reader, name: str | int) -> _Target:
    """Returns all faces and names of an identity; only the label, of one that the model was trained on.

    Raises:
        NotFound: no identity and no label has that name, or no identity that id.
    """
    if isinstance(name, str) and reader.identity_id(name) is None:
        bundles = [vault.bundle(reader, one) for one in reader.generations().values()]
        if name != FORGOTTEN and any(name in bundle.labels for bundle in bundles):
            return _Target("identity", (), (), frozenset([name]))
    number = require_identity(vault, reader, name)
    return _Target(
        "identity",
        tuple(sorted(reader.face_ids_of_identities([number]))),
        (number, *reader.merged_into(number)),
        frozenset(reader.names_of([number])),
    )
