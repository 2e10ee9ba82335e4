"""The fields of requests and responses, as the OpenAPI document describes them."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from retrieval.database.filters import Where
from retrieval.images.photo_reader import MIN_FACE_SIDE, FaceSelection
from retrieval.quality.audit import LIMIT
from retrieval.search.calibration import SAMPLE
from retrieval.service.engine import Asked

DEFAULT_K = 5

# The greatest id.
MAX_ID = 2**63 - 1


class SearchOptions(BaseModel):
    """The options of a search. They are those of `faceprint search`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    k: Annotated[
        int | None,
        Field(
            ge=1,
            description="How many closest photos, or people: 5, or with `within` all up to the service's limit.",
        ),
    ] = None
    within: Annotated[
        float | None, Field(ge=0, description="Only photos that are no farther than this Euclidean distance.")
    ] = None
    by_person: Annotated[bool, Field(description="The closest people instead of photos.")] = False
    rule: Annotated[
        Literal["nearest", "mean", "centroid"], Field(description="With `by_person`, how far a person is.")
    ] = "nearest"
    mean_of: Annotated[
        int, Field(ge=1, le=1000, description="With the rule `mean`: of how many nearest photos.")
    ] = 3
    photos: Annotated[
        int, Field(ge=0, le=100, description="With `by_person`: photos shown of each person.")
    ] = 3
    identity: Annotated[list[str], Field(max_length=100, description="Only photos of these people.")] = []
    where: Annotated[
        list[str],
        Field(
            max_length=100,
            description="Only photos of which all these conditions hold, such as `year>=2020`.",
        ),
    ] = []
    fpir: Annotated[
        float | None, Field(gt=0, le=0.5, description="Decide by the threshold for this share of strangers.")
    ] = None
    max_distance: Annotated[float | None, Field(ge=0, description="Decide by this distance instead.")] = None
    faces: Annotated[
        Literal["all", "largest", "one", "none"],
        Field(description="Which faces of a photo, for a model with a face detector."),
    ] = "all"
    min_face: Annotated[
        float, Field(ge=0, description="Pass over faces with a shorter side of fewer pixels.")
    ] = MIN_FACE_SIDE
    exclude_self: Annotated[
        bool, Field(description="Leave out the stored photo that has the very bytes of this one.")
    ] = False
    min_sharpness: Annotated[
        float | None, Field(ge=0, description="Pass over faces that are more blurred.")
    ] = None
    max_yaw: Annotated[
        float | None, Field(ge=0, description="Pass over faces that are turned further to a side.")
    ] = None
    explain: Annotated[bool, Field(description="Say what answering took.")] = False
    full: Annotated[
        bool, Field(description="Say everything that is stored of each face, as the Python client needs it.")
    ] = False

    def asked(self, most: int) -> Asked:
        """Returns the options as the engine takes them.

        Args:
            most: the greatest k.

        Raises:
            InputError: a condition cannot be parsed, k is above `most`, or `within` is of no use.
        """
        from retrieval.errors import InputError

        if self.k is not None and self.k > most:
            raise InputError(f"`k` is {self.k:,}, and {most:,} is the limit of this service.")
        if self.by_person and self.within is not None:
            raise InputError(
                "`within` is of no use with `by_person`, which finds people, not photos; leave one out."
            )
        where = Where.parse(self.where).among(self.identity) if self.where or self.identity else None
        common: dict[str, Any] = {"where": where, "fpir": self.fpir, "max_distance": self.max_distance}
        if self.by_person:
            return Asked(
                by_person=True,
                k=self.k or DEFAULT_K,
                rule=self.rule,
                mean_of=self.mean_of,
                photos=self.photos,
                **common,
            )
        return Asked(k=self.k or (DEFAULT_K if self.within is None else most), within=self.within, **common)

    def selection(self) -> FaceSelection:
        """Returns which faces of a photo are searched for."""
        return FaceSelection(self.faces, self.min_face, self.min_sharpness, self.max_yaw)


class SearchBody(SearchOptions):
    """A search as JSON: its options, and one of `image`, `face` and `vector`."""

    image: Annotated[
        str | None, Field(description="A photo, as base64.", json_schema_extra={"contentEncoding": "base64"})
    ] = None
    face: Annotated[
        int | None,
        Field(ge=1, lt=2**63, description="The id of a stored face, itself left out of the answer."),
    ] = None
    vector: Annotated[
        list[float] | None,
        Field(min_length=1, max_length=65_536, description="An embedding by the gallery's model."),
    ] = None


