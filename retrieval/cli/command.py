"""The class of all commands: accepts old spellings, refuses unusable options, names options in errors.

The class of the program finds commands with a name of two words.
"""

import re
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, Final

import typer
from typer.core import TyperCommand, TyperGroup

from retrieval.cli.modes import refuse_unusable
from retrieval.cli.output_files import refuse_addresses, refuse_collisions, refuse_unwritable
from retrieval.cli.spellings import JSON_NAMED_A_FILE, in_todays, json_in_a_file, renewed
from retrieval.errors import FaceprintError

# An argument of the library in its errors: `out`, or `device='cpu'`.
_ARGUMENT: Final = re.compile(r"`(\w+)(?:=([^`]*))?`")

# Arguments of the library, and the parameters of commands that set them, where the names differ.
_CALLED: Final = {
    "learning_rate": "lr",
    "validation_fraction": "val_fraction",
    "fraction": "val_fraction",
    "trusted": "model",  # `ingest --embeddings` trusts vectors of a file once a model is named
    "drop_other_model": "drop_other",
}

# The option of each parameter of the running command.
_OPTIONS: ContextVar[Mapping[str, str]] = ContextVar("options", default=MappingProxyType({}))


class Commands(TyperGroup):
    """All commands. `model import` is one beside `model`, whose first argument is a folder."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Returns the command that the first arguments name, and the others."""
        name = " ".join(args[:2])
        if len(args) > 1 and name in self.commands:
            return name, self.commands[name], args[2:]
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """Returns completions of one word: a shell would quote the space in a name of two."""
        return [one for one in super().shell_complete(ctx, incomplete) if " " not in one.value]


class Command(TyperCommand):
    """A command of faceprint: see the module."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses arguments, and prints a sentence about each old spelling among them."""
        args, notices = renewed(self._named, args)
        if self._named in JSON_NAMED_A_FILE and self._json_names_a_file(ctx, args):
            args, further = json_in_a_file(args)
            notices += further
        for sentence in [] if ctx.resilient_parsing else notices:
            typer.echo(f"faceprint: {sentence}", err=True)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command, unless an option is of no use; names options in the errors of the library.

        Raises:
            InputError: an option is of no use beside the others, or a file to write cannot be written.
            FaceprintError: the command raised it; its sentence names options in place of arguments.
        """
        spelled = self._spelled()
        given = {name: value for name, value in ctx.params.items() if _is_given(ctx, name)}
        refuse_unusable(self._named, given, spelled)
        refuse_addresses(given, spelled)
        refuse_collisions(self._named, given, spelled)
        refuse_unwritable(self._named, given, spelled)
        token = _OPTIONS.set(spelled)
        try:
            return super().invoke(ctx)
        except FaceprintError as error:
            sentence = in_todays(self._named, in_options(str(error), spelled))
            error.args = (sentence, *error.args[1:])
            raise
        finally:
            _OPTIONS.reset(token)

    @property
    def _named(self) -> str:
        return self.name or ""

    def _json_names_a_file(self, ctx: Any, args: list[str]) -> bool:
        """Returns whether --json has a value, which shows as one more argument than the command takes."""
        # Errors in the arguments are raised by the actual parsing, not by this one.
        # It has the same names for help: a command makes its option --help once, and keeps it.
        trial = typer.Context(self, resilient_parsing=True, help_option_names=ctx.help_option_names)
        parser = self.make_parser(trial)
        _, spare, _ = parser.parse_args(args=list(args))
        return bool(spare) or any(word.startswith("--json=") for word in args)

    def _spelled(self) -> dict[str, str]:
        """Returns the name of each parameter on the command line."""
        return {one.name: _spelling(one) for one in self.params if one.name is not None}


def _is_given(ctx: Any, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name).strip("[].")
    return str(max(parameter.opts, key=len))


def in_current_options(sentence: str) -> str:
    """Returns a sentence of the library with the options of the running command in place of arguments."""
    return in_options(sentence, _OPTIONS.get())


def in_options(sentence: str, spelled: Mapping[str, str]) -> str:
    """Returns a sentence of the library with the options of a command in place of arguments of a function."""

    def option(found: "re.Match[str]") -> str:
        name, value = found[1], found[2]
        name = spelled.get(_CALLED.get(name, name), "")
        if not name:
            return found[0]
        return name if value in (None, "True") else f"{name} {value.strip(chr(39))}"

    return _ARGUMENT.sub(option, sentence)
