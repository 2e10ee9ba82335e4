"""A client of the service: searches and merges of `Gallery`, with the same arguments and results, and jobs.

from retrieval.client import connect

with connect("http://gallery.example:8000", token=token) as gallery:
    result = gallery.search("who.jpg", k=5)
"""

import base64
import io
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import chain, islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Unpack
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from retrieval.database.filters import Condition, Where
from retrieval.database.records import Face, FaceRegion, Merge
from retrieval.errors import (
    GalleryBusy,
    GalleryDamaged,
    InputError,
    MissingDependency,
    NotFound,
    Reason,
    RunError,
    ServerUnavailable,
    StorageError,
    UnreadableImage,
)
from retrieval.gallery.image_search import one_face
from retrieval.gallery.merges import UndoneMerge
from retrieval.images.detection import DetectedFace
from retrieval.images.photo_reader import FaceSelection
from retrieval.images.pixels import ImageSource, read_bytes
from retrieval.rates import Upcoming
from retrieval.search.decisions import Decision
from retrieval.search.nearest import Found, Match, PeopleResult, PersonMatch, Prediction, SearchResult
from retrieval.search.question import (
    PeopleQuestion,
    PeopleSearchOptions,
    PhotoQuestion,
    PhotoSearchOptions,
    Question,
)

if TYPE_CHECKING:
    import httpx

# The most results of a search; a service returns no more.
MAX_RESULTS: Final = 1000

# The most queries of one request, and the characters of photos from which on it takes no more. The service
# reads as many queries before it sends answers, so it never waits for these to be read meanwhile.
_BATCH: Final = 32
_BATCH_BYTES: Final = 16 * 2**20

_LINES: Final = "application/x-ndjson"
_JSON: Final = "application/json"

# The exceptions of the library by the codes of the service; all other codes are a RunError.
_ERRORS: Final[dict[str, type[InputError] | type[RunError]]] = {
    "bad-request": InputError,
    "invalid-argument": InputError,
    "body-too-large": InputError,
    "unauthorized": InputError,
    "forbidden": InputError,
    "foreign-origin": InputError,
    "not-found": NotFound,
    "gallery-busy": GalleryBusy,
    "gallery-damaged": GalleryDamaged,
    "storage-error": StorageError,
    "server-unavailable": ServerUnavailable,
}
_UNREADABLE: Final = ("The image cannot be read: ", " ({reason}).")


def connect(url: str, *, token: str | None = None, timeout: float = 120.0) -> "Client":
    """Returns a client of a service, which is asked when a method is called.

    Args:
        url: the address of the service, such as http://127.0.0.1:8000.
        token: as from `faceprint token create`; None for a service without tokens.
        timeout: seconds to wait for an answer, and to try again while the service is busy.

    Raises:
        InputError: `url` is no address.
        MissingDependency: httpx is not installed.
    """
    try:
        import httpx
    except ImportError as error:
        raise MissingDependency(
            "The client needs httpx; install it with pip install 'faceprint[service]'."
        ) from error
    if not url.startswith(("http://", "https://")):
        raise InputError(f"`url` is {url[:80]!a}; give an address such as http://127.0.0.1:8000.")
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    try:
        client = httpx.Client(base_url=url, headers=headers, timeout=timeout)
    except (httpx.InvalidURL, ValueError, UnicodeError) as error:
        raise InputError(f"`url` or `token` cannot be sent: {error}.") from error
    return Client(client, url=url, timeout=timeout)


