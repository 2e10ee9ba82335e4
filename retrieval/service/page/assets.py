"""The files that pages load: stylesheet, scripts, icon. A browser keeps each of them until it changes."""

import hashlib
from functools import cache
from importlib import resources
from typing import Final

from fastapi import APIRouter
from starlette.responses import Response

from retrieval.errors import NotFound

_TYPES: Final = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "htmx.min.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}

router = APIRouter(include_in_schema=False)


@router.get("/static/{name}")
async def show_asset(name: str) -> Response:
    """A file of the page."""
    if name not in _TYPES:
        raise NotFound("The page has no such file.")
    headers = {"cache-control": "public, max-age=31536000, immutable"}
    return Response(_content(name), media_type=_TYPES[name], headers=headers)


@cache
def address(name: str) -> str:
    """Returns the address of a file, which changes with its bytes."""
    return f"/static/{name}?v={hashlib.sha256(_content(name)).hexdigest()[:12]}"


@cache
def _content(name: str) -> bytes:
    return (resources.files("retrieval.service.page") / "static" / name).read_bytes()
