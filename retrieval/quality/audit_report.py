"""The report of an audit: as sentences, as JSON, and as an HTML page with the photos side by side."""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Any, Final, TypeAlias

from retrieval.database.records import DoubtKey, DoubtState, Face
from retrieval.images.photo_reader import PhotoReader
from retrieval.quality.photo_page import Group, Item, Picture, Section, Table, sheet
from retrieval.sources.remote import NOTHING_FETCHED, Fetching


class Kind(StrEnum):
    """The kind of a doubt. The values are stable: programs may rely on them."""

    SAME_PHOTO_TWO_NAMES = "same-photo-two-names"
    ANOTHERS_PHOTO = "anothers-photo"
    TWO_LIKE_ONE = "two-like-one"
    ONE_LIKE_TWO = "one-like-two"
    SAME_PHOTO = "same-photo"
    HUB = "hub"
    SMALL_FACE = "small-face"
    BLURRED_FACE = "blurred-face"
    TURNED_FACE = "turned-face"


@dataclass(frozen=True, slots=True)
class Limit:
    """The usual value of one kind in this gallery, and the value from which it is a doubt.

    Attributes:
        kind: the kind of the doubts.
        measures: what is measured, in words.
        values: the number of faces or identities measured.
        median: the usual value; NaN where there are too few values.
        limit: the value beyond which it is a doubt; NaN where there are too few values.
        found: the number of doubts, without those that others explain; at most 500 are returned.
    """

    kind: Kind
    measures: str
    values: int
    median: float
    limit: float
    found: int


@dataclass(frozen=True, slots=True)
class Doubt:
    """A finding of an audit that a person should review.

    Attributes:
        kind: the kind of the doubt.
        score: the robust standard deviations from the usual value, at least the limit; higher is worse.
        identities: the names it is about.
        groups: the photos that show it, side by side: the doubtful ones first.
        measured: distances (Euclidean) and counts, by name.
        says: what was found, in a sentence.
        next: what to do if it is true.
        key: the faces and identities that it is about, by their ids; its text is the id of the doubt.
        state: what was decided about it.
        decided_at: ISO 8601, UTC; None for an open one.
    """

    kind: Kind
    score: float
    identities: tuple[str, ...]
    groups: tuple[tuple[Face, ...], ...]
    measured: Mapping[str, float] = field(hash=False)
    says: str
    next: str
    key: DoubtKey
    state: DoubtState = DoubtState.OPEN
    decided_at: str | None = None

    @property
    def id(self) -> str:
        """The id of the doubt, such as `anothers-photo.f12.p3.p5`: the same in every audit that finds it."""
        return str(self.key)

    @property
    def distance(self) -> float | None:
        """The distance that was doubted: of two faces, a face from another person, or two centroids."""
        known = (self.measured.get(name) for name in ("distance", "other", "centroids"))
        return next((value for value in known if value is not None), None)

    @property
    def act(self) -> "ProposedAct | None":
        """What a confirmation does; None where there is more than one thing to do, or nothing."""
        return proposed_act(self.key, self.measured)


@dataclass(frozen=True, slots=True)
class ProposedAct:
    """The one change that settles a doubt.

    Attributes:
        does: "assign" gives the faces to the identity `into_id`; "merge" merges `identity_id` into it.
        into_id: the id of that identity.
        face_ids: of the faces to assign.
        identity_id: the id of the identity to merge.
    """

    does: str
    into_id: int
    face_ids: tuple[int, ...] = ()
    identity_id: int | None = None


def proposed_act(key: DoubtKey, measured: Mapping[str, float]) -> ProposedAct | None:
    """Returns what a confirmation of a doubt does; None where it only records the decision."""
    if key.kind == Kind.ANOTHERS_PHOTO:
        return ProposedAct("assign", key.identity_ids[1], face_ids=key.face_ids)
    if key.kind == Kind.TWO_LIKE_ONE and "photos" in measured:
        one, other = key.identity_ids
        few, many = (one, other) if measured["photos"] < measured["other_photos"] else (other, one)
        return ProposedAct("merge", many, identity_id=few)
    return None


