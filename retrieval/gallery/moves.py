"""Moved and relabelled photos: the gallery follows files to new paths and new identities.

What is on disk is read first (`retrieval.gallery.survey`); what follows from it is decided and written in one
transaction, by what the sources hold as a whole and never by the order in which they are read.
"""

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field

from retrieval.database.reader import Reader
from retrieval.database.records import Face
from retrieval.gallery import identities, sync
from retrieval.gallery.survey import Survey, moved_files, other_names
from retrieval.gallery.sync import Kept, Missing, Renamed, Unseen
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.photos import Photo, scan
from retrieval.storage.vault import Vault
from retrieval.system.paths import absolute


@dataclass(frozen=True, slots=True)
class Relabelled:
    """What `ingest --relabel` changed.

    Attributes:
        faces: those that have another identity now, as they were.
        identities: theirs from now on, in the same order.
        renamed: people all of whose photos are under one other name now.
        kept: faces that sources name differently, so that nothing can be decided.
    """

    faces: tuple[Face, ...]
    identities: tuple[str, ...]
    renamed: tuple[Renamed, ...]
    kept: tuple[Kept, ...]


@dataclass
class _Plan:
    """What a survey comes to.

    Attributes:
        people: new names of people all of whose photos have one.
        names: new names of single faces, by id.
        give: faces of paths that lead to others, or to none, by path.
        drop: paths that no longer lead to their faces.
        moved, gone: faces that follow their bytes, and those that go.
        kept: faces about which the sources contradict the gallery.
        held: faces that would go if all of the sources could have been looked at.
    """

    people: dict[str, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    give: dict[str, int] = field(default_factory=dict)
    drop: set[str] = field(default_factory=set)
    moved: list[Face] = field(default_factory=list)
    gone: list[Face] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    held: list[Face] = field(default_factory=list)


def find_missing(
    vault: Vault,
    sources: Iterable[str | os.PathLike[str]],
    offered: Iterable[Photo] | None,
    *,
    passed_over: PassedOver | None = None,
    gone: Iterable[str | os.PathLike[str]] = (),
) -> Missing:
    """What `remove_missing` would do; see `Gallery.missing_files`."""
    survey = _surveyed(vault, sources, offered, passed_over, gone)
    with vault.store.read() as reader:
        plan = _of_moved_files(reader, survey)
        return _missing(plan, survey, identities.planned(reader, plan.people))


def remove_missing(
    vault: Vault,
    sources: Iterable[str | os.PathLike[str]],
    offered: Iterable[Photo] | None,
    *,
    passed_over: PassedOver | None = None,
    gone: Iterable[str | os.PathLike[str]] = (),
) -> Missing:
    """Follows what has moved and removes what is gone; see `Gallery.remove_missing`."""
    survey = _surveyed(vault, sources, offered, passed_over, gone)
    with vault.writing() as writer:
        plan = _of_moved_files(writer, survey)
        if not (plan.drop or plan.give or plan.people):
            return _missing(plan, survey, [])
        renamed = identities.rename_together(vault, writer, plan.people)
        done = _missing(plan, survey, renamed)
        writer.remove_files(plan.drop)
        stamps = {path: survey.seen[path].stamp for path in plan.give}
        writer.add_files(plan.give.items(), {path: one for path, one in stamps.items() if one is not None})
        vault.remove(writer, [face.id for face in plan.gone])
        vault.defer(writer, erase=True, labels={})
        counts = {"moved": len(plan.moved), "renamed": len(renamed), "kept": len(plan.kept)}
        vault.log(writer, "sync", faces=len(plan.gone), files=len(done.paths), **counts)
    return done


def _surveyed(
    vault: Vault,
    sources: Iterable[str | os.PathLike[str]],
    offered: Iterable[Photo] | None,
    passed_over: PassedOver | None,
    gone: Iterable[str | os.PathLike[str]],
) -> Survey:
    sources, gone = list(sources), list(gone)
    passed_over = PassedOver() if passed_over is None else passed_over
    offered = scan(sources, passed_over=passed_over) if offered is None else offered
    roots = sync.roots(sources, gone)
    absent = [absolute(folder) for folder in gone]
    return moved_files(vault.store, roots, offered, passed_over=passed_over, gone=absent)


def find_relabelled(vault: Vault, offered: Iterable[Photo]) -> Relabelled:
    """What `relabel` would do."""
    survey = other_names(vault.store, offered)
    with vault.store.read() as reader:
        plan, changed = _of_other_names(reader, survey)
        return _relabelled(plan, changed, identities.planned(reader, plan.people))


def relabel(vault: Vault, offered: Iterable[Photo]) -> Relabelled:
    """Lets stored photos have the identity that sources name; see `Gallery.relabel`."""
    survey = other_names(vault.store, offered)
    with vault.writing() as writer:
        plan, changed = _of_other_names(writer, survey)
        renamed = identities.rename_together(vault, writer, plan.people)
        for number, name in plan.names.items():
            writer.name_face(number, name)
        if plan.names:
            writer.remove_orphaned_identities()
        if changed:
            vault.log(writer, "relabel", faces=len(changed), renamed=len(renamed), kept=len(plan.kept))
    return _relabelled(plan, changed, renamed)


def _missing(plan: _Plan, survey: Survey, renamed: Collection[Renamed]) -> Missing:
    return Missing(
        paths=tuple(sorted(plan.drop & survey.gone)),
        faces=tuple(plan.gone),
        moved=tuple(plan.moved),
        renamed=tuple(renamed),
        kept=tuple(plan.kept),
        held=tuple(plan.held),
        unseen=_unseen(plan.held, survey),
    )


def _unseen(held: Collection[Face], survey: Survey) -> tuple[Unseen, ...]:
    """Where the bytes of faces that are held back may be."""
    if not held:
        return ()
    unseen = [Unseen(path, why) for path, why in survey.unseen.items()]
    rules = [(path, survey.passed_over.get(path)) for face in held for path in face.paths]
    passed = [Unseen(path, f"passed over by {rule}", rule) for path, rule in rules if rule is not None]
    return tuple(sorted([*unseen, *passed], key=lambda one: one.path))


def _relabelled(
    plan: _Plan, changed: Mapping[int, tuple[Face, str]], renamed: Collection[Renamed]
) -> Relabelled:
    faces, names = [face for face, _ in changed.values()], [name for _, name in changed.values()]
    return Relabelled(tuple(faces), tuple(names), tuple(renamed), tuple(plan.kept))


def _of_moved_files(reader: Reader, survey: Survey) -> _Plan:
    """What becomes of the faces whose known files are gone or have other bytes."""
    owners = reader.files(survey.gone | survey.seen.keys())
    faces = reader.faces(set(owners.values()))
    dead = {
        path
        for path, number in owners.items()
        if path not in survey.seen or survey.seen[path].sha256 != faces[number].sha256
    }
    orphans = {number: face for number, face in faces.items() if face.paths and dead.issuperset(face.paths)}
    said = _said(reader, orphans.values(), survey)
    chosen = {number: one for number, names in said.items() if (one := _one_name(names)) is not None}
    stuck = {n for n, face in orphans.items() if n not in said and face.sha256 in survey.rejected}
    leaving = orphans.keys() - said.keys() - stuck
    held = leaving if survey.unseen else {n for n in leaving if _is_passed_over(orphans[n], survey)}
    plan = _Plan(
        held=[orphans[number] for number in sorted(held)],
        people=_whole_people(reader, orphans, chosen, leaving=leaving),
    )
    # Their bytes are there, at a place that cannot be enrolled: somebody has to mend its name.
    for number in sorted(stuck):
        face = orphans[number]
        plan.kept.append(Kept(face, (survey.rejected[face.sha256],), (None,)))
    for number, names in said.items():
        face = orphans[number]
        agreed = _agreed(plan.people.get(face.identity or "", face.identity), names)
        if agreed:
            plan.moved.append(face)
            plan.give |= dict.fromkeys(agreed, number)
        else:
            plan.kept.append(_kept(face, names))
            # Other bytes took all of its paths: it gets those of its own, so that a sync sees when they go.
            if survey.seen.keys() >= set(face.paths):
                plan.give |= dict.fromkeys(names, number)
    moved, kept = {face.id for face in plan.moved}, {one.face.id for one in plan.kept} | held
    for path in dead:
        number, is_gone = owners[path], path not in survey.seen
        # Of a face that stays as it is, paths stay too, but for those that have other bytes by now.
        if number in moved or path in plan.give or is_gone != (number in kept):
            plan.drop.add(path)
    left = (face for number, face in faces.items() if number not in moved | kept)
    plan.gone += [face for face in left if face.paths and plan.drop.issuperset(face.paths)]
    return plan


def _is_passed_over(face: Face, survey: Survey) -> bool:
    """Whether a missing path of a face lies in a place that was not searched."""
    return not survey.passed_over.keys().isdisjoint(face.paths)


def _of_other_names(reader: Reader, survey: Survey) -> tuple[_Plan, dict[int, tuple[Face, str]]]:
    """New names of faces that the sources call differently, and these faces with the names, by id."""
    found = reader.faces_by_sha256({seen.sha256 for seen in survey.seen.values()})
    faces = {face.id: face for face in found.values()}
    said = _said(reader, faces.values(), survey)
    plan, chosen = _Plan(), dict[int, _Name]()
    for number, names in said.items():
        one = _one_name(names)
        if one is None or number in survey.agreed or one.today in (None, faces[number].identity):
            plan.kept.append(_kept(faces[number], names))
        else:
            chosen[number] = one
    plan.people = _whole_people(reader, faces, chosen)
    changed: dict[int, tuple[Face, str]] = {}
    for number, name in chosen.items():
        face = faces[number]
        if face.identity in plan.people:
            changed[number] = (face, plan.people[face.identity])
        else:
            # A former name means its person, whatever that one is called from now on.
            new = plan.people.get(name.today, name.today) if name.is_former else name.today
            changed[number] = (face, new)
            plan.names[number] = new
    return plan, changed


@dataclass(frozen=True, slots=True)
class _Name:
    """Whom a source names: by today's name, whether it gave a former one, and where."""

    today: str
    is_former: bool


_Names = Mapping[str, _Name | None]


def _said(reader: Reader, faces: Iterable[Face], survey: Survey) -> dict[int, _Names]:
    """Whom the sources name on each face, by the places of its bytes; faces that were not seen are absent."""
    today = reader.current_names({one.identity for one in survey.seen.values() if one.identity is not None})
    by_digest = {face.sha256: face.id for face in faces}
    found: dict[int, dict[str, _Name | None]] = defaultdict(dict)
    for path in sorted(survey.seen):
        one = survey.seen[path]
        number, name = by_digest.get(one.sha256), one.identity
        if number is not None:
            named = None if name is None else _Name(today.get(name, name), name in today)
            found[number][path] = named
    return dict(sorted(found.items()))


def _one_name(names: _Names) -> _Name | None:
    """The only name that is said; None where there is none, or several."""
    said = {one.today for one in names.values() if one is not None}
    if len(said) != 1:
        return None
    return _Name(said.pop(), any(one.is_former for one in names.values() if one is not None))


def _agreed(name: str | None, names: _Names) -> list[str]:
    """The places that say of a face what its gallery says; of one that nobody named, any if they agree."""
    if name is None:
        several = len({one.today for one in names.values() if one is not None}) > 1
        return [] if several else list(names)
    return [path for path, one in names.items() if one is None or one.today == name]


def _whole_people(
    reader: Reader,
    faces: Mapping[int, Face],
    chosen: Mapping[int, _Name],
    leaving: Set[int] = frozenset(),
) -> dict[str, str]:
    """New names of the people all of whose faces have one and the same, other than today's.

    Faces that are `leaving` have no say: what is left of a person after a deletion may be renamed.
    """
    of_person: dict[str, set[int]] = defaultdict(set)
    for number, name in chosen.items():
        identity = faces[number].identity
        if identity is not None and name.today != identity:
            of_person[identity].add(number)
    people: dict[str, _Name] = {}
    for identity, numbers in of_person.items():
        said = {chosen[number].today for number in numbers}
        if len(said) == 1 and numbers.issuperset(set(reader.face_ids_of(identity)) - leaving):
            people[identity] = _Name(said.pop(), any(chosen[number].is_former for number in numbers))
    # Whoever is called by a former name of somebody who is renamed as well is not told apart from that one.
    return {old: new.today for old, new in people.items() if not (new.is_former and new.today in people)}


def _kept(face: Face, names: _Names) -> Kept:
    return Kept(face, tuple(names), tuple(None if one is None else one.today for one in names.values()))
