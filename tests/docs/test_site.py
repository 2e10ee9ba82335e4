"""What the site must hold, read from its sources: cheap, and without the tools that build it."""

import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import retrieval
import training

_ROOT = Path(__file__).parents[2]
_DOCS = _ROOT / "docs"
_PAGES = sorted(
    [*_DOCS.glob("*.md"), *_DOCS.glob("reference/*.md"), _ROOT / "README.md", _ROOT / "CHANGELOG.md"]
)
# An option as prose and commands write it. What other programs take stands in these pages too.
_OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*[a-z]")
_OF_OTHER_PROGRAMS = {
    "--choose", "--crops", "--folder", "--forget", "--keep", "--kinds", "--large", "--least",
    "--limit", "--margins", "--most", "--part", "--parts", "--peers", "--photos",
    "--rows", "--help", "--version", "--install-completion", "--show-completion",
    # Of ray, torchrun and milvus-server.
    "--extra-config", "--generate", "--head", "--nnodes", "--nproc-per-node", "--rdzv-endpoint",
    "--standalone",
    # Former spellings, of which the page of commands has a table.
    "--show", "--validation-fraction",
}  # fmt: skip


@pytest.fixture(scope="module")
def commands() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "command_markdown", _DOCS / "_extensions" / "command_markdown.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _prose(page: Path) -> Iterator[tuple[int, str]]:
    """The lines of a page that are neither code nor rows of a table, with their numbers."""
    inside = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if line.strip().startswith("```"):
            inside = not inside
        elif not inside and not line.strip().startswith("|"):
            yield number, line


@pytest.mark.parametrize("package", [retrieval, training], ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name_of_a_package(package: ModuleType) -> None:
    reference = "\n".join(page.read_text() for page in _DOCS.glob("reference/*.md"))
    documented = set(re.findall(r"^\.\. auto\w+:: (\S+)", reference, re.MULTILINE))
    names = getattr(package, "__all__", [])
    assert {f"{package.__name__}.{name}" for name in names} - documented == set()


def test_every_public_name_and_each_of_its_public_methods_has_a_docstring() -> None:
    bare = []
    for name in retrieval.__all__:
        thing = getattr(retrieval, name)
        classes = inspect.getmro(thing) if inspect.isclass(thing) else ()
        ours = [one for one in classes if one.__module__.startswith("retrieval.")]
        members = [member for one in ours for member in vars(one).items()]
        public = [(f".{member}", value) for member, value in members if not member.startswith("_")]
        for member, value in [("", thing), *public]:
            written = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if callable(written) and not written.__doc__:
                bare.append(name + member)
    assert bare == []


def test_the_commands_page_has_every_command_and_all_that_its_help_says(commands: ModuleType) -> None:
    assert "```{commands}" in (_DOCS / "cli.md").read_text()
    sections = dict(
        re.findall(
            r"^## faceprint ([a-z -]+)\n(.*?)(?=^## |\Z)", commands.markdown(), re.MULTILINE | re.DOTALL
        )
    )
    assert list(sections) == list(commands.commands())
    for name, command in commands.commands().items():
        assert "(no help)" not in sections[name], name
        options = [
            option for parameter in command.params for option in parameter.opts if option.startswith("-")
        ]
        for option in options:
            assert option in sections[name], f"{name} {option}"


def test_every_guide_that_a_command_names_exists(commands: ModuleType) -> None:
    assert set(commands.GUIDES) <= set(commands.commands())
    for target, _ in commands.GUIDES.values():
        assert (_DOCS / target.partition("#")[0]).is_file(), target


def test_every_page_stands_in_the_contents() -> None:
    contents = (_DOCS / "index.md").read_text().splitlines()
    pages = {str(page.relative_to(_DOCS).with_suffix("")) for page in _DOCS.rglob("*.md")} - {"index"}
    assert pages - set(contents) == set()


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_no_line_of_prose_is_longer_than_120_characters(page: Path) -> None:
    assert [number for number, line in _prose(page) if len(line) > 120] == []


@pytest.mark.parametrize(
    "page", [page for page in _PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name
)
def test_every_option_that_a_page_names_is_an_option_of_a_command(page: Path, commands: ModuleType) -> None:
    known = {
        option
        for command in commands.commands().values()
        for parameter in command.params
        for option in [*parameter.opts, *parameter.secondary_opts]
    }
    assert set(_OPTION.findall(page.read_text())) - known - _OF_OTHER_PROGRAMS == set()