def doubt_key(kind: Kind, groups: Sequence[Sequence[int]], identity_ids: Sequence[int]) -> DoubtKey:
    """Returns what a doubt is about: its doubted faces among those that show it, and its identities."""
    doubted = {Kind.TWO_LIKE_ONE: 0, Kind.SAME_PHOTO: 2, Kind.SAME_PHOTO_TWO_NAMES: 2}.get(kind, 1)
    faces = tuple(number for group in groups[:doubted] for number in group)
    return DoubtKey(kind.value, faces, tuple(identity_ids))


def is_complete(key: DoubtKey) -> bool:
    """Returns whether a key has as many faces and identities as a doubt of its kind; ValueError: no kind."""
    faces, people = _SUBJECTS[Kind(key.kind)]
    return len(key.face_ids) in faces and len(key.identity_ids) in people


# How many doubted faces, and how many identities, a doubt is about.
_SUBJECTS: Final[Mapping[Kind, tuple[range, range]]] = {
    Kind.SAME_PHOTO_TWO_NAMES: (range(2, 3), range(2, 3)),
    Kind.ANOTHERS_PHOTO: (range(1, 2), range(2, 3)),
    Kind.TWO_LIKE_ONE: (range(1), range(2, 3)),
    Kind.ONE_LIKE_TWO: (range(1, 100), range(2, 3)),
    Kind.SAME_PHOTO: (range(2, 3), range(2)),
    **dict.fromkeys(
        (Kind.HUB, Kind.SMALL_FACE, Kind.BLURRED_FACE, Kind.TURNED_FACE), (range(1, 2), range(2))
    ),
}


@dataclass(frozen=True)
class Audited:
    """The result of an audit of one snapshot.

    Attributes:
        folder: the folder of the gallery.
        faces, identities: the numbers of stored faces and of identities with faces.
        audited, people: the numbers of audited faces and identities.
        seed: the random seed of the sample; None where everything was audited.
        neighbours: the number of nearest faces that were searched for each face.
        skewness: of how often a face is among the nearest; far above 0, a few faces are close to everybody.
        limits: the usual values, by kind.
        doubts: the most serious first, near duplicates last; without those that were dismissed.
        dismissed: the doubts that were found again and were dismissed before, in the same order.
        gone: the number of doubts left out because their faces were removed during the audit.
    """

    folder: str
    faces: int
    identities: int
    audited: int
    people: int
    seed: int | None
    neighbours: int
    skewness: float
    limits: tuple[Limit, ...]
    doubts: tuple[Doubt, ...]
    gone: int
    dismissed: tuple[Doubt, ...] = ()

    def with_dismissed(self) -> "Audited":
        """Returns the result with the dismissed doubts among the others, by their scores."""
        every = [*self.doubts, *self.dismissed]
        every.sort(key=lambda one: (one.kind is Kind.SAME_PHOTO, -one.score))
        return replace(self, doubts=tuple(every), dismissed=())

    def summary(self) -> dict[str, Any]:
        """Returns the result as values for JSON; an unknown number is None."""
        return {
            "gallery": self.folder,
            "faces": self.faces,
            "identities": self.identities,
            "audited": {"faces": self.audited, "identities": self.people, "seed": self.seed},
            "neighbours": self.neighbours,
            "skewness": _finite(self.skewness),
            "limits": [_limit_json(limit) for limit in self.limits],
            "doubts": [_doubt_json(doubt) for doubt in self.doubts],
            "dismissed": [_doubt_json(doubt) for doubt in self.dismissed],
            "gone": self.gone,
        }


# Words


