"""Identities: rename, merge and forget them; after forgetting, nothing of them is left on disk.

Who is nearest to a search stands in `retrieval.search.people`.
"""

import os
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from retrieval.database.identity_names import check_identity, nearest
from retrieval.database.metadata import encoded, filled
from retrieval.database.reader import Reader
from retrieval.database.records import Receipt, utc_now
from retrieval.database.tables import identity_table
from retrieval.database.writer import Writer
from retrieval.errors import InputError
from retrieval.gallery.sync import Renamed
from retrieval.models.bundle import FORGOTTEN, Relabel
from retrieval.storage.vault import Vault, who
from retrieval.system.paths import absolute, is_utf8, readable


@dataclass(frozen=True, slots=True)
class _Target:
    """What is to be forgotten, and the names whose labels go with it."""

    what: str
    face_ids: tuple[int, ...]
    identity_ids: tuple[int, ...]
    names: frozenset[str]


def rename(vault: Vault, name: str, new_name: str, *, keep_alias: bool) -> int:
    """Gives a person another name; see `Gallery.rename_identity`."""
    check_identity(new_name)
    with vault.writing() as writer:
        number = _identity(vault, writer, name)
        names = writer.names_of([number])
        if new_name != name and writer.identity_id(new_name) is not None:
            raise InputError(
                f"There is somebody called {new_name} in {vault.folder} already; "
                "if they are the same person, merge the two with `faceprint merge-identities`."
            )
        faces = len(writer.face_ids_of(name))
        writer.rename_identity(number, new_name)
        writer.remove_alias(new_name)
        if keep_alias and name != new_name:
            writer.add_alias(name, number)
        change = Relabel(new_name, keep_photos=keep_alias)
        _relabel(vault, writer, names, change, erase=not keep_alias)
        vault.log(writer, "rename-identity", faces=faces, identity=number, alias_kept=keep_alias)
    return faces


def merge(vault: Vault, name: str, into: str) -> int:
    """Makes two names one person; see `Gallery.merge_identities`."""
    with vault.writing() as writer:
        number, target = _identity(vault, writer, name), _identity(vault, writer, into)
        if number == target:
            raise InputError(f"{name} and {into} are one identity already.")
        faces, names = len(writer.face_ids_of(name)), writer.names_of([number])
        said = writer.identity_metadata([name, into])
        merged = filled(said[into], said[name])
        encoded(merged, f"{name} and {into} together")
        if merged != said[into]:
            writer.set_metadata(identity_table, {target: merged})
        writer.merge_identities(number, target)
        writer.add_alias(name, target)
        _relabel(vault, writer, names, Relabel(into, keep_photos=True), erase=False)
        vault.log(writer, "merge-identities", faces=faces, identity=number, into=target)
    return faces


def planned(reader: Reader, people: Mapping[str, str]) -> list[Renamed]:
    """What `rename_together` would do."""
    heads = _heads(reader, people)
    return [
        Renamed(name, new, len(reader.face_ids_of(name)), merged=heads[new] != reader.identity_id(name))
        for name, new in sorted(people.items())
    ]


def rename_together(vault: Vault, writer: Writer, people: Mapping[str, str]) -> list[Renamed]:
    """Gives people other names, all at once, so that they may exchange them; the models' labels go with them.

    Several who get one name become one person, and so does whoever gets the name of somebody who keeps it.
    The older of them stays, with its metadata; what these have no key for is filled in. Old names are no
    aliases: a folder of such a name that appears later may be somebody else's.

    Args:
        vault, writer: of the transaction.
        people: new names by today's.

    Raises:
        InputError: the metadata of people who become one are too large together.
    """
    done, heads = planned(writer, people), _heads(writer, people)
    known = writer.identities_named({*people, *people.values()})
    said = dict(known.values())
    labels: dict[str, dict[int, Relabel]] = defaultdict(dict)
    for name, new in people.items():
        change = Relabel(new, keep_photos=True)
        for folder, found in _labels(vault, writer, writer.names_of([known[name][0]]), change).items():
            labels[folder] |= found
    for name in people:  # no name is taken while they change
        writer.rename_identity(known[name][0], f"\x01{known[name][0]}")
    for new, head in heads.items():
        if head in {known[name][0] for name in people}:
            writer.rename_identity(head, new)
            writer.remove_alias(new)
    for name, new in sorted(people.items(), key=lambda pair: known[pair[0]][0]):
        number, head = known[name][0], heads[new]
        if number != head:
            merged = filled(said[head], said[number])
            encoded(merged, f"{name} and {new} together")
            if merged != said[head]:
                writer.set_metadata(identity_table, {head: merged})
                said[head] = merged
            writer.merge_identities(number, head)
    if labels:
        vault.defer(writer, erase=False, labels=labels)
    return done


