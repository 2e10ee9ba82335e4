"""The bodies of requests: a photo as a form, bytes or base64, with options; a query as JSON; an upload."""

import base64
import binascii
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, Final, TypeVar, get_origin

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from retrieval.database.identity_names import check_identity
from retrieval.errors import InputError
from retrieval.images.photo_reader import FaceSelection
from retrieval.service import uploads
from retrieval.service.engine import Query
from retrieval.service.refusals import Code, Refusal, of_validation
from retrieval.service.schemas import EnrollBody, EnrollOptions, SearchBody, SearchOptions, UploadOptions
from retrieval.service.settings import Limits
from retrieval.service.uploads import Sent
from retrieval.sources.photos import Photo
from retrieval.system.paths import composed

_Options = TypeVar("_Options", bound=BaseModel)

# The most fields of a body, and the greatest length of a name that a photo gets in answers.
_MAX_FIELDS: Final = 64
# The most files of an upload.
MAX_FILES: Final = 1000
_MAX_NAME: Final = 255

# The most values of a JSON body, roughly: parsed, they take many times their bytes. A vector has fewer.
_MAX_VALUES: Final = 2**17

_JSON: Final = "application/json"
_FORM: Final = "multipart/form-data"
_BYTES: Final = "application/octet-stream"

# What answers call a photo without the name of a file.
_UNNAMED: Final = "image"


def _described(schema: str) -> dict[str, Any]:
    """Returns what the OpenAPI document says of a body with a photo."""
    photo = {"schema": {"type": "string", "format": "binary"}}
    form = {
        "type": "object",
        "required": ["image"],
        "properties": {"image": {"type": "string", "format": "binary"}},
        "description": "One photo; other fields are options, as in the query.",
    }
    content = {
        _JSON: {"schema": {"$ref": f"#/components/schemas/{schema}"}},
        _FORM: {"schema": form},
        "image/*": photo,
        _BYTES: photo,
    }
    return {"requestBody": {"required": True, "content": content}}


SEARCH_BODY: Final = _described("SearchBody")
ENROLL_BODY: Final = _described("EnrollBody")
UPLOAD_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            _FORM: {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {
                            "type": "array",
                            "minItems": 1,
                            "maxItems": MAX_FILES,
                            "items": {"type": "string", "format": "binary"},
                        }
                    },
                    "description": "Photos, or one zip of photos; other fields are options, as in the query.",
                }
            }
        },
    }
}


@dataclass(frozen=True, slots=True)
class _Received:
    """What a request has in its body.

    Attributes:
        fields: of the JSON or of the form, without the photo.
        image: the photo; None in JSON without one.
        name: of the photo.
    """

    fields: Mapping[str, Any]
    image: bytes | None = field(repr=False)
    name: str = _UNNAMED


async def read_search(request: Request, options: SearchOptions, limits: Limits) -> tuple[Query, SearchBody]:
    """Returns the query of a request and its options.

    Args:
        request: the request; options may be in its address and in its body, each in one place.
        options: those of its address.
        limits: of requests.

    Raises:
        Refusal: the body has another type, or cannot be parsed.
        InputError: an option is invalid, or there is not exactly one photo, face or vector.
    """
    received = await _received(request, SearchBody, limits)
    return await run_in_threadpool(_searched, received, options, limits)


def _searched(received: _Received, options: SearchOptions, limits: Limits) -> tuple[Query, SearchBody]:
    body = _together(SearchBody, received.fields, options)
    given = [one for one in (received.image, body.face, body.vector) if one is not None]
    if len(given) != 1:
        raise InputError("Give one of `image`, `face` and `vector`.")
    name: str = received.name
    content: bytes | int | NDArray[np.float32] = received.image or b""
    if body.face is not None:
        name, content = f"face {body.face}", body.face
    elif body.vector is not None:
        name, content = "vector", _as_vector(body.vector)
    query = Query(
        name,
        content,
        body.asked(limits.results),
        body.selection(),
        exclude_self=body.exclude_self,
        explain=body.explain,
    )
    return query, body


