"""Moved and relabelled photos, for `Gallery`: updates the paths and identities of stored faces.

`retrieval.gallery.survey` reads the disk first. A plan is then derived from the survey and written in one
transaction. The plan depends on the sources as a whole, never on the order in which they are read.
"""

import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field

from retrieval.database.reader import Reader
from retrieval.database.records import Face, StoredPhoto
from retrieval.database.writer import Writer
from retrieval.gallery import identities, sync
from retrieval.gallery.survey import Survey, moved_files, other_names
from retrieval.gallery.sync import Kept, Missing, Renamed, Unseen
from retrieval.sources.exclusion import PassedOver
from retrieval.sources.photos import Photo, scan
from retrieval.storage.any_vault import AnyVault
from retrieval.system.paths import absolute


@dataclass(frozen=True, slots=True)
class Relabelled:
    """The result of `ingest --relabel`.

    Attributes:
        faces: faces with a new identity, in their state before the change.
        identities: the new identity of each of these faces, in the same order.
        renamed: identities for which all photos have the same new name.
        kept: unchanged faces: the sources give contradicting identities.
    """

    faces: tuple[Face, ...]
    identities: tuple[str, ...]
    renamed: tuple[Renamed, ...]
    kept: tuple[Kept, ...]


@dataclass
class _Plan:
    """The changes that follow from a survey.

    Attributes:
        people: new name by current name, of identities for which all photos have the same new name.
        names: new identities of single faces, by face id.
        give: photo id by path, of paths to add; a path may belong to another photo, or to none, until then.
        drop: paths to remove from their photos.
        moved: faces that keep their vector and get the paths where their bytes are now.
        gone: faces to remove.
        kept: unchanged faces: the sources contradict the gallery.
        held: unchanged faces that would be removed if all sources had been readable and searched.
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
    vault: AnyVault,
    sources: Iterable[str | os.PathLike[str]],
    offered: Iterable[Photo] | None,
    *,
    passed_over: PassedOver | None = None,
    gone: Iterable[str | os.PathLike[str]] = (),
    relabelled_by: Iterable[Photo] | None = None,
) -> Missing:
    """Returns what `remove_missing` would do; changes nothing. See `Gallery.missing_files`."""
    names = None if relabelled_by is None else other_names(vault.store, relabelled_by)
    survey = _survey(vault, sources, offered, passed_over, gone)
    with vault.store.read() if names is None else _tried_relabelling(vault, names) as reader:
        plan = _plan_moved_files(reader, survey)
        return _missing(plan, survey, identities.planned(reader, plan.people))


@contextmanager
def _tried_relabelling(vault: AnyVault, names: Survey) -> Iterator[Reader]:
    """Yields the tables as they would be after `relabel`."""
    with vault.trying() as writer:
        _relabel(vault, writer, names)
        yield writer


def remove_missing(
    vault: AnyVault,
    sources: Iterable[str | os.PathLike[str]],
    offered: Iterable[Photo] | None,
    *,
    passed_over: PassedOver | None = None,
    gone: Iterable[str | os.PathLike[str]] = (),
) -> Missing:
    """Updates the paths of moved photos and removes faces without files; see `Gallery.remove_missing`."""
    survey = _survey(vault, sources, offered, passed_over, gone)
    with vault.writing() as writer:
        plan = _plan_moved_files(writer, survey)
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


def _survey(
    vault: AnyVault,
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


def find_relabelled(vault: AnyVault, offered: Iterable[Photo]) -> Relabelled:
    """Returns what `relabel` would do; changes nothing."""
    survey = other_names(vault.store, offered)
    with vault.store.read() as reader:
        plan, changed = _plan_other_names(reader, survey)
        return _relabelled(plan, changed, identities.planned(reader, plan.people))


def relabel(vault: AnyVault, offered: Iterable[Photo]) -> Relabelled:
    """Changes identities of stored photos to those that sources name; see `Gallery.relabel`."""
    survey = other_names(vault.store, offered)
    with vault.writing() as writer:
        done = _relabel(vault, writer, survey)
        if done.faces:
            counts = {"renamed": len(done.renamed), "kept": len(done.kept)}
            vault.log(writer, "relabel", faces=len(done.faces), **counts)
    return done


def _relabel(vault: AnyVault, writer: Writer, survey: Survey) -> Relabelled:
    plan, changed = _plan_other_names(writer, survey)
    renamed = identities.rename_together(vault, writer, plan.people)
    for number, name in plan.names.items():
        writer.name_face(number, name)
    if plan.names:
        writer.remove_orphaned_identities()
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
    """Returns the places that may have the bytes of held faces, sorted by path."""
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


def _plan_moved_files(reader: Reader, survey: Survey) -> _Plan:
    """Plans the changes to photos with known files that are gone or have other bytes."""
    owners = reader.files(survey.gone | survey.seen.keys())
    photos = reader.photos(set(owners.values()))
    dead_paths = {
        path
        for path, number in owners.items()
        if path not in survey.seen or survey.seen[path].sha256 != photos[number].sha256
    }
    orphans = {
        number: photo
        for number, photo in photos.items()
        if photo.paths and dead_paths.issuperset(photo.paths)
    }
    named = _named_identities(reader, orphans.values(), survey)
    unenrollable = {n for n, photo in orphans.items() if n not in named and photo.sha256 in survey.rejected}
    leaving = orphans.keys() - named.keys() - unenrollable
    held = leaving if survey.unseen else {n for n in leaving if _is_passed_over(orphans[n], survey)}
    plan = _Plan(
        held=[face for number in sorted(held) for face in orphans[number].faces],
        people=_renamed_identities(
            reader,
            _named_faces(orphans, named),
            leaving={number for photo in leaving for number in orphans[photo].face_ids},
        ),
    )
    # The bytes exist at a path that cannot be enrolled: a user has to rename that path.
    for number in sorted(unenrollable):
        photo = orphans[number]
        plan.kept += [Kept(face, (survey.rejected[photo.sha256],), (None,)) for face in photo.faces]
    moved, kept = set[int](), unenrollable | held
    for number, names in named.items():
        photo = orphans[number]
        agreeing = _agreeing_paths(photo, plan.people, names)
        if agreeing:
            moved.add(number)
            plan.moved += photo.faces
            plan.give |= dict.fromkeys(agreeing, number)
        else:
            kept.add(number)
            plan.kept += [_kept(face, names) for face in photo.faces]
            # Other bytes took all paths of the photo: it gets the paths of its own bytes, so that a later
            # sync detects when these are gone.
            if survey.seen.keys() >= set(photo.paths):
                plan.give |= dict.fromkeys(names, number)
    for path in dead_paths:
        number, is_gone = owners[path], path not in survey.seen
        # An unchanged photo keeps its paths, except paths that have other bytes now.
        if number in moved or path in plan.give or is_gone != (number in kept):
            plan.drop.add(path)
    left = (photo for number, photo in photos.items() if number not in moved | kept)
    plan.gone += [
        face for photo in left if photo.paths and plan.drop.issuperset(photo.paths) for face in photo.faces
    ]
    return plan


def _is_passed_over(photo: StoredPhoto, survey: Survey) -> bool:
    """Returns whether the scan of the sources passed over a path of a photo."""
    return not survey.passed_over.keys().isdisjoint(photo.paths)


def _plan_other_names(reader: Reader, survey: Survey) -> tuple[_Plan, dict[int, tuple[Face, str]]]:
    """Returns the plan for faces with another identity in the sources; and each face and new name, by id."""
    found = reader.photos_by_sha256({seen.sha256 for seen in survey.seen.values()})
    photos = {photo.id: photo for photo in found.values()}
    named = _named_identities(reader, photos.values(), survey)
    plan, chosen = _Plan(), dict[int, tuple[Face, _Name]]()
    for number, names in named.items():
        photo, one = photos[number], _only_name(names)
        # A name does not say which of several faces it is of.
        if (
            one is None
            or number in survey.agreed
            or len(photo.faces) > 1
            or one.current in (None, photo.faces[0].identity)
        ):
            plan.kept += [_kept(face, names) for face in photo.faces]
        else:
            chosen[photo.faces[0].id] = photo.faces[0], one
    plan.people = _renamed_identities(reader, chosen.values())
    changed: dict[int, tuple[Face, str]] = {}
    for number, (face, name) in chosen.items():
        if face.identity in plan.people:
            changed[number] = (face, plan.people[face.identity])
        else:
            # A former name refers to its identity; if that identity is renamed too, its new name applies.
            new = plan.people.get(name.current, name.current) if name.is_former else name.current
            changed[number] = (face, new)
            plan.names[number] = new
    return plan, changed


@dataclass(frozen=True, slots=True)
class _Name:
    """An identity that a source names: its current name, and whether the source used a former one."""

    current: str
    is_former: bool


_Names = Mapping[str, _Name | None]


def _named_identities(reader: Reader, photos: Iterable[StoredPhoto], survey: Survey) -> dict[int, _Names]:
    """Returns what sources name at each path of a photo's bytes, by photo id; for photos that they have."""
    current = reader.current_names({one.identity for one in survey.seen.values() if one.identity is not None})
    by_digest = {photo.sha256: photo.id for photo in photos}
    found: dict[int, dict[str, _Name | None]] = defaultdict(dict)
    for path in sorted(survey.seen):
        one = survey.seen[path]
        number, name = by_digest.get(one.sha256), one.identity
        if number is not None:
            named = None if name is None else _Name(current.get(name, name), name in current)
            found[number][path] = named
    return dict(sorted(found.items()))


