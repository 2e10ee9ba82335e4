"""A section of Markdown for each command, written from the program itself: what `--help` says.

It needs nothing that only the site needs, so that the tests compare it with the program.
"""

import re
from collections.abc import Iterator
from typing import Any

import typer

from retrieval.cli.app import app

# Where a guide says more than `--help`: a page, perhaps with a section, and what to call the link.
GUIDES = {
    "audit": ("audit.md", "Audit a gallery"),
    "audit-log": ("backups.md#who-did-what", "Who did what"),
    "backup": ("backups.md", "Back up, restore, verify, repair"),
    "calibrate": ("calibrating.md", "Say UNKNOWN to strangers"),
    "check": ("check.md", "Check photos before training"),
    "compact": ("moving.md#keep-a-gallery-fast-and-small", "Keep a gallery fast and small"),
    "derive": ("embedding.md", "How an embedding is computed"),
    "dismiss-doubt": ("audit.md#dismiss-a-doubt", "Dismiss a doubt"),
    "embed": ("enrolling.md#embed-without-a-gallery", "Embed without a gallery"),
    "evaluate": ("evaluation.md", "How good a model is"),
    "export": ("moving.md#export-and-import", "Export and import"),
    "forget": ("erasing.md", "Erasing a person"),
    "import": ("moving.md#export-and-import", "Export and import"),
    "ingest": ("enrolling.md", "Enroll photos"),
    "assign-identity": ("faces.md#photos-of-several-people", "Photos of several people"),
    "merge-identities": ("moving.md#rename-and-merge-people", "Rename and merge people"),
    "model import": ("importing.md", "Bring your own model"),
    "optimize": ("moving.md#keep-a-gallery-fast-and-small", "Keep a gallery fast and small"),
    "reembed": ("moving.md#switch-to-another-model", "Switch to another model"),
    "publish": ("many-machines.md#answer-searches-from-many-machines", "Answer searches from many machines"),
    "follow": ("many-machines.md#what-a-follower-is", "What a follower is"),
    "published": (
        "many-machines.md#forgetting-reaches-every-follower",
        "Forgetting reaches every follower",
    ),
    "relocate": ("moving.md#the-library-has-moved", "The library has moved"),
    "rename-identity": ("moving.md#rename-and-merge-people", "Rename and merge people"),
    "repair": ("backups.md#repair", "Repair"),
    "restore": ("backups.md#restore", "Restore"),
    "search": ("searching.md", "Search a gallery"),
    "serve": ("service.md", "Serve a gallery over HTTP"),
    "token create": ("service.md#tokens", "Tokens"),
    "token list": ("service.md#tokens", "Tokens"),
    "token revoke": ("service.md#tokens", "Tokens"),
    "train": ("training.md", "Train a model"),
    "undo-merge": ("moving.md#undo-a-merge", "Undo a merge"),
    "verify": ("backups.md#verify", "Verify"),
}


def commands() -> dict[str, Any]:
    """Each command of the program by its name, in the order of `faceprint --help`."""
    group: Any = typer.main.get_command(app)
    return {name: command for name, command in group.commands.items() if not command.hidden}


def markdown() -> str:
    """All commands as MyST Markdown: a section each, with usage, description, arguments and options."""
    return "\n".join(line for name, command in commands().items() for line in _section(name, command))


def _section(name: str, command: Any) -> Iterator[str]:
    context = command.make_context(f"faceprint {name}", [], resilient_parsing=True)
    yield f"## faceprint {name}\n"
    yield f"```text\n{_usage(context)}\n```\n"
    yield f"{_escaped(command.help or '')}\n"
    if name in GUIDES:
        page, title = GUIDES[name]
        yield f"Guide: [{title}]({page}).\n"
    for kind, title in (("argument", "Arguments"), ("option", "Options")):
        records = [_record(each, context) for each in command.params if each.param_type_name == kind]
        rows = [record for record in records if record is not None]
        if rows:
            yield f"**{title}**\n"
            yield from (f"`{term}`\n: {_escaped(meaning) or '(no help)'}\n" for term, meaning in rows)


def _usage(context: Any) -> str:
    usage = " ".join(context.command.get_usage(context).removeprefix("Usage: ").split())
    # Typer puts needed arguments in braces, which mean a choice elsewhere.
    return re.sub(r"\{([^{}|]+)\}", r"\1", usage)


def _record(parameter: Any, context: Any) -> tuple[str, str] | None:
    """How a parameter is written, and what `--help` says of it; None where it is hidden."""
    if parameter.param_type_name == "argument":
        return (parameter.metavar or parameter.name.upper()), parameter.help or ""
    record: tuple[str, str] | None = parameter.get_help_record(context)
    return record


def _escaped(text: str) -> str:
    """Help text as Markdown: options become code, and what Markdown would read as markup is escaped."""
    pieces = re.split(r"(`[^`]*`)", text.replace("\b", "").strip())
    return "".join(piece if piece.startswith("`") else _escaped_prose(piece) for piece in pieces)


def _escaped_prose(text: str) -> str:
    text = re.sub(r"([\\*_<>\[\]|~$])", r"\\\1", text)
    return re.sub(r"(?<![\w/-])(--?[a-z][a-z0-9-]*)", r"`\1`", text)