class EnrollOptions(BaseModel):
    """How a photo is enrolled. The options are those of `faceprint ingest`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    identity: Annotated[
        str | None,
        Field(
            max_length=1024,
            description="The name of the person; without one, every face is enrolled without a name.",
        ),
    ] = None
    faces: Annotated[
        Literal["auto", "largest", "one", "all"],
        Field(
            description="Which faces of the photo, for a model with a face detector; auto is the largest of a photo with a name, and all of one without."
        ),
    ] = "auto"
    min_face: Annotated[
        float, Field(ge=0, description="Reject faces with a shorter side of fewer pixels.")
    ] = MIN_FACE_SIDE
    min_sharpness: Annotated[float | None, Field(ge=0, description="Reject faces that are more blurred.")] = (
        None
    )
    max_yaw: Annotated[
        float | None, Field(ge=0, description="Reject faces that are turned further to a side.")
    ] = None

    def selection(self) -> FaceSelection:
        """Returns which faces of the photo are enrolled."""
        return FaceSelection(self.faces, self.min_face, self.min_sharpness, self.max_yaw)


class EnrollBody(EnrollOptions):
    """A photo to enroll as JSON."""

    image: Annotated[
        str, Field(description="The photo, as base64.", json_schema_extra={"contentEncoding": "base64"})
    ] = ""
    metadata: Annotated[
        dict[str, Any],
        Field(description="Stored with a new face; for a known one, only keys that it lacks are added."),
    ] = {}


class UploadOptions(EnrollOptions):
    """How the photos of an upload are enrolled."""

    identity: Annotated[
        str | None,
        Field(max_length=1024, description="The name of the person on all photos."),
    ] = None
    identity_from: Annotated[
        Literal["first", "parent", "none"] | None,
        Field(
            description="What names the person of a photo in a zip: the first folder, the folder of the file, or nothing, as of `faceprint ingest`."
        ),
    ] = None


class IngestJob(BaseModel):
    """Photos to enroll from folders and archives of the machine of the service."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["ingest"] = "ingest"
    sources: Annotated[
        list[str],
        Field(
            min_length=1,
            max_length=100,
            description="Folders and archives below those of `faceprint serve --sources`: absolute paths, or paths below one of them.",
        ),
    ]
    identity_from: Annotated[
        Literal["first", "parent", "none"] | None,
        Field(
            description="What names the person: the first folder below the source, the folder of the file, or nothing, as of `faceprint ingest`."
        ),
    ] = None
    faces: Annotated[
        Literal["auto", "largest", "one", "all"],
        Field(description="Which faces of a photo, for a model with a face detector."),
    ] = "auto"
    min_face: Annotated[
        float, Field(ge=0, description="Reject faces with a shorter side of fewer pixels.")
    ] = MIN_FACE_SIDE
    min_sharpness: Annotated[float | None, Field(ge=0, description="Reject faces that are more blurred.")] = (
        None
    )
    max_yaw: Annotated[
        float | None, Field(ge=0, description="Reject faces that are turned further to a side.")
    ] = None

    def selection(self) -> FaceSelection:
        """Returns which faces of a photo are enrolled."""
        return FaceSelection(self.faces, self.min_face, self.min_sharpness, self.max_yaw)


class AuditJob(BaseModel):
    """An audit of the gallery, as of `faceprint audit`; its doubts are those of `GET /v1/doubts` then."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["audit"]
    sample: Annotated[
        int | None,
        Field(ge=1, description="Audit about so many faces, whole people, each compared with all."),
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**32, description="Of the sample.")] = 0
    limit: Annotated[
        float, Field(gt=0, description="Doubt what is so many robust standard deviations from the usual.")
    ] = LIMIT


class CalibrateJob(BaseModel):
    """A calibration of the gallery, as of `faceprint calibrate`: its searches decide by it from then on."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["calibrate"]
    fpir: Annotated[
        float,
        Field(gt=0, le=0.5, description="The share of strangers' searches that may return an identity."),
    ] = 0.01
    strangers: Annotated[
        list[str] | None,
        Field(
            min_length=1,
            max_length=100,
            description="Folders and archives with photos of people who are not enrolled, below those of `faceprint serve --sources`; without them the gallery's own people are searched for.",
        ),
    ] = None
    sample: Annotated[
        int, Field(ge=1, le=MAX_ID, description="How many enrolled faces are searched for at most.")
    ] = SAMPLE
    seed: Annotated[int, Field(ge=0, lt=2**32, description="Of the sample and of the intervals.")] = 0