@dataclass(frozen=True)
class _Query:
    """A query as the service takes it, and what its errors call it."""

    fields: dict[str, Any]
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A job of a service, as it was when the service was asked.

    Attributes:
        id: what `Client.job`, `wait_for_job` and `cancel_job` take.
        kind: what it does: "ingest", "upload", "audit", "calibrate", "reembed" or "evaluate".
        state: "waiting", "running", "done", "failed" or "cancelled".
        counts: photos by their outcome.
        done, total: units of work done and in all; 0 where that is not known.
        rejected: the first of the rejected photos, each with `path`, `reason` and `detail`.
        rejected_more: how many more there were.
        report: of a job that has ended; see docs/service.md.
        error: why it failed: `code` and `message`.
    """

    id: str
    kind: str
    state: str
    counts: dict[str, int] = field(hash=False)
    done: int
    total: int
    rejected: list[dict[str, str | None]] = field(hash=False, default_factory=list)
    rejected_more: int = 0
    report: dict[str, Any] | None = field(hash=False, default=None)
    error: dict[str, str] | None = field(hash=False, default=None)

    @property
    def is_over(self) -> bool:
        """Whether the job has ended, in whatever way."""
        return self.state not in ("waiting", "running")


class Client:
    """A gallery behind a service: searches, merges and jobs. A context manager, for one thread at a time.

    Methods raise what those of `Gallery` raise, and also a RunError if the service cannot be reached, and an
    InputError if it refuses the token.

    Attributes:
        url: the address of the service.
    """

    def __init__(self, client: "httpx.Client", *, url: str, timeout: float) -> None:
        self.url = url
        self._client = client
        self._timeout = timeout

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def info(self) -> dict[str, Any]:
        """Returns the fields of `GalleryInfo`."""
        told: dict[str, Any] = json.loads(self._send("GET", "/v1/info").content)["gallery"]
        return told

    def merges(self, *, before: int | None = None, limit: int | None = None) -> list[Merge]:
        """Returns merges as `Gallery.merges` does."""
        listed = self._listed("/v1/merges", "merges")
        chosen = (fields for fields in listed if before is None or fields["id"] < before)
        return [_merge(fields) for fields in islice(chosen, limit)]

    def undo_merge(self, merge_id: int | None = None) -> UndoneMerge:
        """Undoes a merge as `Gallery.undo_merge` does, with a token of the scope `write`."""
        if merge_id is None:
            newest = self.merges(limit=1)
            if not newest:
                raise NotFound(f"{self.url} has no merge that can be undone.")
            merge_id = newest[0].id
        return _undone(json.loads(self._send("POST", f"/v1/merges/{merge_id}/undo").content))

    def start_job(self, kind: str, **options: Any) -> Job:
        """Starts a job, with a token of the scope `write` (for "reembed" `admin`), and returns it at once.

        Args:
            kind: "ingest", "audit", "calibrate" or "reembed".
            options: as of `POST /v1/jobs` (see docs/service.md), such as `sources=["2026/door"]`.

        Raises:
            InputError: an option does not exist or has a wrong value.
        """
        content = json.dumps({"kind": kind, **options}).encode()
        return _job(self._send("POST", "/v1/jobs", content=content, kind=_JSON))

    def upload(
        self,
        paths: Iterable[str | os.PathLike[str]],
        *,
        identity: str | None = None,
        identity_from: str | None = None,
    ) -> Job:
        """Sends photos, or one zip, and starts a job that enrolls them; returns it at once.

        Args:
            paths: of the files, with not more bytes together than a request may have.
            identity: the name of the person on all of them.
            identity_from: what names the people in a zip, without `identity`: "first" (the default), "parent"
                or "none"; see `photos.scan`.

        Raises:
            UnreadableImage: a file cannot be read.
            InputError: the files cannot be one upload, or are too many or too large.
        """
        sent = [("file", (os.path.basename(path), read_bytes(path))) for path in paths]
        options = {"identity": identity, "identity_from": identity_from}
        data = {name: value for name, value in options.items() if value is not None}
        form = self._client.build_request("POST", "/", files=sent, data=data)
        kind = form.headers.get("content-type", _JSON)
        return _job(self._send("POST", "/v1/jobs/uploads", content=form.read(), kind=kind))

    def jobs(self) -> list[Job]:
        """Returns the jobs that the service remembers, oldest first, without rejected photos and reports."""
        return [_job_of(one) for one in json.loads(self._send("GET", "/v1/jobs").content)["jobs"]]

    def job(self, job_id: str) -> Job:
        """Returns a job.

        Raises:
            NotFound: there is none, or it is no longer remembered.
        """
        return _job(self._send("GET", _job_path(job_id)))

    def cancel_job(self, job_id: str) -> Job:
        """Asks a job to stop, which it does after its current batch; returns it; NotFound as `job`."""
        return _job(self._send("POST", f"{_job_path(job_id)}/cancel"))

    def wait_for_job(self, job_id: str) -> Job:
        """Returns a job when it is over: done or cancelled.

        Raises:
            FaceprintError: the job failed, for this reason.
            NotFound: as `job`.
        """
        while True:
            self._watch(f"{_job_path(job_id)}/events")
            job = self.job(job_id)
            if job.error is not None:
                raise _error(job.error, None)
            if job.is_over:
                return job

    def search(
        self,
        image: ImageSource,
        k: int | None = 5,
        *,
        exclude_self: bool = False,
        selection: FaceSelection = FaceSelection(),
        **options: Unpack[PhotoSearchOptions],
    ) -> SearchResult:
        """Returns the k nearest stored photos to an image; see `Gallery.search`."""
        return self.search_many([image], k, exclude_self=exclude_self, selection=selection, **options)[0]

    def search_many(
        self,
        images: Iterable[ImageSource],
        k: int | None = 5,
        *,
        exclude_self: bool = False,
        selection: FaceSelection = FaceSelection(),
        **options: Unpack[PhotoSearchOptions],
    ) -> list[SearchResult]:
        """Searches as `search` does, for many images; returns one result per image, in order."""
        some = self.search_faces(
            images, k, exclude_self=exclude_self, selection=one_face(selection), **options
        )
        return [one for [one] in some]

    def search_faces(
        self,
        images: Iterable[ImageSource],
        k: int | None = 5,
        *,
        exclude_self: bool = False,
        selection: FaceSelection = FaceSelection("all"),
        **options: Unpack[PhotoSearchOptions],
    ) -> list[list[SearchResult]]:
        """Searches as `search` does, for each face of many images; see `Gallery.search_faces`."""
        asked = _of_photos(PhotoQuestion(k, **options))
        queries = _of_images(images, exclude_self, selection, asked)
        return [[_photo_result(face) for face in faces] for faces in self._ask(queries, asked)]

    def search_by_vector(
        self, vector: NDArray[Any], k: int | None = 5, **options: Unpack[PhotoSearchOptions]
    ) -> Found[Match]:
        """Returns the k nearest stored photos to an embedding (d,)."""
        return self.search_by_vectors(np.asarray(vector)[None], k, **options)[0]

    def search_by_vectors(
        self, vectors: NDArray[Any], k: int | None = 5, **options: Unpack[PhotoSearchOptions]
    ) -> list[Found[Match]]:
        """Returns the k nearest stored photos to each embedding (n, d); see `Gallery.search_by_vectors`."""
        asked = _of_photos(PhotoQuestion(k, **options))
        return [_photos_found(one) for [one] in self._ask(_of_vectors(vectors, asked), asked)]

    def search_by_face(
        self, face_id: int, k: int | None = 5, **options: Unpack[PhotoSearchOptions]
    ) -> Found[Match]:
        """Returns the k nearest other photos to a stored one; see `Gallery.search_by_face`."""
        asked = _of_photos(PhotoQuestion(k, **options))
        [[found]] = self._ask(iter([_of_face(face_id, asked)]), asked)
        return _photos_found(found)

    def search_people(
        self,
        images: Iterable[ImageSource],
        k: int = 5,
        *,
        exclude_self: bool = False,
        selection: FaceSelection = FaceSelection(),
        **options: Unpack[PeopleSearchOptions],
    ) -> list[PeopleResult]:
        """Returns the k nearest identities to each image; see `Gallery.search_people`."""
        some = self.search_people_of_faces(
            images, k, exclude_self=exclude_self, selection=one_face(selection), **options
        )
        return [one for [one] in some]

    def search_people_of_faces(
        self,
        images: Iterable[ImageSource],
        k: int = 5,
        *,
        exclude_self: bool = False,
        selection: FaceSelection = FaceSelection("all"),
        **options: Unpack[PeopleSearchOptions],
    ) -> list[list[PeopleResult]]:
        """Searches as `search_people` does, for each face of many images."""
        asked = _of_people(PeopleQuestion(k, **options))
        queries = _of_images(images, exclude_self, selection, asked)
        return [[_people_result(face) for face in faces] for faces in self._ask(queries, asked)]

    def search_people_by_vectors(
        self, vectors: NDArray[Any], k: int = 5, **options: Unpack[PeopleSearchOptions]
    ) -> list[Found[PersonMatch]]:
        """Searches as `search_people` does, for embeddings (n, d)."""
        asked = _of_people(PeopleQuestion(k, **options))
        return [_people_found(one) for [one] in self._ask(_of_vectors(vectors, asked), asked)]

    def search_people_by_face(
        self, face_id: int, k: int = 5, **options: Unpack[PeopleSearchOptions]
    ) -> Found[PersonMatch]:
        """Searches as `search_people` does, for a stored face, without the face itself."""
        asked = _of_people(PeopleQuestion(k, **options))
        [[found]] = self._ask(iter([_of_face(face_id, asked)]), asked)
        return _people_found(found)

    def _ask(self, queries: Iterator[_Query], asked: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
        """Yields the answers to each query, some dozen queries a request."""
        for first in queries:
            some = list(_batch(first, queries))
            body = b"".join(json.dumps(query.fields).encode() + b"\n" for query in some)
            response = self._send("POST", "/v1/search/bulk", content=body)
            lines = response.content.splitlines()
            for query, line in zip(some, lines, strict=False):
                found = json.loads(line)
                if "error" in found:
                    raise _error(found["error"], query.name)
                answers: list[dict[str, Any]] = found["answers"]
                if asked["k"] is None and any(len(one["matches"]) >= MAX_RESULTS for one in answers):
                    raise InputError(
                        f"There are {MAX_RESULTS:,} photos or more within that distance, and a service "
                        "returns no more; give a smaller distance, or `k`."
                    )
                yield answers
            if len(lines) != len(some):
                raise RunError(f"The service {self.url} ended before it had answered; ask again.")

    def _listed(self, path: str, of: str) -> Iterator[dict[str, Any]]:
        """Yields the items of a list, page by page."""
        query = ""
        while True:
            page = json.loads(self._send("GET", f"{path}{query}").content)
            yield from page[of]
            if page["next"] is None:
                return
            query = f"?cursor={page['next']}"

    def _watch(self, path: str) -> None:
        """Reads server-sent events until they end."""
        import httpx

        try:
            with self._client.stream("GET", path) as response:
                if not response.is_success:
                    response.read()
                    raise self._refused(response)
                for _ in response.iter_bytes():
                    pass
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _send(
        self, method: str, path: str, *, content: bytes | None = None, kind: str = _LINES
    ) -> "httpx.Response":
        """Returns a response; waits while the service has too many requests.

        Args:
            method, path: of the request.
            content: its body, if it has one.
            kind: the type of the body.
        """
        import httpx

        headers = {} if content is None else {"content-type": kind}
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                response = self._client.request(method, path, content=content, headers=headers)
            except httpx.HTTPError as error:
                raise self._unreachable(error) from error
            if response.is_success:
                return response
            if response.status_code != 429 or time.monotonic() > deadline:
                raise self._refused(response)
            time.sleep(_seconds(response.headers.get("retry-after", "")))

    def _unreachable(self, error: Exception) -> RunError:
        return RunError(
            f"The service {self.url} cannot be asked: {str(error) or type(error).__name__}; "
            "`faceprint serve` starts one."
        )

    def _refused(self, response: "httpx.Response") -> InputError | RunError:
        try:
            return _error(json.loads(response.content)["error"], None)
        except (ValueError, KeyError, TypeError):
            return RunError(
                f"{self.url} answers with the status {response.status_code} and is no service of faceprint; "
                "check the address."
            )


def _seconds(text: str) -> float:
    return min(float(text), 60.0) if text.isdecimal() else 1.0


def _error(fields: dict[str, Any], name: str | None) -> InputError | RunError:
    """Returns the exception of the library for an error of the service."""
    code, message, reason = fields["code"], str(fields["message"]), fields.get("reason")
    if code == "unreadable-image" and reason in list(Reason):
        before, after = _UNREADABLE
        detail = message.removeprefix(before).removesuffix(after.format(reason=reason))
        return UnreadableImage(Reason(reason), detail, name)
    return _ERRORS.get(code, RunError)(message)


def _job_path(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _job(response: "httpx.Response") -> Job:
    return _job_of(json.loads(response.content))


def _job_of(told: dict[str, Any]) -> Job:
    names = {one.name for one in fields(Job)}
    return Job(**{name: value for name, value in told.items() if name in names})


def _batch(first: _Query, others: Iterator[_Query]) -> Iterator[_Query]:
    """Yields queries for one request: the first, and others up to a number, or up to a size of photos."""
    held = 0
    for number, query in enumerate(chain([first], others), 1):
        yield query
        held += len(query.fields.get("image", ""))
        if number == _BATCH or held >= _BATCH_BYTES:
            return


# What is asked


def _of_photos(question: PhotoQuestion) -> dict[str, Any]:
    return {**_common(question), "within": question.within}


def _of_people(question: PeopleQuestion) -> dict[str, Any]:
    return {
        **_common(question),
        "by_person": True,
        "rule": str(question.rule),
        "mean_of": question.mean_of,
        "photos": question.photos,
    }


def _common(question: Question) -> dict[str, Any]:
    """Returns the options of a search as the service takes them.

    Raises:
        InputError: it takes fewer results, or other conditions.
    """
    if question.k is not None and question.k > MAX_RESULTS:
        raise InputError(f"`k` is {question.k:,}, and {MAX_RESULTS:,} is the limit of a service.")
    where = question.where
    return {
        "k": question.k,
        "fpir": question.fpir,
        "max_distance": question.max_distance,
        "identity": [] if where is None else list(where.identities),
        "where": [] if where is None else list(_conditions(where)),
        "full": True,
    }


def _conditions(where: Where) -> Iterator[str]:
    """Yields the conditions of a filter, without the identities, as texts."""
    if where.face_ids is not None and not list(where.face_ids):
        raise InputError("`face_ids` is empty, so no face can match.")
    yield from (f"face={number}" for number in where.face_ids or ())
    yield from (f"path={prefix}" for prefix in where.path_prefixes)
    if where.enrolled_after is not None:
        yield f"enrolled>={where.enrolled_after}"
    if where.enrolled_before is not None:
        yield f"enrolled<{where.enrolled_before}"
    yield from map(_condition, where.faces)
    yield from (f"person.{_condition(one)}" for one in where.people)


def _condition(condition: Condition) -> str:
    """Returns a condition as `parse_condition` reads it, whatever its key is."""
    key = ".".join(json.dumps(name) for name in condition.key)
    if condition.operator == "?":
        return f"{key}?"
    value = json.dumps(condition.value, ensure_ascii=False)
    return f"{key}{condition.operator}{value}"


def _of_images(
    images: Iterable[ImageSource], exclude_self: bool, selection: FaceSelection, asked: dict[str, Any]
) -> Iterator[_Query]:
    fields = {
        **asked,
        "exclude_self": exclude_self,
        "faces": selection.faces,
        "min_face": selection.min_side,
        "min_sharpness": selection.min_sharpness,
        "max_yaw": selection.max_yaw,
    }
    for image in images:
        is_path = isinstance(image, str | os.PathLike)
        if exclude_self and not (is_path or isinstance(image, bytes)):
            raise InputError("`exclude_self` compares files; give paths or bytes, or leave it out.")
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else None
        yield _Query({**fields, "image": base64.b64encode(_bytes(image)).decode()}, name)


def _bytes(image: ImageSource) -> bytes:
    """Returns an image as a file; one that is decoded as PNG, which loses nothing.

    Raises:
        UnreadableImage: a file cannot be read.
        InputError: an array is no picture, or an image has a mode that PNG does not have.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, str | os.PathLike):
        return read_bytes(image)
    try:
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        file = io.BytesIO()
        picture.save(file, format="PNG", exif=picture.getexif())
    except (OSError, TypeError, ValueError) as error:
        raise InputError(
            f"The image cannot be sent: {error}; give the path or the bytes of a file."
        ) from error
    return file.getvalue()


