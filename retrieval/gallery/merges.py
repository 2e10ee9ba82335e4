"""Merges identities, and undoes merges, for `Gallery`.

The merges that `identities.rename_together` makes, when photos moved to other folders, are not recorded: the
next sync would make them again.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

from retrieval.database.metadata import encoded, filled
from retrieval.database.reader import Reader
from retrieval.database.records import Merge, MergedLabel, Remains, utc_now
from retrieval.database.tables import identity_table
from retrieval.database.writer import Writer
from retrieval.errors import InputError, NotFound
from retrieval.gallery.identities import defer_relabel, require_identity
from retrieval.models.bundle import Relabel
from retrieval.storage.any_vault import AnyVault

_ACTION, _UNDO = "merge-identities", "undo-merge"


@dataclass(frozen=True, slots=True)
class UndoneMerge:
    """What the undo of a merge restored, and what it left.

    Attributes:
        merge: the merge.
        into, into_id: the name and the id of the identity that keeps the rest.
        face_ids: the faces that the restored identity has again.
        elsewhere: faces that were given to other identities since, and stay there.
        forgotten: the number of moved faces that do not exist any more.
        former_names: the former names that the restored identity has again.
        lost_names: former names that belong to other identities by now, or to none.
        kept_keys: keys of the metadata that the other identity got by the merge, and keeps because their
            values were changed since.
    """

    merge: Merge
    into: str
    into_id: int
    face_ids: tuple[int, ...]
    elsewhere: tuple[int, ...] = ()
    forgotten: int = 0
    former_names: tuple[str, ...] = ()
    lost_names: tuple[str, ...] = ()
    kept_keys: tuple[str, ...] = field(default=())

    def names(self) -> list[str]:
        """Returns the names, and keys of metadata, that may occur in the sentences."""
        return [self.merge.name, self.into, *self.lost_names, *self.kept_keys]

    def sentences(self) -> list[str]:
        """Returns what was restored and what was not, in sentences."""
        name, into = self.merge.name, self.into
        left = [
            (self.elsewhere, f"given to others since and left there: {len(self.elsewhere):,}"),
            (self.forgotten, f"no longer in the gallery: {self.forgotten:,}"),
        ]
        said = [f"{name} is a person again, with {len(self.face_ids):,} of {self.merge.faces:,} faces"]
        lines = ["; ".join([*said, *(words for number, words in left if number)]) + "."]
        if self.lost_names:
            lines.append(f"Not restored, as {into} has them no more: {', '.join(self.lost_names)}.")
        if self.kept_keys:
            keys = ", ".join(self.kept_keys)
            lines.append(f"{into} keeps metadata that were changed since the merge: {keys}.")
        return lines


def merge(vault: AnyVault, name: str | int, into: str | int) -> Merge:
    """Merges two identities; see `Gallery.merge_identities`."""
    with vault.writing() as writer:
        return merge_in(vault, writer, name, into)


def merge_in(vault: AnyVault, writer: Writer, name: str | int, into: str | int) -> Merge:
    """Merges two identities in a transaction; see `Gallery.merge_identities`."""
    number, target = require_identity(vault, writer, name), require_identity(vault, writer, into)
    people = writer.people_by_id([number, target])
    one, other = people[number], people[target]
    if number == target:
        raise InputError(f"{name} and {into} are one identity already.")
    metadata = filled(other.metadata, one.metadata)
    encoded(metadata, f"{one.name} and {other.name} together")
    names = writer.names_of([number])
    entry = vault.log(writer, _ACTION, faces=one.faces, identity=number, into=target)
    merged = Merge(
        id=entry,
        merged_at=utc_now(),
        identity_id=number,
        into_id=target,
        name=one.name,
        faces=one.faces,
        into=other.name,
        former_names=tuple(sorted(names - {one.name})),
        metadata=one.metadata,
        filled=tuple(sorted(one.metadata.keys() - other.metadata.keys())),
    )
    writer.add_merge(merged, writer.face_ids_of(one.name), _changed_labels(vault, writer, names))
    if metadata != other.metadata:
        writer.set_metadata(identity_table, {target: metadata})
    writer.merge_identities(number, target)
    writer.add_alias(one.name, target)
    defer_relabel(vault, writer, names, Relabel(other.name, keep_photos=True), erase=False)
    return merged


def preview(vault: AnyVault, merge_id: int) -> UndoneMerge:
    """Returns what the undo of a merge would restore now, and changes nothing; errors as of `undo`."""
    with vault.store.read() as reader:
        merged = _require_merge(vault, reader, merge_id)
        return _outcome(reader, merged, _require_remains(reader, merged))


def undo(vault: AnyVault, merge_id: int | None) -> UndoneMerge:
    """Undoes a merge, by default the newest; see `Gallery.undo_merge`."""
    with vault.writing() as writer:
        return undo_in(vault, writer, merge_id)


def undo_in(vault: AnyVault, writer: Writer, merge_id: int | None) -> UndoneMerge:
    """Undoes a merge in a transaction; see `Gallery.undo_merge`."""
    merged = _require_merge(vault, writer, merge_id)
    remains = _require_remains(writer, merged)
    outcome = _outcome(writer, merged, remains)
    labels = _restored_labels(vault, writer, merged, remains)
    writer.split_identity(merged, remains)
    if labels:
        vault.defer(writer, erase=False, labels=labels)
    faces, detail = len(remains.face_ids), {"identity": merged.identity_id, "into": remains.owner}
    vault.log(writer, _UNDO, faces=faces, merge=merged.id, **detail)
    return outcome


def _outcome(reader: Reader, merged: Merge, remains: Remains) -> UndoneMerge:
    """Returns what the undo of a merge restores and leaves, as long as it is not undone."""
    moved = reader.merged_faces(merged.id)
    return UndoneMerge(
        merged,
        reader.names_of_identities([remains.owner])[remains.owner],
        remains.owner,
        remains.face_ids,
        elsewhere=tuple(sorted(moved.keys() - set(remains.face_ids))),
        forgotten=merged.faces - len(moved),
        former_names=tuple(name for name in merged.former_names if name in remains.names),
        lost_names=tuple(name for name in merged.former_names if name not in remains.names),
        kept_keys=tuple(key for key in merged.filled if key not in remains.keys),
    )


def _require_merge(vault: AnyVault, reader: Reader, merge_id: int | None) -> Merge:
    """Returns a merge that can be undone, by default the newest.

    Raises:
        NotFound: there is none.
    """
    if merge_id is None:
        newest = reader.merges(limit=1)
        if not newest:
            raise NotFound(f"{vault.name} has no merge that can be undone.")
        return newest[0]
    found = reader.merges_by_id([merge_id] if 0 < merge_id < 2**63 else [])
    if merge_id not in found:
        undone = any(
            entry.action == _UNDO and entry.detail.get("merge") == merge_id for entry in reader.audit_log()
        )
        why = "was undone already" if undone else "is not one that can be undone"
        raise NotFound(
            f"Merge {merge_id} {why}; `faceprint undo-merge {shlex.quote(vault.name)} --list` shows those "
            "that can."
        )
    return found[merge_id]


def _require_remains(reader: Reader, merged: Merge) -> Remains:
    """Returns what of a merged identity can be restored.

    Raises:
        InputError: the merge cannot be undone now.
    """
    later = reader.merge_of(merged.into_id)
    if later is not None:
        raise InputError(
            f"{merged.into} was merged into {later.into} since; undo that first: merge {later.id}."
        )
    if reader.identity_id(merged.name) is not None:
        raise InputError(
            f"Another person is called {merged.name} by now; rename that one, then undo merge {merged.id}."
        )
    remains = reader.remains(merged)
    if remains is None or not remains.face_ids:
        raise InputError(
            f"None of the faces that merge {merged.id} moved belongs to {merged.into} any more; "
            "give faces a name with `faceprint assign-identity`."
        )
    return remains


def _changed_labels(vault: AnyVault, reader: Reader, names: set[str]) -> Iterator[MergedLabel]:
    """Yields the outputs of the models with one of some names; a folder's photos are with the first."""
    fingerprints: set[str] = set()
    for generation in reader.generations().values():
        if generation.fingerprint in fingerprints:
            continue
        fingerprints.add(generation.fingerprint)
        bundle, known = vault.bundle(reader, generation), set[str]()
        for output, label in enumerate(bundle.labels):
            if label in names:
                photos = () if label in known else bundle.photos_in_split(label)
                known.add(label)
                yield MergedLabel(generation.fingerprint, output, photos)


def _restored_labels(
    vault: AnyVault, reader: Reader, merged: Merge, remains: Remains
) -> dict[str, dict[int, Relabel]]:
    """Returns the changes of labels that undo those of a merge, by the folder of the model, then by output.

    Labels that are no longer of the identity that stays are left, and so are those of later models.
    """
    names, labels = reader.names_of([remains.owner]), reader.merged_labels(merged.id)
    changes: dict[str, dict[int, Relabel]] = {}
    for generation in reader.generations().values():
        own = [one for one in labels if one.fingerprint == generation.fingerprint]
        today = vault.bundle(reader, generation).labels if own else ()
        found = {
            one.output: Relabel(merged.name, True, one.photos)
            for one in own
            if one.output < len(today) and today[one.output] in names
        }
        if found:
            changes[generation.folder] = found
    return changes
