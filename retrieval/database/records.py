"""Records: what a gallery's tables hold, as frozen values; a field is called as its column is."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final, TypeVar, get_type_hints

from retrieval.database.metadata import Metadata
from retrieval.errors import GalleryDamaged
from retrieval.rates import Rate, Upcoming
from retrieval.system.archive_paths import first_present
from retrieval.system.files import Stamp

RESTORE: Final = "restore it from a backup"

# What is a file's name, or a folder's, because a database says so: never anything that leads elsewhere.
MODEL_FOLDER: Final = re.compile(r"model(-[0-9]+)?")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Face:
    """A stored photo.

    Attributes:
        id: the vector's id too; never used again.
        identity: the name of the person on it; None where it is not known.
        paths: the files that have its bytes, in the order in which they became known; none for bytes or
            arrays given by a library call. In the answer to a search below some paths, those that are there
            come first.
        sha256: of the file's bytes, in hex.
        enrolled_at: ISO 8601, UTC.
        metadata: a JSON object given by the user; empty where none was given.
        meant: in such an answer, how many of its paths are those; 0 where none was asked for.
    """

    id: int
    identity: str | None
    paths: tuple[str, ...]
    sha256: str
    enrolled_at: str
    metadata: Metadata = field(default_factory=dict, hash=False)
    meant: int = field(default=0, compare=False, repr=False)

    @property
    def path(self) -> str | None:
        """One of its files, to show: the first that exists where there are several (see `first_present`).

        Of those that a search was for, where it was for some; so it may be one that is gone.
        """
        return first_present(self.paths[: self.meant] or self.paths)


@dataclass(frozen=True, slots=True)
class NewFace:
    """A photo about to be stored: identity, path, the SHA-256 of its bytes in hex, and metadata.

    `stamp` is what its file was when it was read; None where that says nothing about it later. `host` is from
    where the photo was fetched, as `paths.host_of` spells it; None for a photo that faceprint did not fetch.
    """

    identity: str | None
    path: str | None
    sha256: str
    metadata: Metadata = field(default_factory=dict, hash=False)
    stamp: Stamp | None = None
    host: str | None = None


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A known path: its face with identity and metadata, and the stamp of the file when it was read."""

    face_id: int
    identity: str | None
    metadata: Metadata = field(hash=False)
    stamp: Stamp | None


@dataclass(frozen=True, slots=True)
class Segment:
    """An immutable file of vectors of one generation; its id is its name, `sha256` in hex."""

    id: int
    rows: int
    bytes: int
    sha256: str
    generation_id: int

    def __post_init__(self) -> None:
        check_name(_SHA256, self.sha256)


@dataclass(frozen=True, slots=True)
class Generation:
    """A model and its vectors.

    Attributes:
        id: never used again.
        fingerprint: of the model.
        dimension: of its embeddings.
        folder: the name of the model's folder in the gallery.
        card_sha256: of the model's card in that folder, in hex.
        created_at: ISO 8601, UTC.
        checked_before: faces with lower ids were compared with their photos, or are suspects (see
            `Reader.suspects`); None where none was compared.
    """

    id: int
    fingerprint: str
    dimension: int
    folder: str
    card_sha256: str
    created_at: str
    checked_before: int | None = None

    def __post_init__(self) -> None:
        check_name(MODEL_FOLDER, self.folder)
        if self.card_sha256:  # of the first version's galleries that had lost their card it is empty
            check_name(_SHA256, self.card_sha256)