def read_line(line: bytes, limits: Limits) -> tuple[Query, SearchBody]:
    """Returns the query and the options of a line of a bulk search.

    Raises:
        Refusal, InputError: as `read_search`.
    """
    query, body = _searched(_of_json(line), SearchOptions(), limits)
    return replace(query, bulk=True), body


def _as_vector(numbers: list[float]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # numbers beyond float32 are infinite, which the search refuses
        return np.array(numbers, np.float32)


async def read_enrollment(
    request: Request, options: EnrollOptions, limits: Limits
) -> tuple[Photo, FaceSelection]:
    """Returns the photo of a request, and which faces of it to enroll; arguments as of `read_search`.

    Raises:
        Refusal: the body has another type, or cannot be parsed.
        InputError: an option is invalid, or there is no photo.
    """
    received = await _received(request, EnrollBody, limits)
    return await run_in_threadpool(_enrolled, received, options)


def _enrolled(received: _Received, options: EnrollOptions) -> tuple[Photo, FaceSelection]:
    fields = dict(received.fields)
    if isinstance(fields.get("metadata"), str):  # in a form
        fields["metadata"] = _json(fields["metadata"].encode(), "The field `metadata`")
    body = _together(EnrollBody, fields, options)
    if received.image is None:
        raise InputError("Give the photo as `image`.")
    name = None if body.identity is None else composed(body.identity)
    return Photo(None, name, metadata=body.metadata, content=received.image), body.selection()


async def read_upload(
    request: Request, options: UploadOptions, limits: Limits
) -> tuple[list[Sent], UploadOptions]:
    """Returns the files of a request, and how they are to be enrolled; arguments as of `read_search`.

    Raises:
        Refusal: the body is no form, or cannot be parsed.
        InputError: an option is invalid, or the files cannot be one upload.
    """
    if _kind(request) != _FORM:
        raise Refusal(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE, Code.UNSUPPORTED_MEDIA_TYPE, f"Send the files as {_FORM}."
        )
    fields, sent = await _read_form(request, UploadOptions, limits, most=MAX_FILES)
    if not sent:
        raise InputError("The form has no file; send photos or a zip as files in the field `file`.")
    body = _together(UploadOptions, fields, options)
    if body.identity is not None:
        check_identity(body.identity)
        body = body.model_copy(update={"identity": composed(body.identity)})
    uploads.check(sent, body.identity, body.identity_from)
    return sent, body


def _kind(request: Request) -> str:
    """Returns the type of a request's body, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _received(request: Request, schema: type[BaseModel], limits: Limits) -> _Received:
    """Returns what a request has in its body.

    Raises:
        Refusal: the body has another type, or cannot be parsed.
    """
    kind = _kind(request)
    if kind == _JSON:
        return await run_in_threadpool(_of_json, await request.body())
    if kind == _FORM:
        return await _of_form(request, schema, limits)
    if kind == _BYTES or kind.startswith("image/"):
        return _Received({}, await request.body())
    raise Refusal(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        Code.UNSUPPORTED_MEDIA_TYPE,
        f"Send a photo as {_FORM}, image/* or {_BYTES}, or a request as {_JSON}.",
    )


def _of_json(data: bytes) -> _Received:
    fields = dict(_json(data, "The body"))
    image = fields.pop("image", None)
    if image is None:
        return _Received(fields, None)
    try:
        return _Received(fields, base64.b64decode(image, validate=True))
    except (binascii.Error, ValueError, TypeError) as error:
        raise InputError("`image` is not base64.") from error


def _json(data: bytes, what: str) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
        Refusal: `data` is none, or has too many values; the sentence begins with `what`.
    """
    # Counted before the values are made. A photo as base64 has none of these bytes.
    if sum(map(data.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            Code.BODY_TOO_LARGE,
            f"{what} has more than {_MAX_VALUES:,} values, which is the limit.",
        )
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, Code.BAD_REQUEST, f"{what} is not JSON.") from error
    if not isinstance(found, dict):
        raise Refusal(HTTPStatus.BAD_REQUEST, Code.BAD_REQUEST, f"{what} is not a JSON object.")
    return found


def _together(schema: type[_Options], fields: Mapping[str, Any], options: BaseModel) -> _Options:
    """Returns the options of the body and of the address of a request, checked.

    Raises:
        Refusal: an option is in both, does not exist, or has a wrong value.
    """
    twice = sorted(options.model_fields_set & fields.keys())
    if twice:
        raise Refusal(
            HTTPStatus.BAD_REQUEST,
            Code.INVALID_ARGUMENT,
            f"`{twice[0]}` is in the address and in the body; give it once.",
        )
    # The sentence about each unknown one would take more than the request.
    if len(fields) > _MAX_FIELDS:
        raise Refusal(
            HTTPStatus.BAD_REQUEST,
            Code.INVALID_ARGUMENT,
            f"The body has {len(fields):,} fields, and {_MAX_FIELDS} is the limit.",
        )
    try:
        return schema.model_validate({**options.model_dump(exclude_unset=True), **fields})
    except ValidationError as error:
        raise of_validation(error.errors(include_input=False, include_url=False)) from error


async def _of_form(request: Request, schema: type[BaseModel], limits: Limits) -> _Received:
    """Returns the photo of a form and its text fields.

    The photo stays in memory: a temporary file of it would be a copy of personal data on the disk.

    Raises:
        Refusal: as `_read_form`.
        InputError: it has no photo, or a field twice.
    """
    fields, sent = await _read_form(request, schema, limits, most=1)
    if not sent:
        raise InputError("The form has no photo; send one as a file in the field `image`.")
    return _Received(fields, sent[0].content, sent[0].name)


async def _read_form(
    request: Request, schema: type[BaseModel], limits: Limits, *, most: int
) -> tuple[dict[str, Any], list[Sent]]:
    """Returns the text fields of a form and its files; a field that may have several values is a list.

    Args:
        request: the request.
        schema: of the fields.
        limits: of requests.
        most: the most files.

    Raises:
        Refusal: the form is malformed, or has too many or too long parts.
        InputError: it has a field twice.
    """
    parser = _InMemoryParser(request.headers, request.stream(), limits, most)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refusal(
            HTTPStatus.BAD_REQUEST, Code.BAD_REQUEST, f"The form cannot be read: {error.message.rstrip('.')}."
        ) from error
    try:
        items = form.multi_items()
        found = [value for _, value in items if isinstance(value, UploadFile)]
        texts = [(name, value) for name, value in items if isinstance(value, str)]
        sent = [Sent((one.filename or _UNNAMED)[:_MAX_NAME], await one.read()) for one in found]
        return _text_fields(texts, schema), sent
    finally:
        await form.close()


def _text_fields(texts: Sequence[tuple[str, str]], schema: type[BaseModel]) -> dict[str, Any]:
    lists = {name for name, one in schema.model_fields.items() if get_origin(one.annotation) is list} - {
        "vector"
    }
    fields: dict[str, Any] = {}
    for name, value in texts:
        if name in lists:
            fields.setdefault(name, []).append(value)
        elif name in fields:
            raise InputError(f"`{name[:80]}` is in the form twice; give it once.")
        else:
            fields[name] = value
    return fields


class _InMemoryParser(MultiPartParser):
    """Parses a form without a file on the disk."""

    def __init__(
        self, headers: Any, stream: AsyncGenerator[bytes, None], limits: Limits, max_files: int
    ) -> None:
        super().__init__(
            headers, stream, max_files=max_files, max_fields=_MAX_FIELDS, max_part_size=limits.text_bytes
        )
        self.spool_max_size = limits.body_bytes + 1
