"""Signing in to the page with a token, once, and signing out."""

from http import HTTPStatus

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from retrieval.service.gate import SIGN_IN
from retrieval.service.page.rendering import check_form, page, see
from retrieval.service.routes.common import service_of
from retrieval.service.sessions import COOKIE, SECONDS

router = APIRouter(include_in_schema=False)
changing = APIRouter(include_in_schema=False, dependencies=[Depends(check_form)])


@router.get(SIGN_IN)
async def show_sign_in(request: Request, to: str = "/") -> Response:
    """Where a token is asked for."""
    service = service_of(request)
    if not (service.needs_token or service.tokens.required):
        return see("/")
    return page(request, "sign_in", to=_of_this_service(to), wrong=False)


@router.post(SIGN_IN)
async def sign_in(request: Request) -> Response:
    """Begins a session; a wrong token is refused as `Gate` refuses it."""
    service = service_of(request)
    form = await request.form()
    to = _of_this_service(str(form.get("to", "/")))
    token = await run_in_threadpool(service.tokens.find, str(form.get("token", "")).strip())
    if token is None:
        return page(request, "sign_in", status=HTTPStatus.UNAUTHORIZED, to=to, wrong=True)
    response = see(to)
    response.set_cookie(
        COOKIE,
        service.sessions.begun(token),
        max_age=SECONDS,
        httponly=True,
        samesite="strict",
        # Where a proxy speaks TLS, the service itself does not, and the browser says it.
        secure="https" in (request.url.scheme, request.headers.get("origin", "").partition(":")[0]),
    )
    return response


@changing.post("/sign-out")
async def sign_out(request: Request) -> Response:
    """Ends the session in this browser."""
    response = see(SIGN_IN)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return response


def _of_this_service(address: str) -> str:
    """Returns an address that leads to no other site: the given one, or that of the first page."""
    is_own = address.startswith("/") and not address.startswith(("//", "/\\")) and address.isprintable()
    return address if is_own else "/"