def doubt(
    kind: Kind,
    score: float,
    identities: tuple[str, ...],
    groups: tuple[tuple[Face, ...], ...],
    measured: Mapping[str, float],
    folder: str,
    *,
    key: DoubtKey,
    state: DoubtState = DoubtState.OPEN,
    decided_at: str | None = None,
) -> Doubt:
    """Returns a doubt about the gallery in `folder`, with its sentences; other arguments are attributes."""
    says, advice = _WORDS[kind](identities, groups, measured, shlex.quote(folder))
    return Doubt(kind, score, identities, groups, measured, says, advice, key, state, decided_at)


_Words: TypeAlias = Callable[
    [tuple[str, ...], tuple[tuple[Face, ...], ...], Mapping[str, float], str], tuple[str, str]
]


def _same_photo_words(
    names: tuple[str, ...], groups: tuple[tuple[Face, ...], ...], measured: Mapping[str, float], folder: str
) -> tuple[str, str]:
    (one,), (other,) = groups
    who = f"of {names[0]}" if names else "without an identity"
    says = f"Faces {one.id} and {other.id} {who} are {measured['distance']:.4g} apart."
    advice = (
        "It counts twice and does no harm; to have it once, delete the file of one and "
        f"{_forget(folder, other)}."
    )
    return says, advice


def _two_names_words(
    names: tuple[str, ...], groups: tuple[tuple[Face, ...], ...], measured: Mapping[str, float], folder: str
) -> tuple[str, str]:
    (one,), (other,) = groups
    says = (
        f"Face {one.id} of {one.identity} and face {other.id} of {other.identity} are "
        f"{measured['distance']:.4g} apart: the same photo, or nearly."
    )
    merge = _merge(folder, str(one.identity), str(other.identity))
    advice = (
        f"If they are one person: {merge}. If one name is wrong: "
        f"{_forget(folder, one)} or {_forget(folder, other)}, and take its file away."
    )
    return says, advice


def _anothers_words(
    names: tuple[str, ...], groups: tuple[tuple[Face, ...], ...], measured: Mapping[str, float], folder: str
) -> tuple[str, str]:
    ((face,), *_), (person, rival) = groups, names
    says = (
        f"Face {face.id} of {person} is {measured['own']:.4g} from the nearest of their other photos "
        f"({measured['own_centroid']:.4g} from the centroid of the {measured['photos'] - 1:,.0f}), "
        f"and {measured['other']:.4g} from {rival}."
    )
    return says, f"If it is not {person}: {_take_out(folder, [face])}."


def _two_like_one_words(
    names: tuple[str, ...], groups: tuple[tuple[Face, ...], ...], measured: Mapping[str, float], folder: str
) -> tuple[str, str]:
    one, other = names
    few, many = (one, other) if measured["photos"] < measured["other_photos"] else (other, one)
    says = (
        f"The centroids of {one} ({measured['photos']:,.0f} photos) and {other} "
        f"({measured['other_photos']:,.0f}) are {measured['centroids']:.4g} apart; so many photos of one "
        f"person would be {measured['by_chance']:.4g}, those of similar people {measured['usual']:.4g}."
    )
    return says, f"If they are one person: {_merge(folder, few, many)}."


def _one_like_two_words(
    names: tuple[str, ...], groups: tuple[tuple[Face, ...], ...], measured: Mapping[str, float], folder: str
) -> tuple[str, str]:
    person, rival = names
    says = (
        f"{measured['photos']:,.0f} photos of {person} are {measured['gap']:.4g} from the nearest of the "
        f"other {measured['other_photos']:,.0f}, and {measured['other']:.4g} from {rival}."
    )
    return says, f"If these are not {person}: {_take_out(folder, groups[0], more=measured['photos'])}."


def _hub_words(
    names: tuple[str, ...], groups: tuple[tuple[Face, ...], ...], measured: Mapping[str, float], folder: str
) -> tuple[str, str]:
    (face,) = groups[0]
    who = f"of {names[0]}" if names else "without an identity"
    says = (
        f"Face {face.id} {who} is among the nearest of "
        f"{measured['neighbour_of']:,.0f} faces of {measured['people']:,.0f} others."
    )
    advice = f"If the photo is blurred, dark or shows no face: {_take_out(folder, [face], rename=False)}."
    return says, advice