@dataclass(frozen=True, slots=True)
class BasisRow:
    """What was learned from a generation's vectors.

    Attributes:
        id: the name of its file; never used again.
        generation_id: of the vectors that it was learned from.
        rows: how many vectors there were.
        coordinates: bytes of a code; 0 where codes would not make searches cheaper, and there is no file.
        bytes, sha256: of the file.
        learned_at: ISO 8601, UTC.
        detail: what was measured.
    """

    id: int
    generation_id: int
    rows: int
    coordinates: int
    bytes: int
    sha256: str
    learned_at: str
    detail: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CodesRow:
    """A file of codes: of a segment, in a basis; `sha256` in hex, `error` bounds that of every code."""

    segment_id: int
    basis_id: int
    bytes: int
    sha256: str
    error: float


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """A threshold, and what to expect of it.

    Attributes:
        fpir: the target: the share of non-mated searches that may return an identity.
        threshold: Euclidean distance; a search whose nearest face is farther returns no identity.
        seen: the share of the non-mated searches of the calibration that returned an identity.
        missed: FNIR, the share of enrolled faces that did not return their own identity when searched for
            among all others; of no trial where no identity has two faces.
        upcoming: how many of as many further non-mated searches may return an identity; None where an older
            version calibrated, which did not say.
    """

    fpir: float
    threshold: float
    seen: Rate
    missed: Rate
    upcoming: Upcoming | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was found out about the distances of a gallery, at the size and with the model that it had.

    Attributes:
        generation: the id of the generation. As an export and `--json` call it, not as its column.
        fingerprint: of the model.
        found_at: ISO 8601, UTC.
        strangers: where the non-mated probes came from: "photos" of people who were not enrolled, or
            "gallery": the enrolled, each without the faces of their own identity.
        faces, identities: how many the gallery had.
        searches: how many non-mated searches there were.
        people: how many different people those were of; 0 where that was not given.
        trained: of these people, how many the model was trained on.
        fpir: what was asked for; searches go by it unless they ask for another.
        points: by falling `fpir`.
    """

    generation: int
    fingerprint: str
    found_at: str
    strangers: str
    faces: int
    identities: int
    searches: int
    people: int
    trained: int
    fpir: float
    points: tuple[OperatingPoint, ...]

    def point(self, fpir: float | None = None) -> OperatingPoint | None:
        """The operating point of a rate, or the one that was asked for; None where there is none."""
        wanted = self.fpir if fpir is None else fpir
        return next((one for one in self.points if math.isclose(one.fpir, wanted, rel_tol=1e-9)), None)

    def fields(self) -> dict[str, Any]:
        """As JSON can say it; what could not be measured is None."""
        return {**asdict(self), "points": [_point_fields(point) for point in self.points]}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Calibration":
        """What `fields` gave."""
        return cls(**{**fields, "points": tuple(map(_point_of, fields["points"]))})


def _point_fields(point: OperatingPoint) -> dict[str, Any]:
    rates = {name: asdict(getattr(point, name)) for name in ("seen", "missed")}
    for rate in rates.values():
        rate["value"] = rate["value"] if rate["n"] else None
    upcoming = None if point.upcoming is None else asdict(point.upcoming)
    return {"fpir": point.fpir, "threshold": point.threshold, **rates, "upcoming": upcoming}


def _point_of(fields: Mapping[str, Any]) -> OperatingPoint:
    rates = {
        name: Rate(**{**fields[name], "value": fields[name]["value"] if fields[name]["n"] else math.nan})
        for name in ("seen", "missed")
    }
    upcoming = fields.get("upcoming")
    upcoming = None if upcoming is None else Upcoming(**upcoming)
    return OperatingPoint(fields["fpir"], fields["threshold"], **rates, upcoming=upcoming)


@dataclass(frozen=True, slots=True)
class GalleryRow:
    """What a gallery knows of itself."""

    uuid: str
    created_at: str
    next_face_id: int
    next_segment_id: int
    generation_id: int
    revision: int
    next_identity_id: int
    next_generation_id: int
    unfinished: str | None
    next_basis_id: int
    folder_id: str | None


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof of an erasure, with nothing in it about the person.

    Attributes:
        id: a UUID.
        gallery: the gallery's UUID.
        at: ISO 8601, UTC.
        who: the user of the operating system who asked for it.
        what: "identity", "face" or "path".
        faces: how many were removed.
        face_ids, identity_ids: the numbers that a restored backup must not bring back.
    """

    id: str
    gallery: str
    at: str
    who: str
    what: str
    faces: int
    face_ids: tuple[int, ...]
    identity_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """Something that was done to a gallery.

    Attributes:
        began_at, ended_at: ISO 8601, UTC; many small enrollments of one caller are one entry.
        who: the user of the operating system.
        via: the command, or "library".
        action: "enroll", "forget", "compact", ...
        faces: how many it concerned.
        detail: numbers; never a name, a path or an embedding.
    """

    began_at: str
    ended_at: str
    who: str
    via: str
    action: str
    faces: int
    detail: dict[str, Any]


def check_name(known: re.Pattern[str], name: object) -> None:
    """Checks a name of a file or a folder that a database states.

    Raises:
        GalleryDamaged: faceprint never writes such a name.
    """
    if not isinstance(name, str) or not known.fullmatch(name):
        raise GalleryDamaged(
            f"The gallery's database names a file {str(name)[:80]!r}, as faceprint never does; "
            "restore it from a backup that you trust."
        )


def utc_now() -> str:
    """ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


_Row = TypeVar("_Row")


def checked(row: _Row) -> _Row:
    """A row whose values have the types of its fields, which SQLite does not ensure; none is negative."""
    for name, kinds in _kinds(type(row)).items():  # type: ignore[arg-type]
        value = getattr(row, name)
        if not isinstance(value, kinds) or (isinstance(value, int) and value < 0 and name != "revision"):
            raise GalleryDamaged(
                f"The gallery's database has {value!r:.40} as {name} of a {type(row).__name__}; {RESTORE}."
            )
    return row


@cache
def _kinds(kind: type[Any]) -> dict[str, tuple[type, ...]]:
    """What each field may be, of those that are plain values."""
    plain: dict[Any, tuple[type, ...]] = {
        int: (int,),
        str: (str,),
        float: (float, int),
        int | None: (int, type(None)),
        str | None: (str, type(None)),
        dict[str, Any]: (dict,),
    }
    hints = get_type_hints(kind)
    return {name: plain[hint] for name, hint in hints.items() if hint in plain}
