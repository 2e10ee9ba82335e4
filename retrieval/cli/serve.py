"""The commands of the service: `serve`, and `token create`, `token list`, `token revoke`."""

import os
import shlex
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrieval.cli import options
from retrieval.cli.output import print_json
from retrieval.console import terminal
from retrieval.errors import GalleryError, InputError, MissingDependency
from retrieval.system.places import Place

if TYPE_CHECKING:
    from retrieval.service.settings import Settings
    from retrieval.service.tokens import Scope


def serve(
    gallery: options.Gallery,
    host: Annotated[str, typer.Option(metavar="HOST", help="The name or IP address to listen on; other than this machine's loopback only with tokens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for any free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="How many processes answer.")] = 1,
    max_body: Annotated[int, typer.Option("--max-body", metavar="MIB", min=1, max=1024, help="The largest body of a request in MiB.")] = 32,
    max_pending: Annotated[int, typer.Option("--max-pending", min=1, help="Requests that a process reads or answers at a time; more are told to come again.")] = 64,
    sources: Annotated[list[Path] | None, typer.Option("--sources", metavar="FOLDER", help="Let callers enroll photos below this folder, by jobs; may be repeated.", show_default=False)] = None,
    max_rate: Annotated[float | None, typer.Option("--max-rate", metavar="N", help="Requests per second of one token, or of one address without tokens, that a process takes.", show_default="no limit")] = None,
    certfile: Annotated[Path | None, typer.Option("--certfile", metavar="FILE", help="Speak TLS with the certificate in this PEM file, followed by those that lead to its authority.", show_default=False)] = None,
    keyfile: Annotated[Path | None, typer.Option("--keyfile", metavar="FILE", help="Its private key in PEM.", show_default="in the certificate's file")] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log a line for each request on standard error, without names.")] = False,
    device: options.Device = "auto",
    precision: options.Precision = "float32",
) -> None:  # fmt: skip
    """Answer searches of a gallery over HTTP, until Ctrl-C or SIGTERM: for people a page, for programs JSON.

    Open the address that it prints in a browser. Programs ask it by POST /v1/search, from other machines with a
    token; /openapi.json describes all it answers.
    """
    require_packages()
    from retrieval.service.settings import MIB, Limits, Settings

    settings = Settings(
        gallery,
        host=host,
        port=port,
        workers=workers,
        device=device,
        precision=precision,
        access_log=access_log,
        sources=tuple(map(_existing_folder, sources or ())),
        certfile=certfile,
        keyfile=keyfile,
        limits=Limits(body_bytes=max_body * MIB, pending=max_pending, rate=max_rate),
    )
    run(settings)


def run(settings: "Settings", *, open_page: bool = False) -> None:
    """Answers requests until Ctrl-C or SIGTERM.

    Args:
        settings: of the service.
        open_page: open its page in a browser, where there is a screen.

    Raises:
        InputError: the address cannot be used, or other machines would reach a gallery without tokens.
        FaceprintError: as `Service`.
    """
    from retrieval.service import server, tokens
    from retrieval.service import workers as processes
    from retrieval.service.logs import log_to_standard_error
    from retrieval.service.service import Service
    from retrieval.service.tls import check_certificate

    place = settings.place
    _require_gallery(place)
    if settings.certfile is not None:
        check_certificate(settings.certfile, settings.keyfile)
    valid = [token for token in tokens.read(tokens.folder_of(place)) if token.state() == "valid"]
    with server.listening(settings.host, settings.port) as sockets:
        tls = settings.certfile is not None
        at, needs_token = server.address(sockets, tls=tls), not server.is_private(sockets)
        if needs_token and not valid:
            raise InputError(
                f"{settings.host} can be reached from other machines, and {place} has no valid token; "
                f"create one with `faceprint token create {shlex.quote(str(place))} --name NAME`, or leave `host` out."
            )

        def started() -> None:
            typer.echo(f"serving {place} at {at}; Ctrl-C stops it")
            if open_page and _has_screen():
                webbrowser.open(at)

        log_to_standard_error()
        if settings.workers == 1:
            server.run(Service(settings, needs_token=needs_token), sockets, started=started)
        else:
            processes.run(settings, sockets, needs_token=needs_token, started=started)


def token_create(
    gallery: options.Gallery,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Who uses it: it stands in the audit log.", show_default=False)],
    scope: Annotated[str, typer.Option(metavar="read|write|admin", help="read: search and show; write: enroll, annotate, rename, merge too; admin: forget too.")] = "read",
    expires: Annotated[str | None, typer.Option(metavar="90d|DATE", help="When it stops being valid: in a number of days, or at a date.", show_default="never")] = None,
) -> None:  # fmt: skip
    """Create a token for a program that asks the service of a gallery, and print it, this once.

    The gallery's folder has only its SHA-256. From the first token on the service refuses requests without one.
    """
    from retrieval.service import tokens

    _require_gallery(gallery)
    secret, made = tokens.create(tokens.folder_of(gallery), name, _scope(scope), expires=expires)
    until = "never expires" if made.expires_at is None else f"expires {made.expires_at}"
    typer.echo(f"token {made.name}, scope {made.scope}, {until}; it cannot be shown again", err=True)
    typer.echo(secret)


def token_list(gallery: options.Gallery, as_json: options.Json = False) -> None:
    """List the tokens of a gallery, with the expired and the revoked ones, and when each was used last."""
    from retrieval.service import tokens

    _require_gallery(gallery)
    used = tokens.last_uses(tokens.folder_of(gallery))
    rows = [
        {
            "name": token.name,
            "scope": str(token.scope),
            "state": token.state(),
            "created_at": token.created_at,
            "expires_at": token.expires_at,
            "last_used_at": used.get(token.id),
        }
        for token in tokens.read(tokens.folder_of(gallery))
    ]
    if as_json:
        print_json(rows)
        return
    if not rows:
        typer.echo(
            f"{gallery} has no token; create one with `faceprint token create {shlex.quote(str(gallery))} "
            "--name NAME`"
        )
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for title in rows[0]:
        table.add_column(title.removesuffix("_at").replace("_", " "))
    for row in rows:
        table.add_row(*(terminal.text(value or "-") for value in row.values()))
    terminal.console().print(table, soft_wrap=False)


def token_revoke(
    gallery: options.Gallery,
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Whose token.", show_default=False)],
) -> None:
    """Revoke a token: the next request with it is refused, also by services that run."""
    from retrieval.service import tokens

    _require_gallery(gallery)
    token = tokens.revoke(tokens.folder_of(gallery), name)
    typer.echo(f"revoked {token.name}, scope {token.scope}", err=True)


def _has_screen() -> bool:
    """Returns whether a browser would have a window; elsewhere one of the terminal would take the terminal."""
    named = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    return named or sys.platform in ("darwin", "win32")


def _scope(text: str) -> "Scope":
    from retrieval.service.tokens import Scope

    if text not in list(Scope):
        raise InputError(f"There is no scope {text[:80]!a}; choose one of {', '.join(Scope)}.")
    return Scope(text)


def _existing_folder(folder: Path) -> Path:
    options.require(folder.is_dir(), f"--sources {folder} is no folder; name one that exists")
    return folder.absolute()


def _require_gallery(place: Place) -> None:
    """Checks that there may be a gallery; opening it says more.

    Raises:
        GalleryError: it is none.
    """
    from retrieval.gallery.creation import is_free
    from retrieval.storage.layout import DATABASE

    missing = is_free(place) if place.folder is None else not (place.folder / DATABASE).exists()
    if missing:
        raise GalleryError(f"There is no gallery {place}; make one with `faceprint ingest`.")


def require_packages() -> None:
    """Checks that the packages of the service are installed.

    Raises:
        MissingDependency: one of them is not.
    """
    from importlib.util import find_spec

    for package in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        if find_spec(package) is None:
            raise MissingDependency(
                f"The service needs {package}; install it with pip install 'faceprint[service]'."
            )