def _poor_words(
    what: str,
    names: tuple[str, ...],
    groups: tuple[tuple[Face, ...], ...],
    measured: Mapping[str, float],
    folder: str,
) -> tuple[str, str]:
    (face,) = groups[0]
    who = f"of {names[0]}" if names else "without an identity"
    says = f"Face {face.id} {who} has {what} {measured['value']:.3g}; {measured['usual']:.3g} is usual here."
    advice = f"If it is not good enough to tell people apart: {_take_out(folder, [face], rename=False)}."
    return says, advice


def _take_out(folder: str, some: Sequence[Face], *, more: float = 1, rename: bool = True) -> str:
    """Returns the instructions that remove photos from an identity."""
    forget = ", ".join(_forget(folder, face) for face in some)
    also = f" (and the others, {more:,.0f} in all)" if more > len(some) else ""
    where = ", move the file into the folder of who it is, and ingest that"
    if not rename:
        others = any(face.box is not None for face in some)
        where = " and delete the file" + (", unless it shows others too" if others else "")
    return f"{forget}{also}{where.replace('file', 'files') if more > 1 else where}"


def _forget(folder: str, face: Face) -> str:
    return f"`faceprint forget {folder} --face {face.id}`"


def _merge(folder: str, name: str, into: str) -> str:
    return f"`faceprint merge-identities {folder} {shlex.quote(name)} {shlex.quote(into)}`"


_WORDS: Final[Mapping[Kind, _Words]] = {
    Kind.SAME_PHOTO_TWO_NAMES: _two_names_words,
    Kind.ANOTHERS_PHOTO: _anothers_words,
    Kind.TWO_LIKE_ONE: _two_like_one_words,
    Kind.ONE_LIKE_TWO: _one_like_two_words,
    Kind.SAME_PHOTO: _same_photo_words,
    Kind.HUB: _hub_words,
    Kind.SMALL_FACE: partial(_poor_words, "a side in pixels of"),
    Kind.BLURRED_FACE: partial(_poor_words, "a sharpness of"),
    Kind.TURNED_FACE: partial(_poor_words, "a yaw of"),
}


# Pages and JSON


HEADINGS: Final[Mapping[Kind, str]] = {
    Kind.SAME_PHOTO_TWO_NAMES: "One photo under two names",
    Kind.ANOTHERS_PHOTO: "Photos unlike their person's others",
    Kind.TWO_LIKE_ONE: "Two people who look like one",
    Kind.ONE_LIKE_TWO: "One person who looks like two",
    Kind.SAME_PHOTO: "Near duplicates",
    Kind.HUB: "Photos that are close to everybody",
    Kind.SMALL_FACE: "Small faces",
    Kind.BLURRED_FACE: "Blurred faces",
    Kind.TURNED_FACE: "Faces turned to a side",
}

# The headings of the groups of photos of a doubt; without an entry, a group has the name of its identity.
_GROUP_NAMES: Final[Mapping[Kind, tuple[str, ...]]] = {
    Kind.ANOTHERS_PHOTO: ("doubted", "nearest of {0}", "nearest of {1}"),
    Kind.ONE_LIKE_TWO: ("these of {0}", "others of {0}", "nearest of {1}"),
    Kind.HUB: ("close to everybody", "among the nearest of these"),
    **dict.fromkeys((Kind.SMALL_FACE, Kind.BLURRED_FACE, Kind.TURNED_FACE), ("doubted",)),
}

# The most doubts of a kind on a page.
ON_A_PAGE: Final = 60


