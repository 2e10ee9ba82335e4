"""What the pages share: templates, headers, what a viewer may do, and how refusals look to people."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final
from urllib.parse import quote

from fastapi import Request
from markupsafe import Markup, escape
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import Scope as AsgiScope

from retrieval.pages import html
from retrieval.service.gate import OPEN_PATHS, SIGN_IN
from retrieval.service.page import assets
from retrieval.service.refusals import Code, Refusal
from retrieval.service.routes.common import service_of
from retrieval.service.service import Service
from retrieval.service.sessions import COOKIE, FORM_TOKEN_HEADER
from retrieval.service.tokens import Scope, Token

# Everything comes from this service. The photo of an answer, which is not stored, is part of the page; a
# thumbnail that was asked for a second time is a blob.
_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS: Final = {"content-security-policy": _POLICY, "referrer-policy": "same-origin"}

# Closest photos that are shown of a face.
CLOSEST: Final = 6

_FORM: Final = "application/x-www-form-urlencoded"

# What is for programs alone.
_OF_PROGRAMS: Final = OPEN_PATHS | {"/metrics"}

_TITLES: Final = {
    HTTPStatus.NOT_FOUND: "Not found",
    HTTPStatus.FORBIDDEN: "Not allowed",
    HTTPStatus.TOO_MANY_REQUESTS: "Busy",
    HTTPStatus.SERVICE_UNAVAILABLE: "Not available now",
}


def _minute(time: str) -> str:
    """Returns a time for people, from ISO 8601 in UTC."""
    return f"{time[:10]} {time[11:16]} UTC"


def _bdi(name: object) -> Markup:
    """Returns a name, or another text of a user, so that its direction changes nothing around it."""
    return Markup("<bdi>{}</bdi>").format(html.readable(str(name)))


def _isolated(name: str) -> Markup:
    """Returns the same for where no elements may stand, such as titles: between FSI and PDI of Unicode."""
    return Markup("\u2068{}\u2069").format(html.readable(name))


def _naming(sentence: str, names: Iterable[str]) -> Markup:
    """Returns a sentence in which each of some names is isolated wherever it occurs."""
    shown = sorted({html.readable(name) for name in names if name}, key=len, reverse=True)
    if not shown:
        return escape(html.readable(sentence))
    # The pieces of a split by a group alternate: outside, name, outside.
    pieces = re.split(f"({'|'.join(map(re.escape, shown))})", html.readable(sentence))
    return Markup("").join(_bdi(piece) if place % 2 else piece for place, piece in enumerate(pieces))


def _exact(name: str) -> Markup:
    """Returns a name that a form sends back: with the characters that are only shown as boxes."""
    return escape(name)


_templates: Final = html.environment(
    "retrieval.service.page",
    "templates",
    filters={
        "minute": _minute,
        "bdi": _bdi,
        "isolated": _isolated,
        "naming": _naming,
        "exact": _exact,
    },
)
_templates.globals["asset"] = assets.address


@dataclass(frozen=True, slots=True)
class Viewer:
    """The one who looks at a page.

    Attributes:
        may_write, may_forget: what their token allows; everything where none is needed, nothing without one.
        token: the name of the token; None where none is needed.
        form_token: what their forms send.
        signed_in: whether they may know of the gallery: not after a refusal, nor without a session.
    """

    may_write: bool
    may_forget: bool
    token: str | None
    form_token: str
    signed_in: bool

    @classmethod
    def of(cls, request: Request, service: Service) -> "Viewer":
        """Returns the viewer who sent a request."""
        token: Token | None = request.state.token
        needed = service.needs_token or service.tokens.required
        signed_in = request.state.admitted and (token is not None or not needed)
        return cls(
            may_write=signed_in and (token is None or token.scope.includes(Scope.WRITE)),
            may_forget=signed_in and (token is None or token.scope.includes(Scope.ADMIN)),
            token=None if token is None else token.name,
            form_token=service.sessions.form_token(_session(request)) if signed_in else "",
            signed_in=signed_in,
        )


def page(
    request: Request,
    template: str,
    *,
    status: int = HTTPStatus.OK,
    service: Service | None = None,
    **values: Any,
) -> Response:
    """Returns a page, or the part of one that a template makes.

    Args:
        request: the request.
        template: the name of the template, without its endings.
        status: of the response.
        service: None for that of the request.
        values: what the template shows.
    """
    service = service_of(request) if service is None else service
    viewer = Viewer.of(request, service)
    title = service.gallery.name.rpartition("/")[2] if viewer.signed_in else "faceprint"
    text = _templates.get_template(f"{template}.html.jinja").render(viewer=viewer, gallery=title, **values)
    # Where a name got through that UTF-8 cannot encode, its bytes are shown.
    return HTMLResponse(text.encode("utf-8", "backslashreplace"), status, _HEADERS)


def see(address: str) -> Response:
    """Returns the response after a change: the browser loads another page, and going back repeats nothing."""
    return RedirectResponse(address, HTTPStatus.SEE_OTHER)


def is_partial(request: Request) -> bool:
    """Returns whether a part of a page is asked for, to be put into the page that is shown."""
    return "hx-request" in request.headers


async def check_form(request: Request) -> None:
    """Checks that a change was sent by a page of this session.

    Raises:
        Refusal: it was not.
    """
    given = request.headers.get(FORM_TOKEN_HEADER)
    if given is None and request.headers.get("content-type", "").startswith(_FORM):
        given = str((await request.form()).get("form_token", ""))
    if not service_of(request).sessions.is_form_token(given or "", _session(request)):
        raise Refusal(
            HTTPStatus.FORBIDDEN,
            Code.FORBIDDEN,
            "The page that sent this is of another session; load it again, and repeat what you did.",
        )


def is_for_people(scope: AsgiScope) -> bool:
    """Returns whether a browser asks for a page, and not a program."""
    headers = Request(scope).headers
    asks = "text/html" in headers.get("accept", "") or "hx-request" in headers
    return asks and scope["path"] not in _OF_PROGRAMS and not scope["path"].startswith("/v1/")


def refusal_page(refusal: Refusal, request_id: str, scope: AsgiScope, service: Service) -> Response:
    """Returns what people see of a refusal; without a session that is where they sign in."""
    request = Request(scope)
    if refusal.status == HTTPStatus.UNAUTHORIZED:
        return _to_sign_in(request)
    return page(
        request,
        "problem" if is_partial(request) else "refusal",
        status=refusal.status,
        service=service,
        title=_TITLES.get(HTTPStatus(refusal.status), "That did not work"),
        refusal=refusal,
        request_id=request_id,
        again=_own_address(request) if _was_led_here(request) else None,
    )


def _to_sign_in(request: Request) -> Response:
    if is_partial(request):
        return Response(status_code=HTTPStatus.UNAUTHORIZED, headers={"hx-redirect": SIGN_IN})
    to = _own_address(request) if request.method == "GET" else "/"
    return see(SIGN_IN if to == "/" else f"{SIGN_IN}?to={quote(to, safe='/')}")


def _was_led_here(request: Request) -> bool:
    """Returns whether a link on another site led here: the same page, opened from here, is no danger."""
    origin = request.headers.get("sec-fetch-site", "none")
    return request.method == "GET" and origin not in ("none", "same-origin")


def _own_address(request: Request) -> str:
    query = request.scope["query_string"].decode("ascii", "replace")
    return quote(request.scope["path"]) + (f"?{query}" if query else "")


def _session(request: Request) -> str:
    """Returns the cookie of the session of a request; empty where it has none."""
    return "" if request.state.token is None else request.cookies.get(COOKIE, "")
