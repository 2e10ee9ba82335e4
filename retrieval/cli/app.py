"""The command line `faceprint`: registers all commands, turns errors into a sentence and an exit status.

Heavy imports are inside the commands, so that help is instant.
"""

import warnings
from collections.abc import Callable
from typing import Annotated, Final, NoReturn

import typer

from retrieval.cli import (
    audit,
    calibrate,
    check,
    demo,
    embed,
    evaluate,
    ingest,
    maintenance,
    model,
    people,
    publish,
    search,
    serve,
    show,
    train,
    transfer,
)
from retrieval.cli.command import Command, Commands
from retrieval.errors import FaceprintError, RunError
from retrieval.system import streams

app = typer.Typer(
    name="faceprint",
    cls=Commands,
    help="Who is this, and which stored photos are closest?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MAINTENANCE: Final = "Looking after a gallery"

# Commands by the heading under which help lists them, in the order of help; one has a name of two words.
_COMMANDS: Final[dict[str | None, dict[str, Callable[..., None]]]] = {
    None: {
        "train": train.train,
        "derive": train.derive,
        "evaluate": evaluate.evaluate,
        "model": show.model,
        "model import": model.import_,
        "ingest": ingest.ingest,
        "embed": embed.embed,
        "info": show.info,
        "demo": demo.demo,
        "search": search.search,
        "serve": serve.serve,
        "check": check.check,
    },
    _MAINTENANCE: {
        "calibrate": calibrate.calibrate,
        "verify": maintenance.verify,
        "repair": maintenance.repair,
        "forget": people.forget,
        "compact": maintenance.compact,
        "optimize": maintenance.optimize,
        "assign-identity": people.assign_identity,
        "rename-identity": people.rename_identity,
        "merge-identities": people.merge_identities,
        "undo-merge": people.undo_merge,
        "relocate": maintenance.relocate,
        "backup": transfer.backup,
        "restore": transfer.restore,
        "copy": transfer.copy,
        "export": transfer.export,
        "import": transfer.import_,
        "publish": publish.publish,
        "follow": publish.follow,
        "published": publish.published,
        "audit": audit.audit,
        "dismiss-doubt": audit.dismiss_doubt,
        "audit-log": audit.audit_log,
        "reembed": maintenance.reembed,
        "token create": serve.token_create,
        "token list": serve.token_list,
        "token revoke": serve.token_revoke,
    },
}

for _panel, _commands in _COMMANDS.items():
    for _name, _command in _commands.items():
        app.command(_name, cls=Command, rich_help_panel=_panel)(_command)


def main() -> None:
    """Runs the console script; every error that a user can cause gives one sentence and an exit status."""
    streams.restart_in_utf8()
    streams.prepare()
    # Pillow warns about unusual files as it reads them; the report has what matters of that.
    warnings.filterwarnings("ignore", module="PIL")
    try:
        _run()
    except SystemExit as end:
        lost = streams.lost()
        if lost is not None and not end.code:
            _fail(
                f"The output is not complete: {(lost.strerror or str(lost)).lower()}.", RunError.exit_status
            )
        raise


def _run() -> None:
    try:
        app(prog_name="faceprint")
    except FaceprintError as error:
        _fail(str(error), error.exit_status)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(f"The operating system refused{where}: {error.strerror or error}.", RunError.exit_status)


def _fail(sentence: str, status: int) -> NoReturn:
    from retrieval.system.paths import printable

    # The sentence may contain a path, which may have any bytes and must not control the terminal.
    typer.echo("\n".join(map(printable, f"faceprint: {sentence}".split("\n"))), err=True)
    raise SystemExit(status)


def _version(wanted: bool) -> None:
    if wanted:
        from retrieval import __version__

        typer.echo(f"faceprint {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Who is this, and which stored photos are closest?"""


if __name__ == "__main__":
    main()