def _of_vectors(vectors: NDArray[Any], asked: dict[str, Any]) -> Iterator[_Query]:
    """Yields a query for each embedding.

    Raises:
        InputError: the array has another shape, or a value is not finite.
    """
    queries = np.asarray(vectors)
    if queries.ndim != 2 or queries.dtype.kind not in "fiu":
        raise InputError(f"Vectors must be numbers of shape (n, d), not {queries.dtype} {queries.shape}.")
    if not np.isfinite(queries).all():
        raise InputError("A vector has a value that is not finite.")
    for vector in queries.astype(np.float32):
        yield _Query({**asked, "vector": vector.tolist()})


def _of_face(face_id: int, asked: dict[str, Any]) -> _Query:
    if not 0 < face_id < 2**63:
        raise NotFound(f"There is no face {face_id}.")
    return _Query({**asked, "face": face_id})


# What is answered


def _photo_result(answer: dict[str, Any]) -> SearchResult:
    return SearchResult(
        tuple(map(_match, answer["matches"])), _prediction(answer), _decision(answer), _detected(answer)
    )


def _people_result(answer: dict[str, Any]) -> PeopleResult:
    return PeopleResult(
        tuple(map(_person, answer["people"])), _prediction(answer), _decision(answer), _detected(answer)
    )


