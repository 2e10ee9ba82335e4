"""Records: the rows of a gallery's tables as frozen dataclasses; fields have the names of their columns."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from typing import Any, Final, TypeVar, get_type_hints

from retrieval.database.metadata import Metadata
from retrieval.errors import GalleryDamaged
from retrieval.images.detection import DetectedFace
from retrieval.rates import Rate, Upcoming
from retrieval.system.archive_paths import first_present
from retrieval.system.files import Stamp

RESTORE: Final = "restore it from a backup"

# The valid names of files and folders in a database: never a path outside the gallery.
MODEL_FOLDER: Final = re.compile(r"model(-[0-9]+)?")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")

# The id of a doubt: its kind, then faces, then identities.
_DOUBT: Final = re.compile(r"[a-z]+(-[a-z]+)*(\.f[1-9][0-9]{0,17})*(\.p[1-9][0-9]{0,17})*", re.ASCII)

# The region of a picture that was embedded as it is.
_PICTURE: Final = "picture"

_LANDMARKS: Final = 5


@dataclass(frozen=True, slots=True)
class FaceRegion:
    """The part of a photo that a face was embedded from, by a model with a face detector.

    Attributes:
        detected: where the face is; None for a picture that was taken as it is.
        sharpness: of the pixels that were embedded, as of `FaceImage.sharpness`; None if not known.
    """

    detected: DetectedFace | None = None
    sharpness: float | None = None

    @property
    def box(self) -> str:
        """Returns what tells the faces of a photo apart: the numbers of the box as JSON, or "picture"."""
        return _PICTURE if self.detected is None else json.dumps(self.detected.box)

    def fields(self) -> dict[str, Any]:
        """Returns the columns of a region."""
        face = self.detected
        return {
            "box": self.box,
            "landmarks": None if face is None else json.dumps(face.landmarks),
            "score": None if face is None else face.score,
            "sharpness": self.sharpness,
            "yaw": None if face is None else face.yaw,
        }

    def as_json(self) -> str:
        """Returns the region as a JSON object, for files; `of_json` is the inverse."""
        face = self.detected
        return json.dumps(
            {
                "box": None if face is None else face.box,
                "landmarks": None if face is None else face.landmarks,
                "score": None if face is None else face.score,
                "sharpness": self.sharpness,
            }
        )

    @classmethod
    def of_json(cls, text: str) -> "FaceRegion":
        """Returns the region of a JSON object.

        Raises:
            ValueError: it is none.
        """
        fields = _loaded(text)
        names = ("box", "landmarks", "score", "sharpness")
        if not isinstance(fields, dict) or not fields.keys() >= set(names):
            raise ValueError(f"{text:.80} is no region of a face")
        return cls._of_values(*(fields[name] for name in names))

    @classmethod
    def of(
        cls, box: str, landmarks: str | None, score: float | None, sharpness: float | None
    ) -> "FaceRegion | None":
        """Returns the region of the columns of a face; None for a face without one.

        Raises:
            ValueError: no region has these columns.
        """
        if not box:
            return None
        sides = None if box == _PICTURE else _loaded(box)
        points = None if sides is None else _loaded(landmarks or "null")
        return cls._of_values(sides, points, score, sharpness)

    @classmethod
    def _of_values(cls, sides: Any, points: Any, score: Any, sharpness: Any) -> "FaceRegion":
        """Returns the region of lists of numbers; without a box, that of a picture taken as it is.

        Raises:
            ValueError: they are those of no region.
        """
        if not (sharpness is None or _are_numbers([sharpness], 1)):
            raise ValueError(f"{sharpness!r:.80} is no sharpness of a face")
        if sides is None:
            return cls(None, sharpness)
        if not (_are_numbers(sides, 4) and isinstance(points, list) and len(points) == _LANDMARKS):
            raise ValueError(f"{sides!r:.80} is no box of a face")
        if not all(_are_numbers(point, 2) for point in points) or not _are_numbers([score], 1):
            raise ValueError(f"{points!r:.80} are no landmarks of a face")
        left, top, width, height = map(float, sides)
        if not (width > 0 and height > 0 and math.isfinite(2 * (abs(left) + width) * (abs(top) + height))):
            raise ValueError(f"{sides!r:.80} is no box of a face")
        places = tuple((float(x), float(y)) for x, y in points)
        return cls(DetectedFace((left, top, width, height), places, float(score or 0)), sharpness)


def _loaded(text: str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: it is none, or too deep.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{text:.80} has too many levels") from error


def _are_numbers(values: object, count: int) -> bool:
    """Returns whether values are a list of so many numbers that are finite as float64."""
    return isinstance(values, list) and len(values) == count and all(map(_is_number, values))


def _is_number(value: object) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    except OverflowError:
        return False


@dataclass(frozen=True, slots=True)
class Face:
    """A stored face: a photo, or one of the faces in it.

    Attributes:
        id: also the id of its vector; never reused.
        identity: the name of the person; None for an anonymous face.
        paths: the files with the photo's bytes, in the order in which they were added; empty for bytes or
            arrays from a library call. In the result of a search with path prefixes, matching paths come
            first.
        sha256: of the photo's bytes, in hex; the same for all faces of a photo.
        enrolled_at: ISO 8601, UTC.
        metadata: a JSON object from the user; empty where none was given.
        meant: in such a result, the number of matching paths; 0 without path prefixes.
        region: the part of the photo that was embedded; None for a model without a face detector.
    """

    id: int
    identity: str | None
    paths: tuple[str, ...]
    sha256: str
    enrolled_at: str
    metadata: Metadata = field(default_factory=dict, hash=False)
    meant: int = field(default=0, compare=False, repr=False)
    region: FaceRegion | None = None

    @property
    def path(self) -> str | None:
        """The file to show: of several, the first that exists (see `first_present`).

        In the result of a search with path prefixes it is a matching one, which may no longer exist.
        """
        return first_present(self.paths[: self.meant] or self.paths)

    @property
    def box(self) -> tuple[float, float, float, float] | None:
        """Left, top, width and height of the face in the upright photo, in pixels; None if not known."""
        return None if self.region is None or self.region.detected is None else self.region.detected.box


@dataclass(frozen=True, slots=True)
class StoredPhoto:
    """A stored photo with its faces.

    Attributes:
        id: the id of the first face that was enrolled from it, which may have been removed since.
        faces: by id, one or more; all have the same `sha256` and `paths`.
        closed: whether one of its faces was removed, so that it gets no other face.
    """

    id: int
    faces: tuple[Face, ...]
    closed: bool = False

    @property
    def sha256(self) -> str:
        """Returns the SHA-256 of its bytes, in hex."""
        return self.faces[0].sha256

    @property
    def paths(self) -> tuple[str, ...]:
        """Returns the files with its bytes, in the order in which they were added."""
        return self.faces[0].paths

    @property
    def path(self) -> str | None:
        """Returns the file to show, as of `Face.path`."""
        return self.faces[0].path

    @property
    def face_ids(self) -> tuple[int, ...]:
        """Returns the ids of its faces, ascending."""
        return tuple(face.id for face in self.faces)

    @property
    def identities(self) -> frozenset[str | None]:
        """Returns the identities of its faces; None stands for faces without one."""
        return frozenset(face.identity for face in self.faces)


@dataclass(frozen=True, slots=True)
class Person:
    """An identity: its id, which is never reused, its name, and what is known of it.

    Attributes:
        id: the number of the identity.
        name: its current name.
        faces: how many faces it has.
        face_id: the id of its first face; None without a face.
        metadata: a JSON object from the user; empty where none was given.
    """

    id: int
    name: str
    faces: int
    face_id: int | None
    metadata: Metadata = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Merge:
    """A merge of two identities that can be undone, and what belonged to the merged one before.

    Attributes:
        id: the number of its entry in the audit log; never reused.
        merged_at: ISO 8601, UTC.
        identity_id: the id of the merged identity, which it has again after an undo.
        into_id: the id of the identity that it was merged into.
        name: the name of the merged identity.
        faces: how many faces moved.
        into: the name of the other identity; its last one, where that was merged too since.
        former_names: the former names of the merged identity.
        metadata: of the merged identity.
        filled: the keys of `metadata` that the other identity lacked, and got.
    """

    id: int
    merged_at: str
    identity_id: int
    into_id: int
    name: str
    faces: int
    into: str
    former_names: tuple[str, ...] = ()
    metadata: Metadata = field(default_factory=dict, hash=False)
    filled: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MergedLabel:
    """An output of a model that got another label by a merge.

    Attributes:
        fingerprint: of the model.
        output: the number of the output.
        photos: (part of the split, path below the folder) of each photo that moved to another folder.
    """

    fingerprint: str
    output: int
    photos: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Remains:
    """What of a merged identity still belongs to the identity that it was merged into.

    Attributes:
        owner: the id of that identity.
        face_ids: of the faces that moved.
        names: of its current and former names, those that are former names of the owner.
        keys: the filled keys of the metadata with unchanged values.
    """

    owner: int
    face_ids: tuple[int, ...]
    names: frozenset[str]
    keys: frozenset[str]


@dataclass(frozen=True, slots=True)
class DoubtKey:
    """What a doubt of an audit is about; while it is the same, it is the same doubt.

    The text is the id of the doubt, such as `anothers-photo.f12.p3.p5`: it has no names.

    Attributes:
        kind: the kind of the doubt.
        face_ids: the doubted faces; none where it is about whole identities.
        identity_ids: the identities that it is about.
    """

    kind: str
    face_ids: tuple[int, ...]
    identity_ids: tuple[int, ...]

    def __str__(self) -> str:
        faces, people = (f"f{number}" for number in self.face_ids), (f"p{n}" for n in self.identity_ids)
        return ".".join([self.kind, *faces, *people])

    @classmethod
    def of(cls, text: str) -> "DoubtKey":
        """Returns the key of a text.

        Raises:
            ValueError: it is no id of a doubt.
        """
        if not _DOUBT.fullmatch(text):
            raise ValueError(f"{text:.80} is no id of a doubt")
        kind, *tokens = text.split(".")
        numbers = {sign: tuple(int(one[1:]) for one in tokens if one[0] == sign) for sign in "fp"}
        return cls(kind, numbers["f"], numbers["p"])


class DoubtState(StrEnum):
    """What was decided about a doubt. The values are stable."""

    OPEN = "open"
    DISMISSED = "dismissed"
    CONFIRMED = "confirmed"


@dataclass(frozen=True, slots=True)
class StoredDoubt:
    """A doubt of the last audit that was kept, or one that was decided about.

    Attributes:
        key: what it is about.
        state: what was decided.
        groups: the ids of the faces that show it, side by side.
        place: its number in the last audit; None where that did not find it.
        score, measured: as of `quality.audit_report.Doubt`; None where it was dismissed without an audit.
        decided_at: ISO 8601, UTC; None for an open one.
        merge_id: the merge that confirmed it.
        stands: whether the doubted faces are still of the same identities, and these exist.
    """

    key: DoubtKey
    state: DoubtState
    groups: tuple[tuple[int, ...], ...]
    place: int | None = None
    score: float | None = None
    measured: Mapping[str, float] | None = field(default=None, hash=False)
    decided_at: str | None = None
    merge_id: int | None = None
    stands: bool = True


@dataclass(frozen=True, slots=True)
class NewFace:
    """A face to store: identity, path, the SHA-256 of its photo's bytes in hex, and metadata.

    `stamp` is the stamp of its file when it was read; None where a later change might not show. `host` is the
    host that the photo was fetched from, in the form of `paths.host_of`; None for a photo that faceprint did
    not fetch. `region` is as of `Face`: several faces of one photo have different regions.
    """

    identity: str | None
    path: str | None
    sha256: str
    metadata: Metadata = field(default_factory=dict, hash=False)
    stamp: Stamp | None = None
    host: str | None = None
    region: FaceRegion | None = None


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A known path: its photo, and the stamp of the file when it was read.

    `face_ids`, `identities` and `metadata` are of the faces of the photo, by face id.
    """

    photo_id: int
    face_ids: tuple[int, ...]
    identities: tuple[str | None, ...]
    metadata: tuple[Metadata, ...] = field(hash=False)
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
    """A generation: a model and its vectors.

    Attributes:
        id: never reused.
        fingerprint: of the model.
        dimension: of its embeddings.
        folder: the name of the model's folder in the gallery.
        card_sha256: of the model's card in that folder, in hex.
        created_at: ISO 8601, UTC.
        checked_before: faces with lower ids were compared with their photos, or are suspects (see
            `Reader.suspects`); None where no face was compared.
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
        if self.card_sha256:  # it is empty for galleries of the first version that had lost their card
            check_name(_SHA256, self.card_sha256)


@dataclass(frozen=True, slots=True)
class BasisRow:
    """A basis that was learned from the vectors of a generation.

    Attributes:
        id: also the name of its file; never reused.
        generation_id: the generation of the vectors.
        rows: the number of vectors at that time.
        coordinates: bytes of a code; 0 where codes would not make searches cheaper, and there is no file.
        bytes, sha256: of the file.
        learned_at: ISO 8601, UTC.
        detail: the measurements.
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
    """A file of a segment's codes in a basis; `sha256` in hex, `error` bounds the error of every code."""

    segment_id: int
    basis_id: int
    bytes: int
    sha256: str
    error: float


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """A threshold, with its measured and expected error rates.

    Attributes:
        fpir: the target: the share of non-mated searches that may return an identity.
        threshold: Euclidean distance; a search with a farther nearest face returns no identity.
        seen: the share of the non-mated searches of the calibration that returned an identity.
        missed: FNIR, the share of enrolled faces that did not return their own identity when searched for
            among all others; without any trial where no identity has two faces.
        upcoming: how many of the same number of further non-mated searches may return an identity; None in a
            calibration of an older version.
    """

    fpir: float
    threshold: float
    seen: Rate
    missed: Rate
    upcoming: Upcoming | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibration of a gallery, at its size and with its model of that time.

    Attributes:
        generation: the id of the generation; named as in exports and `--json`, unlike its column.
        fingerprint: of the model.
        found_at: ISO 8601, UTC.
        strangers: the source of the non-mated probes: "photos" of people who were not enrolled, or
            "gallery": enrolled faces, each searched without the faces of its own identity.
        faces, identities: the numbers in the gallery.
        searches: the number of non-mated searches.
        people: the number of different people in them; 0 where that was not given.
        trained: the number of these people that the model was trained on.
        fpir: the requested rate; the default of searches.
        points: the operating points by falling `fpir`.
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
        """Returns the operating point of a rate, by default `self.fpir`; None without one."""
        wanted = self.fpir if fpir is None else fpir
        return next((one for one in self.points if math.isclose(one.fpir, wanted, rel_tol=1e-9)), None)

    def fields(self) -> dict[str, Any]:
        """Returns the calibration as values for JSON; a rate that could not be measured is None."""
        return {**asdict(self), "points": [_point_fields(point) for point in self.points]}

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Calibration":
        """Returns the calibration from the result of `fields`."""
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
    """The row of a gallery: its ids, counters and state."""

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
    """A receipt: the proof of an erasure, without data about the person.

    Attributes:
        id: a UUID.
        gallery: the UUID of the gallery.
        at: ISO 8601, UTC.
        who: the operating system user who requested it.
        what: "identity", "face" or "path".
        faces: the number of removed faces.
        face_ids, identity_ids: the ids that a restored backup must not bring back.
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
    """An entry of the audit log: an operation on a gallery.

    Attributes:
        began_at, ended_at: ISO 8601, UTC; many small enrollments of one caller are one entry.
        who: the operating system user.
        via: the command, or "library".
        action: "enroll", "forget", "compact", ...
        faces: the number of affected faces.
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
    """Checks the name of a file or folder from a database.

    Raises:
        GalleryDamaged: faceprint never writes such a name.
    """
    if not isinstance(name, str) or not known.fullmatch(name):
        raise GalleryDamaged(
            f"The gallery's database names a file {str(name)[:80]!r}, as faceprint never does; "
            "restore it from a backup that you trust."
        )


def utc_now() -> str:
    """Returns the current time in UTC as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


_Row = TypeVar("_Row")


def checked(row: _Row) -> _Row:
    """Returns a row after checking the types of its values, which SQLite does not ensure, and their signs."""
    for name, kinds in _kinds(type(row)).items():  # type: ignore[arg-type]
        value = getattr(row, name)
        if not isinstance(value, kinds) or (isinstance(value, int) and value < 0 and name != "revision"):
            raise GalleryDamaged(
                f"The gallery's database has {value!r:.40} as {name} of a {type(row).__name__}; {RESTORE}."
            )
    return row


@cache
def _kinds(kind: type[Any]) -> dict[str, tuple[type, ...]]:
    """Returns the allowed types of each field with a plain type."""
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