class ReembedJob(BaseModel):
    """Another model for the gallery, as of `faceprint reembed`; it takes the scope admin."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["reembed"]
    model: Annotated[
        str,
        Field(description="The folder of the model, below those of `faceprint serve --sources`."),
    ]
    switch: Annotated[
        bool, Field(description="Search with it as soon as every face has its vector; else only keep these.")
    ] = True
    give_up: Annotated[
        bool, Field(description="Remove faces without a usable photo, instead of keeping the old model.")
    ] = False


class EvaluateJob(BaseModel):
    """A measurement of the gallery, or of its model, as of `faceprint evaluate`; it changes nothing."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["evaluate"]
    data: Annotated[
        str,
        Field(
            description="A folder with one subfolder of photos per person, below those of `faceprint serve --sources`."
        ),
    ]
    protocol: Annotated[
        Literal["gallery", "closed", "open"],
        Field(
            description="Search for the photos in the gallery, or divide them and measure the model alone: identify enrolled people, or reject strangers too."
        ),
    ] = "gallery"
    val_fraction: Annotated[
        float | None,
        Field(gt=0, lt=1, description="With `closed` and `open`: the share of photos to search for, 0.3."),
    ] = None
    min_images: Annotated[
        int | None,
        Field(ge=2, le=MAX_ID, description="With `open`: people with so many photos are enrolled, 10."),
    ] = None
    seed: Annotated[int, Field(ge=0, lt=2**32, description="Of the division and of the intervals.")] = 0

    @model_validator(mode="after")
    def _check_protocol(self) -> Self:
        if self.min_images is not None and self.protocol != "open":
            raise ValueError("`min_images` is of use only with the protocol open")
        if self.val_fraction is not None and self.protocol == "gallery":
            raise ValueError("`val_fraction` is of no use with the protocol gallery, which divides nothing")
        return self


def _kind_of(job: Any) -> Any:
    """Returns the kind of a job; one without a kind enrolls photos."""
    return job.get("kind", "ingest") if isinstance(job, dict) else getattr(job, "kind", None)


# What POST /v1/jobs takes; a further kind is one more line here, and a class of `service.work`.
NewJob = Annotated[
    Annotated[IngestJob, Tag("ingest")]
    | Annotated[AuditJob, Tag("audit")]
    | Annotated[CalibrateJob, Tag("calibrate")]
    | Annotated[ReembedJob, Tag("reembed")]
    | Annotated[EvaluateJob, Tag("evaluate")],
    Discriminator(
        _kind_of,
        custom_error_type="kind",
        custom_error_message="`kind` must be ingest, audit, calibrate, reembed or evaluate",
    ),
]


class PageOptions(BaseModel):
    """Which page of a list."""

    model_config = ConfigDict(extra="forbid")

    limit: Annotated[int, Field(ge=1, le=500, description="How many at most.")] = 100
    cursor: Annotated[str | None, Field(max_length=2048, description="The `next` of the page before.")] = None


