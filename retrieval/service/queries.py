"""Queries of requests: a photo as a form, as raw bytes or as base64; a stored face, or a vector, as JSON."""

import base64
import binascii
import json
from collections.abc import AsyncGenerator, Mapping
from http import HTTPStatus
from typing import Any, Final, get_origin

import numpy as np
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from retrieval.errors import InputError
from retrieval.service.engine import Query
from retrieval.service.refusals import Code, Refusal, of_validation
from retrieval.service.schemas import SearchBody, SearchOptions
from retrieval.service.settings import Limits

# The most text fields of a form, and the greatest length of a name that a photo gets in answers.
_MAX_FIELDS: Final = 64
_MAX_NAME: Final = 255

_JSON: Final = "application/json"
_FORM: Final = "multipart/form-data"
_BYTES: Final = "application/octet-stream"

# The options with several values.
_LISTS: Final = frozenset(
    name for name, field in SearchOptions.model_fields.items() if get_origin(field.annotation) is list
)

# What the OpenAPI document says of the bodies.
SEARCH_BODY: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {
            _JSON: {"schema": {"$ref": "#/components/schemas/SearchBody"}},
            _FORM: {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": {"type": "string", "format": "binary"}},
                    "description": "One photo; other fields are options, as in the query.",
                }
            },
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            _BYTES: {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


async def read_search(request: Request, options: SearchOptions, limits: Limits) -> tuple[Query, SearchBody]:
    """Returns the query of a request and its options.

    Args:
        request: the request; options may be in its query and in its body, each in one place.
        options: those of its query.
        limits: of requests.

    Raises:
        Refusal: the body has another type, or cannot be parsed.
        InputError: an option is invalid, or there is not exactly one photo, face or vector.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == _JSON:
        body = await run_in_threadpool(_parsed, await request.body())
        return await run_in_threadpool(_of_json, body, options, limits)
    if kind == _FORM:
        name, image, fields = await read_form(request, limits, files=1)
        return _query(name, image, _together(fields, options), limits)
    if kind == _BYTES or kind.startswith("image/"):
        return _query("image", await request.body(), _together({}, options), limits)
    raise Refusal(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        Code.UNSUPPORTED_MEDIA_TYPE,
        f"Send a photo as {_FORM}, image/* or {_BYTES}, or a query as {_JSON}.",
    )


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refusal(HTTPStatus.BAD_REQUEST, Code.BAD_REQUEST, "The body is not JSON.") from error
    if not isinstance(body, dict):
        raise Refusal(HTTPStatus.BAD_REQUEST, Code.BAD_REQUEST, "The body is not a JSON object.")
    return body


def _of_json(fields: Mapping[str, Any], options: SearchOptions, limits: Limits) -> tuple[Query, SearchBody]:
    body = _together(fields, options)
    given = [name for name in ("image", "face", "vector") if getattr(body, name) is not None]
    if len(given) != 1:
        raise InputError("Give one of `image`, `face` and `vector`.")
    if body.face is not None:
        return _query(f"face {body.face}", body.face, body, limits)
    if body.vector is not None:
        return _query("vector", np.array(body.vector, np.float32), body, limits)
    try:
        image = base64.b64decode(body.image or "", validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError("`image` is not base64.") from error
    return _query("image", image, body, limits)


def _query(
    name: str, content: "bytes | int | np.ndarray[Any, Any]", body: SearchBody, limits: Limits
) -> tuple[Query, SearchBody]:
    if isinstance(content, bytes) and len(content) > limits.body_bytes:
        raise Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            Code.BODY_TOO_LARGE,
            f"The photo has more than {limits.body_bytes:,} bytes, which is the limit.",
        )
    asked = body.asked(limits.results)
    query = Query(
        name,
        content,
        asked,
        body.selection(),
        exclude_self=body.exclude_self,
        explain=body.explain,
    )
    return query, body


def _together(fields: Mapping[str, Any], options: SearchOptions) -> SearchBody:
    """Returns the options of the body and of the query of a request, checked.

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
    try:
        return SearchBody.model_validate({**options.model_dump(exclude_unset=True), **fields})
    except ValidationError as error:
        raise of_validation(error.errors(include_input=False, include_url=False)) from error


async def read_form(request: Request, limits: Limits, *, files: int) -> tuple[str, bytes, dict[str, Any]]:
    """Returns the name and the bytes of the photo in a form, and the text fields.

    A field that may have several values is a list. The photo stays in memory: a temporary file of it would be
    a copy of personal data on the disk.

    Raises:
        Refusal: the form is malformed, or has too many or too long parts, or not one photo.
    """
    parser = _InMemoryParser(request.headers, request.stream(), files=files, limits=limits)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refusal(
            HTTPStatus.BAD_REQUEST, Code.BAD_REQUEST, f"The form cannot be read: {error.message.rstrip('.')}."
        ) from error
    fields: dict[str, Any] = {}
    photos: list[UploadFile] = []
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                photos.append(value)
            elif name in _LISTS:
                fields.setdefault(name, []).append(value)
            elif name in fields:
                raise InputError(f"`{name[:80]}` is in the form twice; give it once.")
            else:
                fields[name] = value
        if len(photos) != 1:
            raise InputError("The form has no photo; send one as a file in the field `image`.")
        name = (photos[0].filename or "image")[:_MAX_NAME]
        return name, await photos[0].read(), fields
    finally:
        await form.close()


class _InMemoryParser(MultiPartParser):
    """Parses a form without a file on the disk."""

    def __init__(
        self, headers: Any, stream: AsyncGenerator[bytes, None], *, files: int, limits: Limits
    ) -> None:
        super().__init__(
            headers, stream, max_files=files, max_fields=_MAX_FIELDS, max_part_size=limits.text_bytes
        )
        self.spool_max_size = limits.body_bytes + 1