def _only_name(names: _Names) -> _Name | None:
    """Returns the one identity that the sources name; None if they name none, or several."""
    named = {one.current for one in names.values() if one is not None}
    if len(named) != 1:
        return None
    return _Name(named.pop(), any(one.is_former for one in names.values() if one is not None))


def _agreeing_paths(photo: StoredPhoto, people: Mapping[str, str], names: _Names) -> list[str]:
    """Returns the paths at which sources agree with a photo's identities, after `people` are renamed.

    These are paths with one of its identities or with none. For a photo of anonymous faces they are all
    paths, unless the sources name several identities.
    """
    known = {people.get(name, name) for name in photo.identities if name is not None}
    if not known:
        contradict = len({one.current for one in names.values() if one is not None}) > 1
        return [] if contradict else list(names)
    return [path for path, one in names.items() if one is None or one.current in known]


def _named_faces(photos: Mapping[int, StoredPhoto], named: Mapping[int, _Names]) -> list[tuple[Face, _Name]]:
    """Returns the photos of one face for which the sources name one identity, as that face with the name."""
    return [
        (photos[number].faces[0], one)
        for number, names in named.items()
        if len(photos[number].faces) == 1 and (one := _only_name(names)) is not None
    ]


def _renamed_identities(
    reader: Reader, chosen: Iterable[tuple[Face, _Name]], leaving: Set[int] = frozenset()
) -> dict[str, str]:
    """New name by current name, of identities for which all faces have the same new name.

    Faces in `leaving` do not count: the remaining faces of an identity can rename it after a deletion.
    """
    of_person: dict[str, dict[int, _Name]] = defaultdict(dict)
    for face, name in chosen:
        if face.identity is not None and name.current != face.identity:
            of_person[face.identity][face.id] = name
    people: dict[str, _Name] = {}
    for identity, names in of_person.items():
        named = {name.current for name in names.values()}
        others = set(reader.face_ids_of(identity)) - leaving - names.keys()
        # A face of a photo of several people never has a name from its folder, and takes the new one too.
        if len(named) == 1 and others == reader.in_shared_photos(others):
            people[identity] = _Name(named.pop(), any(name.is_former for name in names.values()))
    # A former name of an identity that is renamed too is ambiguous: such a change is left out.
    return {old: new.current for old, new in people.items() if not (new.is_former and new.current in people)}


def _kept(face: Face, names: _Names) -> Kept:
    return Kept(face, tuple(names), tuple(None if one is None else one.current for one in names.values()))