class PeopleOptions(PageOptions):
    """Which people."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[
        str | None, Field(max_length=1024, description="Only the person who has or had this name.")
    ] = None


class FacesOptions(PageOptions):
    """Which faces."""

    model_config = ConfigDict(extra="forbid")

    person: Annotated[int | None, Field(ge=1, le=MAX_ID, description="Only faces of this person.")] = None
    where: Annotated[
        list[str],
        Field(
            max_length=100, description="Only faces of which all these conditions hold, such as `year>=2020`."
        ),
    ] = []


class ThumbnailOptions(BaseModel):
    """How a face is shown."""

    model_config = ConfigDict(extra="forbid")

    side: Annotated[int, Field(ge=16, le=1024, description="The longer side in pixels, at most.")] = 160
    part: Annotated[
        Literal["face", "photo"],
        Field(description="The aligned face, where the model aligns faces, or the whole photo."),
    ] = "face"


class Renaming(BaseModel):
    """Another name for a person."""

    model_config = ConfigDict(extra="forbid")

    identity: Annotated[str, Field(max_length=1024, description="A name that is not in use.")]
    keep_alias: Annotated[bool, Field(description="Let the old name go on to mean this person.")] = True


class Merging(BaseModel):
    """The person who stays."""

    model_config = ConfigDict(extra="forbid")

    into: Annotated[int, Field(ge=1, le=MAX_ID, description="The id of the person who stays.")]


class Model(BaseModel):
    """A part of a response."""

    model_config = ConfigDict(extra="forbid")


class Match(Model):
    """A stored photo, and its Euclidean distance."""

    rank: int
    face_id: int
    identity: str | None
    path: str | None
    distance: float
    box: tuple[float, float, float, float] | None = None
    metadata: dict[str, Any] = {}
    stored: dict[str, Any] = {}


class Person(Model):
    """A person, their distance by the rule, and their nearest photos."""

    rank: int
    identity: str
    distance: float
    matches: list[Match]


class FaceBox(Model):
    """Where a face is in its upright photo: left, top, width and height in pixels; which one, from the left."""

    box: tuple[float, float, float, float]
    score: float
    number: int
    of: int


class Prediction(Model):
    """The classifier's prediction."""

    identity: str
    probability: float


class Upcoming(Model):
    """How many of the next strangers may get a name."""

    model_config = ConfigDict(extra="allow")


class Decision(Model):
    """An identity, or UNKNOWN where `identity` is null."""

    identity: str | None
    distance: float | None
    margin: float | None
    second: str | None
    threshold: float
    classifier_agrees: bool | None
    fpir: float | None
    expected_fpir: float | None
    outgrown: bool
    upcoming: Upcoming | None


class Answer(Model):
    """The answer for a face of a photo, a stored face or a vector: `matches`, or with `by_person` `people`."""

    query: str
    face: FaceBox | None = None
    detected: dict[str, Any] = {}
    prediction: Prediction | None = None
    decision: Decision | None = None
    matches: list[Match] = []
    people: list[Person] = []


class Answers(Model):
    """The answers of a search, one for each face of a photo, from left to right."""

    answers: list[Answer]
    explanation: dict[str, Any] = {}


class PersonShown(Model):
    """A person; `face_id` is their first face."""

    id: int
    identity: str
    faces: int
    face_id: int | None
    metadata: dict[str, Any]


class PersonDetails(PersonShown):
    """A person, with the names that they had before."""

    former_names: list[str]


class Merged(PersonDetails):
    """The person who stays of two; `merge` undoes it (`POST /v1/merges/{id}/undo`)."""

    merge: int


class MergeShown(Model):
    """A merge that can be undone: `person`, called `identity`, is a part of the person `into` since.

    `former_names` and `metadata` were those of `person`; `filled` are the keys that `into` lacked, and got.
    """

    id: int
    merged_at: str
    person: int
    identity: str
    into: int
    into_identity: str
    faces: int
    former_names: list[str]
    metadata: dict[str, Any]
    filled: list[str]


class MergesPage(Model):
    """A page of merges, the newest first; `next` is the cursor of the next page, null on the last one."""

    merges: list[MergeShown]
    next: str | None


class Unmerged(Model):
    """The person who is one again after the undo of a merge, and what was not restored.

    `elsewhere` are faces that were given to others since and stay there, `forgotten` counts those that are
    gone, `former_names` are restored, `lost_names` belong to the other person no more, `kept_keys` are
    metadata that the other person keeps because they were changed since. `says` has all of it in sentences.
    """

    merge: MergeShown
    person: PersonDetails
    into: PersonDetails
    face_ids: list[int]
    elsewhere: list[int]
    forgotten: int
    former_names: list[str]
    lost_names: list[str]
    kept_keys: list[str]
    says: list[str]


class PeoplePage(Model):
    """A page of people; `next` is the cursor of the next page, null on the last one."""

    people: list[PersonShown]
    next: str | None


class FaceDetails(Model):
    """A face; `person` is the id of the person, `box` where it is in its photo, if that is known."""

    id: int
    identity: str | None
    person: int | None
    path: str | None
    box: tuple[float, float, float, float] | None
    enrolled_at: str
    metadata: dict[str, Any]


