"""Refusals: why a request got no answer, as a status, a stable code and a sentence.

Every error of the service has the body `{"error": {"code", "message", "request_id"}}`; for a photo that
cannot be read it has the field `reason` too.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final

from retrieval.errors import (
    FaceprintError,
    GalleryBusy,
    GalleryDamaged,
    InputError,
    NotFound,
    OutOfDate,
    RunError,
    ServerUnavailable,
    StorageError,
    UnreadableImage,
)
from retrieval.system.paths import printable

# The most characters of a sentence: it may repeat what the request had, such as a condition of megabytes.
_MAX_MESSAGE: Final = 2000


class Code(StrEnum):
    """The stable codes of errors: programs may rely on them."""

    BAD_REQUEST = "bad-request"
    INVALID_ARGUMENT = "invalid-argument"
    UNREADABLE_IMAGE = "unreadable-image"
    NOT_FOUND = "not-found"
    METHOD_NOT_ALLOWED = "method-not-allowed"
    UNSUPPORTED_MEDIA_TYPE = "unsupported-media-type"
    BODY_TOO_LARGE = "body-too-large"
    BODY_TOO_SLOW = "body-too-slow"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    FOREIGN_ORIGIN = "foreign-origin"
    TOO_MANY_REQUESTS = "too-many-requests"
    ANSWER_TIMEOUT = "answer-timeout"
    SHUTTING_DOWN = "shutting-down"
    GALLERY_BUSY = "gallery-busy"
    GALLERY_DAMAGED = "gallery-damaged"
    OUT_OF_DATE = "out-of-date"
    STORAGE_ERROR = "storage-error"
    SERVER_UNAVAILABLE = "server-unavailable"
    IDENTITY_CONFLICT = "identity-conflict"
    REJECTED = "rejected"
    INTERRUPTED = "interrupted"
    RUN_FAILED = "run-failed"
    INTERNAL_ERROR = "internal-error"


class Refusal(Exception):
    """A request that is not answered.

    Attributes:
        status: the HTTP status.
        code: the stable code.
        message: one sentence.
        reason: why a photo cannot be read, a value of `Reason`; None for other refusals.
        headers: of the response, besides those of every response.
    """

    def __init__(
        self,
        status: int,
        code: Code,
        message: str,
        *,
        reason: str | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]} (...)."
        self.reason = reason
        self.headers = headers

    def body(self, request_id: str) -> dict[str, Any]:
        """Returns the body of the response."""
        error = {"code": self.code, "message": self.message, "request_id": request_id}
        return {"error": error if self.reason is None else {**error, "reason": self.reason}}


# By the class of an error, the nearest class first.
_OF_LIBRARY: Final[tuple[tuple[type[FaceprintError], int, Code], ...]] = (
    (UnreadableImage, HTTPStatus.UNPROCESSABLE_ENTITY, Code.UNREADABLE_IMAGE),
    (NotFound, HTTPStatus.NOT_FOUND, Code.NOT_FOUND),
    (InputError, HTTPStatus.BAD_REQUEST, Code.INVALID_ARGUMENT),
    (GalleryBusy, HTTPStatus.SERVICE_UNAVAILABLE, Code.GALLERY_BUSY),
    (OutOfDate, HTTPStatus.SERVICE_UNAVAILABLE, Code.OUT_OF_DATE),
    (GalleryDamaged, HTTPStatus.INTERNAL_SERVER_ERROR, Code.GALLERY_DAMAGED),
    (ServerUnavailable, HTTPStatus.SERVICE_UNAVAILABLE, Code.SERVER_UNAVAILABLE),
    (StorageError, HTTPStatus.INSUFFICIENT_STORAGE, Code.STORAGE_ERROR),
    (RunError, HTTPStatus.INTERNAL_SERVER_ERROR, Code.RUN_FAILED),
)

_OF_STATUS: Final[Mapping[int, tuple[Code, str]]] = {
    HTTPStatus.NOT_FOUND: (Code.NOT_FOUND, "There is nothing at this address; see /openapi.json."),
    HTTPStatus.METHOD_NOT_ALLOWED: (
        Code.METHOD_NOT_ALLOWED,
        "This address takes another method; see /openapi.json.",
    ),
}


def of_error(error: Exception) -> Refusal:
    """Returns the refusal for an error of the library; anything unexpected is an internal error."""
    for kind, status, code in _OF_LIBRARY:
        if isinstance(error, kind):
            reason = error.reason if isinstance(error, UnreadableImage) else None
            again = {"Retry-After": "1"} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}
            return Refusal(status, code, printable(str(error)), reason=reason, headers=again)
    return Refusal(
        HTTPStatus.INTERNAL_SERVER_ERROR,
        Code.INTERNAL_ERROR,
        "The service failed; its log has the error under this request id.",
    )


def of_status(status: int, headers: Mapping[str, str]) -> Refusal:
    """Returns the refusal for a status that the framework chose."""
    code, message = _OF_STATUS.get(status, (Code.BAD_REQUEST, "The request cannot be understood."))
    return Refusal(status, code, message, headers=headers)


def of_validation(problems: Sequence[Mapping[str, Any]], *, skip: int = 0) -> Refusal:
    """Returns the refusal for fields of a request that have wrong values, which the sentence names.

    Args:
        problems: as from pydantic. What was given is not repeated: it may be a photo.
        skip: how many names at the beginning of each place are no field, such as "query".
    """
    named = []
    for problem in problems[:3]:
        place = ".".join(map(str, problem["loc"][skip:]))
        text = str(problem["msg"]).removeprefix("Value error, ").rstrip(".")
        named.append(f"`{place}`: {text}" if place else text)
    sentence = "; ".join(named) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
    return Refusal(HTTPStatus.BAD_REQUEST, Code.INVALID_ARGUMENT, f"{sentence}.")
