"""An option that is of no use beside the others is refused, for every row of the table."""

from typing import Any

import pytest
import typer

from retrieval.cli import modes
from retrieval.cli.app import app
from retrieval.cli.modes import USES, Use
from tests.cli.test_app import Faceprint, faceprint

__all__ = ["faceprint"]  # pytest finds the fixture by its name

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

# Values of options whose type alone does not say one that is taken.
VALUES = {"min_images": "3", "photo_seconds": "3", "fpir": "0.1", "val_fraction": "0.5"}

REFUSED_WITHOUT = [
    (command, use, option)
    for command, uses in USES.items()
    for use in uses
    if use.needs
    for option in use.options
]
REFUSED_WITH = [
    (command, use, option, bar)
    for command, uses in USES.items()
    for use in uses
    for bar in use.bars
    for option in use.options
]


def parameter(command: str, name: str) -> Any:
    return next(one for one in COMMANDS[command].params if one.name == name)


def typed(command: str, condition: str) -> list[str]:
    """What a user types for an option of a command, or for one with a value."""
    name, _, value = condition.partition("=")
    found = parameter(command, name)
    if found.param_type_name == "argument":
        return []
    option = max(found.opts, key=len)
    return [option] if found.is_flag else [option, value or VALUES.get(name, "1")]


def required(command: str) -> list[str]:
    """What a user types in any case: arguments, and options that a command cannot do without."""
    return [
        word
        for one in COMMANDS[command].params
        if one.required
        for word in (["x"] if one.param_type_name == "argument" else typed(command, one.name))
    ]


def spelled(command: str) -> dict[str, str]:
    return {one.name: one.name for one in COMMANDS[command].params}


@pytest.mark.parametrize(
    ("command", "use", "option"), REFUSED_WITHOUT, ids=lambda one: "" if isinstance(one, Use) else one
)
def test_an_option_is_refused_without_what_it_goes_with(
    command: str, use: Use, option: str, faceprint: Faceprint
) -> None:
    also = typed(command, use.when) if use.when else []
    status, out, err = faceprint(command, *required(command), *typed(command, option), *also)
    name = typed(command, option)[0]
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith(f"faceprint: {name} is of use only with ")
    assert err.endswith(f"; add that, or leave {name} out.\n")


@pytest.mark.parametrize(
    ("command", "use", "option", "bar"), REFUSED_WITH, ids=lambda one: "" if isinstance(one, Use) else one
)
def test_an_option_is_refused_with_what_makes_it_useless(
    command: str, use: Use, option: str, bar: str, faceprint: Faceprint
) -> None:
    status, out, err = faceprint(command, *required(command), *typed(command, option), *typed(command, bar))
    name, other = typed(command, option)[0], " ".join(typed(command, bar)[: 1 + ("=" in bar)])
    assert (status, out) == (2, "")
    assert err == f"faceprint: {name} is of no use with {other}, which {use.why}; leave one of the two out.\n"


@pytest.mark.parametrize(("command", "use", "option"), REFUSED_WITHOUT, ids=str)
def test_an_option_is_taken_with_each_of_what_it_goes_with(command: str, use: Use, option: str) -> None:
    for need in use.needs:
        name, _, value = need.partition("=")
        modes._check(use, option, {option: 1, name: value or 1}, spelled(command))


def test_every_row_is_about_parameters_that_its_command_has() -> None:
    for command, uses in USES.items():
        for use in uses:
            named = {*use.options, *use.needs, *use.bars, *filter(None, [use.when])}
            assert {one.partition("=")[0] for one in named} <= set(spelled(command)), command


def test_what_is_not_given_is_not_refused(faceprint: Faceprint) -> None:
    """A default value is not a given option: `search --face 1` has a rule, and is not refused for it."""
    for command in USES:
        modes.refuse_unusable(command, {}, spelled(command))
