"""Decides about the doubts of audits, and keeps those of the last one for the processes that show them.

They lie in tables of the gallery: every process reads them on the snapshot of everything else, and the
transaction that erases a face or a person erases the doubts about it.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from retrieval.database.reader import Reader
from retrieval.database.records import DoubtKey, DoubtState, Face, StoredDoubt, utc_now
from retrieval.database.writer import Writer
from retrieval.errors import InputError, NotFound
from retrieval.gallery import identities, merges
from retrieval.gallery.gallery import Gallery
from retrieval.quality.audit_report import (
    HEADINGS,
    Audited,
    Doubt,
    Kind,
    ProposedAct,
    doubt,
    is_complete,
    proposed_act,
)

# The order of states in a list, and the place of a doubt that the last audit did not find.
_RANKS = {DoubtState.OPEN: 0, DoubtState.DISMISSED: 1, DoubtState.CONFIRMED: 2}
_LAST = 10**9


@dataclass(frozen=True)
class DoubtPage:
    """A part of the list of doubts.

    Attributes:
        doubts: open ones first, each state in the order of the last audit.
        last: where the page ends, for `doubts(after=...)`; empty on the last page.
        audited_at: when the last audit was kept, ISO 8601, UTC; None before the first.
    """

    doubts: tuple[Doubt, ...]
    last: str
    audited_at: str | None


def keep(gallery: Gallery, audited: Audited) -> int:
    """Stores the doubts of an audit in place of those of the one before, and returns how many are open.

    Decisions stay. A confirmed doubt is open again if an act settled it and the audit finds it all the same.
    """
    with gallery.vault.writing() as writer:
        known = writer.doubts(writer.doubt_states())
        writer.forget_last_audit()
        number = 0
        for place, one in enumerate(_standing(writer, audited.with_dismissed().doubts)):
            stored = _kept(one, place, known.get(one.id))
            writer.add_doubt(stored)
            number += stored.state is DoubtState.OPEN
        gallery.vault.log(writer, "audit", open=number)
    return number


def doubts(
    gallery: Gallery, *, state: DoubtState | None = None, after: str = "", limit: int = 100
) -> DoubtPage:
    """Returns a page of the doubts of the last audit that was kept, and of those that were decided about.

    Args:
        gallery: the gallery.
        state: only doubts of this state; open ones are left out where what they state is no longer so.
        after: the `last` of the page before.
        limit: the most doubts of the page.
    """
    with gallery.vault.store.read() as reader:
        keys = sorted(_position(*one) for one in _listed(reader) if state in (None, one[0]))
        start = bisect_right(keys, after)
        chosen = [key.split(" ")[2] for key in keys[start : start + limit]]
        stored = reader.doubts(chosen)
        shown = tuple(_shown(reader, gallery.name, [stored[number] for number in chosen]))
        last = keys[start + limit - 1] if start + limit < len(keys) else ""
        return DoubtPage(shown, last, reader.last_logged("audit"))


def counts(gallery: Gallery) -> dict[DoubtState, int]:
    """Returns how many doubts of each state `doubts` lists."""
    with gallery.vault.store.read() as reader:
        found = Counter(state for state, _, _ in _listed(reader))
    return {state: found[state] for state in DoubtState}


def place_of(gallery: Gallery, number: str) -> str:
    """Returns where a doubt is in the list of `doubts`, for `after`.

    Raises:
        NotFound: there is none with this id.
    """
    with gallery.vault.store.read() as reader:
        stored = _require(reader, number)
        return _position(stored.state, stored.place, number)


def doubt_of(gallery: Gallery, number: str) -> Doubt:
    """Returns a stored doubt by its id.

    Raises:
        NotFound: there is none with this id.
    """
    with gallery.vault.store.read() as reader:
        [found] = _shown(reader, gallery.name, [_require(reader, number)])
        return found


def dismiss(gallery: Gallery, numbers: Iterable[str]) -> int:
    """Dismisses doubts: later audits leave them out while they are about the same faces and identities.

    Args:
        gallery: the gallery.
        numbers: ids of doubts, as of `Doubt.id`; they need not be of an audit that was kept.

    Returns:
        How many were dismissed now.

    Raises:
        InputError: a text is no id of a doubt, or the doubt was confirmed.
        NotFound: one of its faces or identities is not in the gallery.
    """
    with gallery.vault.writing() as writer:
        changed = sum(_dismiss(gallery, writer, number) for number in dict.fromkeys(numbers))
        if changed:
            gallery.vault.log(writer, "dismiss-doubt", doubts=changed)
    return changed


def undismiss(gallery: Gallery, numbers: Iterable[str]) -> int:
    """Takes dismissals back; returns how many.

    Raises:
        NotFound: there is no such doubt.
        InputError: one is not dismissed.
    """
    wanted = list(dict.fromkeys(numbers))
    with gallery.vault.writing() as writer:
        for number in wanted:
            if _require(writer, number).state is not DoubtState.DISMISSED:
                raise InputError(f"The doubt {number} is not dismissed.")
            _reopen(gallery, writer, number)
    return len(wanted)


def confirm(gallery: Gallery, number: str) -> Doubt:
    """Confirms an open doubt, does what it proposes (`Doubt.act`), and returns it.

    Raises:
        NotFound: there is no such doubt.
        InputError: it is not open, or the faces or identities have changed since the audit.
    """
    with gallery.vault.writing() as writer:
        stored = _require(writer, number)
        if stored.state is not DoubtState.OPEN:
            raise InputError(f"The doubt {number} is {stored.state} already; reopen it first.")
        if not stored.stands:
            raise InputError(f"What the doubt {number} states is no longer so; audit the gallery again.")
        [found] = _shown(writer, gallery.name, [stored])
        merge_id = None if found.act is None else _do(gallery, writer, found.act)
        writer.set_doubt(number, DoubtState.CONFIRMED, merge_id=merge_id)
        gallery.vault.log(writer, "confirm-doubt")
        [found] = _shown(writer, gallery.name, [writer.doubts([number]).get(number, stored)])
    return replace(found, state=DoubtState.CONFIRMED)


def reopen(gallery: Gallery, number: str) -> None:
    """Takes a decision back, and undoes what a confirmation did. A doubt that no audit found is dropped.

    Raises:
        NotFound: there is no such doubt.
        InputError: it is open, or what its confirmation did cannot be undone.
    """
    with gallery.vault.writing() as writer:
        _reopen(gallery, writer, number)


def _reopen(gallery: Gallery, writer: Writer, number: str) -> None:
    stored = _require(writer, number)
    if stored.state is DoubtState.OPEN:
        raise InputError(f"The doubt {number} is open.")
    if stored.state is DoubtState.CONFIRMED:
        _undo(gallery, writer, stored)
    if stored.place is None:
        writer.remove_doubts([number])
    else:
        writer.set_doubt(number, DoubtState.OPEN)
    gallery.vault.log(writer, "reopen-doubt")


# Storing


def _standing(reader: Reader, found: Sequence[Doubt]) -> Iterator[Doubt]:
    """Yields the doubts that still have the faces and identities of the audit."""
    faces = reader.faces({face.id for one in found for group in one.groups for face in group})
    people = reader.names_of_identities({number for one in found for number in one.key.identity_ids})
    for one in found:
        today = [faces.get(face.id) for group in one.groups for face in group]
        then = [face.identity for group in one.groups for face in group]
        same = [face is not None and face.identity for face in today] == then
        if same and people.keys() >= set(one.key.identity_ids):
            yield one


def _kept(found: Doubt, place: int, before: StoredDoubt | None) -> StoredDoubt:
    """Returns what is stored of a doubt that an audit found, with the decision of before."""
    groups = tuple(tuple(face.id for face in group) for group in found.groups)
    kept = StoredDoubt(found.key, DoubtState.OPEN, groups, place, found.score, dict(found.measured))
    if before is None or (before.state is DoubtState.CONFIRMED and found.act is not None):
        return kept
    return replace(kept, state=before.state, decided_at=before.decided_at)


def _dismiss(gallery: Gallery, writer: Writer, number: str) -> bool:
    """Dismisses a doubt; returns whether it was not dismissed before."""
    key = _parsed(number)
    stored = writer.doubts([number]).get(number)
    if stored is None:
        _require_subjects(gallery, writer, key)
        writer.add_doubt(StoredDoubt(key, DoubtState.DISMISSED, _groups(key), decided_at=utc_now()))
        return True
    if stored.state is DoubtState.CONFIRMED:
        raise InputError(f"The doubt {number} is confirmed already; reopen it first.")
    writer.set_doubt(number, DoubtState.DISMISSED)
    return stored.state is DoubtState.OPEN


def _parsed(number: str) -> DoubtKey:
    """Returns what a doubt is about.

    Raises:
        InputError: the text is no id of a doubt.
    """
    try:
        key = DoubtKey.of(number)
        if is_complete(key):
            return key
    except ValueError:
        pass
    raise InputError(
        f"{number[:80]!a} is no id of a doubt, such as anothers-photo.f12.p3.p5; an audit shows them."
    )


def _groups(key: DoubtKey) -> tuple[tuple[int, ...], ...]:
    """Returns the doubted faces as an audit groups them."""
    if key.kind in (Kind.SAME_PHOTO, Kind.SAME_PHOTO_TWO_NAMES):
        return tuple((number,) for number in key.face_ids)
    return (key.face_ids,) if key.face_ids else ()


def _require_subjects(gallery: Gallery, reader: Reader, key: DoubtKey) -> None:
    """Checks that the faces and identities of a doubt are in the gallery.

    Raises:
        NotFound: one is not.
    """
    faces, people = reader.faces(key.face_ids), reader.names_of_identities(key.identity_ids)
    for number in key.face_ids:
        if number not in faces:
            raise NotFound(f"There is no face {number} in {gallery.name}, which {key} is about.")
    for number in key.identity_ids:
        if number not in people:
            raise NotFound(f"There is no person {number} in {gallery.name}, which {key} is about.")


def _require(reader: Reader, number: str) -> StoredDoubt:
    """Returns a stored doubt.

    Raises:
        NotFound: there is none with this id.
    """
    stored = reader.doubts([number]).get(number)
    if stored is None:
        raise NotFound(f"There is no doubt {number[:80]!a}; a later audit did not find it, or it was erased.")
    return stored


# Acts


def _do(gallery: Gallery, writer: Writer, act: ProposedAct) -> int | None:
    """Does what a doubt proposes; returns the id of the merge, if it is one."""
    if act.identity_id is not None:
        return merges.merge_in(gallery.vault, writer, act.identity_id, act.into_id).id
    name = writer.names_of_identities([act.into_id])[act.into_id]
    identities.assign_in(gallery.vault, writer, act.face_ids, name)
    return None


def _undo(gallery: Gallery, writer: Writer, stored: StoredDoubt) -> None:
    """Undoes what the confirmation of a doubt did.

    Raises:
        InputError, NotFound: it cannot be undone any more.
    """
    act = proposed_act(stored.key, stored.measured or {})
    if stored.merge_id is not None:
        merges.undo_in(gallery.vault, writer, stored.merge_id)
    elif act is not None and act.does == "assign":
        person = stored.key.identity_ids[0]
        owners, names = writer.identities_of_faces(act.face_ids), writer.names_of_identities([person])
        if set(owners.values()) != {act.into_id} or person not in names:
            raise InputError(
                f"The faces of the doubt {stored.key} were given to others since, or the person that they "
                "belonged to is gone; give them a name with `faceprint assign-identity`."
            )
        identities.assign_in(gallery.vault, writer, act.face_ids, names[person])


# Showing


def _listed(reader: Reader) -> Iterator[tuple[DoubtState, int | None, str]]:
    """Yields state, place and id of each doubt, without open ones that are no longer true."""
    fallen = reader.fallen_doubts()
    for state, place, number in reader.doubt_order():
        if not (state is DoubtState.OPEN and number in fallen):
            yield state, place, number


def _position(state: DoubtState, place: int | None, number: str) -> str:
    """Returns a text that sorts as the list of doubts does."""
    return f"{_RANKS[state]} {_LAST if place is None else place:010d} {number}"


def _shown(reader: Reader, folder: str, stored: Sequence[StoredDoubt]) -> Iterator[Doubt]:
    """Yields stored doubts with their sentences, and the names of today."""
    faces = reader.faces({number for one in stored for group in one.groups for number in group})
    names = reader.names_of_identities({number for one in stored for number in one.key.identity_ids})
    for one in stored:
        groups = tuple(tuple(faces[number] for number in group) for group in one.groups)
        people = [names.get(number) for number in one.key.identity_ids]
        yield _sentenced(one, tuple(name for name in people if name is not None), groups, folder)


def _sentenced(
    one: StoredDoubt, names: tuple[str, ...], groups: tuple[tuple[Face, ...], ...], folder: str
) -> Doubt:
    """Returns a stored doubt; without measurements, or with a merged identity, it has only a heading."""
    kind = Kind(one.key.kind)
    decided: dict[str, Any] = {"key": one.key, "state": one.state, "decided_at": one.decided_at}
    if one.measured is None or len(names) < len(one.key.identity_ids):
        says = f"{HEADINGS[kind]}."
        return Doubt(kind, one.score or 0.0, names, groups, one.measured or {}, says, "", **decided)
    return doubt(kind, one.score or 0.0, names, groups, one.measured, folder, **decided)