def _heads(reader: Reader, people: Mapping[str, str]) -> dict[str, int]:
    """The number of the person who has each new name from then on."""
    numbers = {name: number for name, (number, _) in reader.identities_named(people).items()}
    heads: dict[str, int] = {}
    for new in set(people.values()):
        keeps = reader.identity_id(new) if new not in people else None
        first = min(numbers[name] for name, wanted in people.items() if wanted == new)
        heads[new] = first if keeps is None else keeps
    return heads


def _labels(
    vault: Vault, reader: Reader, names: Collection[str], change: Relabel
) -> dict[str, dict[int, Relabel]]:
    """New labels, by number and by the folder of the model, for the outputs of some names."""
    labels: dict[str, dict[int, Relabel]] = {}
    for generation in reader.generations().values():
        today = vault.bundle(reader, generation).labels
        found = {number: change for number, label in enumerate(today) if label in names}
        if found:
            labels[generation.folder] = found
    return labels


def _identity(vault: Vault, reader: Reader, name: str) -> int:
    """The number of a person.

    Raises:
        InputError: there is nobody of that name.
    """
    number = reader.identity_id(name)
    if number is None:
        today = reader.current_names([name]).get(name)
        instead = f"; {name} is called {today} now" if today else _nearest(reader, name)
        raise InputError(f"There is nobody called {readable(name)} in {vault.folder}{instead}.")
    return number


def require(vault: Vault, reader: Reader, names: Iterable[str]) -> None:
    """Checks that somebody has each of some names, today's or former ones.

    Raises:
        InputError: nobody has one.
    """
    names = list(names)
    known = reader.identities_named(filter(is_utf8, names))
    for name in names:
        if name not in known:
            _identity(vault, reader, name)


def _nearest(reader: Reader, name: str) -> str:
    """The names most like one that nobody has, as the end of a sentence; nothing where none is like it."""
    found = nearest(readable(name), reader.identity_names())
    if not found:
        return ""
    return f"; the nearest {'name is' if len(found) == 1 else 'names are'} {', '.join(found)}"


def _relabel(vault: Vault, writer: Writer, names: Collection[str], change: Relabel, *, erase: bool) -> None:
    """Lets the labels of some names, in every model, go with the names."""
    labels = _labels(vault, writer, names, change)
    if erase or labels:
        vault.defer(writer, erase=erase, labels=labels)


def forget(
    vault: Vault, identity: str | None, face_id: int | None, path: str | os.PathLike[str] | None
) -> Receipt:
    """Erases a person, or one face; see `Gallery.forget`."""
    if sum(asked is not None for asked in (identity, face_id, path)) != 1:
        raise InputError("Say what to forget: an identity, or a face, or a path; one of the three.")
    with vault.writing() as writer:
        target = _to_forget(vault, writer, identity, face_id, path)
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
        _relabel(vault, writer, target.names, Relabel(None, keep_photos=False), erase=True)
        vault.log(writer, "forget", faces=receipt.faces, receipt=receipt.id)
    return receipt


def _to_forget(
    vault: Vault,
    reader: Reader,
    identity: str | None,
    face_id: int | None,
    path: str | os.PathLike[str] | None,
) -> _Target:
    if identity is not None:
        return _person(vault, reader, identity)
    if path is not None:
        name = absolute(path)
        found = reader.files([name] if is_utf8(name) else []).get(name)
        if found is None:
            raise InputError(f"There is no face of {readable(name)} in {vault.folder}.")
        face_id = found
    assert face_id is not None
    if not (0 < face_id < 2**63 and reader.faces([face_id])):
        raise InputError(f"There is no face {face_id} in {vault.folder}.")
    person = reader.faces([face_id])[face_id].identity
    # Whose last face goes, goes with every name.
    last = person is not None and reader.face_ids_of(person) == [face_id]
    names = reader.names_of([_identity(vault, reader, person)]) if person is not None and last else set()
    return _Target("face" if path is None else "path", (face_id,), (), frozenset(names))


def _person(vault: Vault, reader: Reader, name: str) -> _Target:
    """Everything of a person; of one who was only trained on, the label."""
    number = reader.identity_id(name)
    if number is None:
        bundles = [vault.bundle(reader, one) for one in reader.generations().values()]
        if name != FORGOTTEN and any(name in bundle.labels for bundle in bundles):
            return _Target("identity", (), (), frozenset([name]))
    number = _identity(vault, reader, name)
    return _Target(
        "identity",
        tuple(reader.face_ids_of(name)),
        (number, *reader.merged_into(number)),
        frozenset(reader.names_of([number])),
    )