class FacesPage(Model):
    """A page of faces; `next` is the cursor of the next page, null on the last one."""

    faces: list[FaceDetails]
    next: str | None


class Enrolled(Model):
    """What was done with a photo, and the faces that it has now."""

    status: Literal["enrolled", "already-known", "duplicate"]
    face_ids: list[int]
    identity: str | None
    detail: str | None


class Receipt(Model):
    """The proof of an erasure, without data about the person: to be kept with the backups."""

    id: str
    gallery: str
    at: str
    who: str
    what: str
    faces: int
    face_ids: list[int]
    identity_ids: list[int]
    remains: Annotated[
        str | None,
        Field(
            description="Of a gallery in databases: what the erasure leaves on their servers, and until when."
        ),
    ] = None


class JobProgress(Model):
    """A job, and how far it is: how many photos have which outcome, or how much of other work is done."""

    id: str
    kind: Literal["ingest", "upload", "audit", "calibrate", "reembed", "evaluate"]
    state: Literal["waiting", "running", "done", "failed", "cancelled"]
    sources: list[str]
    created_at: str
    started_at: str | None
    ended_at: str | None
    counts: dict[str, int]
    done: int
    total: int
    error: dict[str, str] | None


class JobDetails(JobProgress):
    """A job with the first of its rejected photos, and at its end the report: that of `ingest --summary`, what
    was audited, that of `calibrate --json`, what was embedded again, or the figures of `evaluate --json`.
    """

    rejected: list[dict[str, str | None]]
    rejected_more: int
    report: dict[str, Any] | None


class JobList(Model):
    """The jobs that are remembered, oldest first."""

    jobs: list[JobProgress]


class DoubtsOptions(PageOptions):
    """Which doubts."""

    model_config = ConfigDict(extra="forbid")

    state: Annotated[
        Literal["open", "dismissed", "confirmed"] | None, Field(description="Only doubts of this state.")
    ] = None


class DoubtedFace(Model):
    """A face that shows a doubt, and its person today."""

    face_id: int
    person: int | None
    identity: str | None


class DoubtedPerson(Model):
    """A person of a doubt."""

    id: int
    identity: str


class DoubtGroup(Model):
    """Faces that show a doubt together; `name` says what they are, such as "nearest of Kim"."""

    name: str
    faces: list[DoubtedFace]


class DoubtAct(Model):
    """What a confirmation does: gives `faces` to the person `into`, or merges `person` into it."""

    does: Literal["assign", "merge"]
    into: int
    faces: list[int]
    person: int | None


class DoubtShown(Model):
    """A doubt: what was found, in `says`; what to do if it is true, in `next`, and as an `act` if it is one.

    `distance` is the one that matters: between the two faces, to the nearest face of the other person, or
    between the centroids of two people; null where the doubt is not about a distance. `score` is how many
    robust standard deviations it is from the usual.
    """

    id: str
    kind: str
    state: Literal["open", "dismissed", "confirmed"]
    score: float
    distance: float | None
    measured: dict[str, float]
    people: list[DoubtedPerson]
    groups: list[DoubtGroup]
    says: str
    next: str
    act: DoubtAct | None
    decided_at: str | None


class DoubtsPage(Model):
    """A page of doubts, open ones first; `audited_at` is when the audit was made, null before the first."""

    doubts: list[DoubtShown]
    next: str | None
    audited_at: str | None


class Assigning(BaseModel):
    """Whose a face is."""

    model_config = ConfigDict(extra="forbid")

    identity: Annotated[
        str | None, Field(max_length=1024, description="A current, former or new name; null for nobody's.")
    ]


class Error(Model):
    """Why a request was refused."""

    code: str
    message: str
    request_id: str
    reason: str | None = None


class ErrorBody(Model):
    """The body of every response that is an error."""

    error: Error


class Health(Model):
    """Whether the service lives, or can answer."""

    status: Literal["ok"]


class Readiness(Health):
    """Whether the service can answer, and how old a copy of a published gallery is."""

    age_seconds: Annotated[
        float | None,
        Field(description="Of a copy: seconds since the publisher said that this is the gallery's state."),
    ] = None