def _photos_found(answer: dict[str, Any]) -> Found[Match]:
    return Found.of(map(_match, answer["matches"]), _decision(answer))


def _people_found(answer: dict[str, Any]) -> Found[PersonMatch]:
    return Found.of(map(_person, answer["people"]), _decision(answer))


def _person(fields: dict[str, Any]) -> PersonMatch:
    return PersonMatch(fields["identity"], fields["distance"], tuple(map(_match, fields["matches"])))


def _match(fields: dict[str, Any]) -> Match:
    stored = fields["stored"]
    region = stored["region"]
    face = Face(
        fields["face_id"],
        fields["identity"],
        tuple(stored["paths"]),
        stored["sha256"],
        stored["enrolled_at"],
        fields.get("metadata", {}),
        meant=stored["meant"],
        region=None if region is None else FaceRegion.of_json(json.dumps(region)),
    )
    return Match(face, fields["distance"])


def _prediction(answer: dict[str, Any]) -> Prediction | None:
    fields = answer.get("prediction")
    return None if fields is None else Prediction(**fields)


def _decision(answer: dict[str, Any]) -> Decision | None:
    fields = answer.get("decision")
    if fields is None:
        return None
    upcoming = fields["upcoming"]
    return Decision(**{**fields, "upcoming": None if upcoming is None else Upcoming(**upcoming)})


def _merge(fields: dict[str, Any]) -> Merge:
    return Merge(
        id=fields["id"],
        merged_at=fields["merged_at"],
        identity_id=fields["person"],
        into_id=fields["into"],
        name=fields["identity"],
        faces=fields["faces"],
        into=fields["into_identity"],
        former_names=tuple(fields["former_names"]),
        metadata=fields["metadata"],
        filled=tuple(fields["filled"]),
    )


def _undone(fields: dict[str, Any]) -> UndoneMerge:
    return UndoneMerge(
        _merge(fields["merge"]),
        fields["into"]["identity"],
        fields["into"]["id"],
        tuple(fields["face_ids"]),
        elsewhere=tuple(fields["elsewhere"]),
        forgotten=fields["forgotten"],
        former_names=tuple(fields["former_names"]),
        lost_names=tuple(fields["lost_names"]),
        kept_keys=tuple(fields["kept_keys"]),
    )


def _detected(answer: dict[str, Any]) -> DetectedFace | None:
    fields = answer.get("detected")
    if fields is None:
        return None
    return DetectedFace(tuple(fields["box"]), tuple(map(tuple, fields["landmarks"])), fields["score"])