def page(audited: Audited, fetching: Fetching = NOTHING_FETCHED, reader: PhotoReader | None = None) -> bytes:
    """Returns one HTML file in UTF-8: the usual values, and at most 60 doubts of a kind with their photos.

    Photos are read from their stored paths; an unreadable one is a box with its name. Addresses are fetched
    only where `fetching` allows it; see `Gallery.fetching`. With a `reader` that has a face detector
    (`Gallery.photo_reader`), the embedded face is shown in place of the photo.
    """
    heads = ("doubt", "what is measured", "of", "usual", "doubted from", "found")
    table = Table(heads, [limit_row(limit) for limit in audited.limits], frozenset({2, 3, 4, 5}))
    sections = [_section(kind, audited) for kind in Kind]
    return sheet(
        f"Doubts about {audited.folder}",
        [
            scope(audited),
            "Nothing was changed. Each doubt is for a person to look at; the number beside it says how many "
            "robust standard deviations it is from what is usual here.",
        ],
        table,
        [section for section in sections if section.items],
        fetching,
        reader,
    )


def scope(audited: Audited) -> str:
    """Returns one to three sentences on what was audited."""
    every = audited.seed is None
    what = f"{audited.faces:,} faces of {audited.identities:,} people"
    drawn = f"{audited.audited:,} faces of {audited.people:,} people, drawn with seed {audited.seed}"
    which = f"All {what}" if every else f"A sample of {drawn}, of {what}"
    known = math.isfinite(audited.skewness)
    skew = f" Skewness of how often a face is among the {audited.neighbours} nearest: {audited.skewness:.2f}."
    gone = f" {audited.gone:,} doubts are about faces that were removed meanwhile." if audited.gone else ""
    return f"{which} {'were' if every else 'was'} compared with all.{skew if known else ''}{gone}"


def limit_row(limit: Limit) -> tuple[str, ...]:
    """Returns the cells of a table row: heading, measure, number of values, median, limit, number found."""
    said = [f"{number:.4g}" if math.isfinite(number) else "too few" for number in (limit.median, limit.limit)]
    return HEADINGS[limit.kind], limit.measures, f"{limit.values:,}", *said, f"{limit.found:,}"


def _section(kind: Kind, audited: Audited) -> Section:
    doubts = [doubt for doubt in audited.doubts if doubt.kind == kind]
    more = len(doubts) - ON_A_PAGE
    words = f"{len(doubts):,}, the most serious first." + (
        f" The first {ON_A_PAGE} are shown; the JSON output has all of them." if more > 0 else ""
    )
    return Section(HEADINGS[kind], words, [_item(doubt) for doubt in doubts[:ON_A_PAGE]])


def group_names(doubt: Doubt) -> list[str]:
    """Returns what each group of faces of a doubt is, such as "nearest of Kim"."""
    names = _GROUP_NAMES.get(doubt.kind)
    if names is None or len(doubt.identities) < len(doubt.key.identity_ids):
        return [(group[0].identity or "no identity") for group in doubt.groups]
    return [name.format(*doubt.identities) for name, _ in zip(names, doubt.groups, strict=False)]


def _item(doubt: Doubt) -> Item:
    groups = []
    for place, (named, group) in enumerate(zip(group_names(doubt), doubt.groups, strict=True)):
        pictures = [
            Picture(
                face.paths,
                face.sha256,
                f"face {face.id}, {face.identity or 'no identity'}",
                None if face.region is None else face.region.detected,
            )
            for face in group
        ]
        groups.append(Group(named, pictures, doubted=place == 0 and doubt.kind in _GROUP_NAMES))
    return Item(doubt.says, doubt.next, f"{doubt.score:.1f}", groups)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _limit_json(limit: Limit) -> dict[str, Any]:
    return {
        "kind": limit.kind,
        "measures": limit.measures,
        "values": limit.values,
        "median": _finite(limit.median),
        "limit": _finite(limit.limit),
        "found": limit.found,
    }


def _doubt_json(doubt: Doubt) -> dict[str, Any]:
    return {
        "id": doubt.id,
        "kind": doubt.kind,
        "state": doubt.state,
        "score": doubt.score,
        "identities": list(doubt.identities),
        "groups": [
            [{"face_id": face.id, "identity": face.identity, "path": face.path} for face in group]
            for group in doubt.groups
        ],
        "measured": dict(doubt.measured),
        "says": doubt.says,
        "next": doubt.next,
    }
