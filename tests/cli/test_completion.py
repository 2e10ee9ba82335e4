"""Shells complete commands and options."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = "import sys; sys.argv[0] = 'faceprint'; from retrieval.cli.app import main; main()"


def completed(typed: str) -> list[str]:
    """What bash is given for the last word of a line."""
    asked = {"_FACEPRINT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(
        command, env={**os.environ, **asked}, capture_output=True, text=True, check=True
    ).stdout.split()


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("faceprint ren", ["rename-identity"]),
        ("faceprint audit", ["audit", "audit-log"]),
        ("faceprint mod", ["model"]),
        ("faceprint model import --la", ["--layout"]),
        ("faceprint ingest --me", ["--metadata"]),
        ("faceprint check --json", ["--json", "--json-file"]),
        ("faceprint audit --show", []),  # an old spelling
    ],
)
def test_bash_is_given_commands_and_options(typed: str, words: list[str]) -> None:
    assert completed(typed) == words


def test_the_script_that_bash_loads_can_be_shown_and_installed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM]
    # Typer finds the shell out by itself; told to leave that, it takes the name of one.
    asked = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
    shown = subprocess.run(
        [*command, "--show-completion", "bash"], env=asked, capture_output=True, text=True, check=True
    )
    assert "_FACEPRINT_COMPLETE=complete_bash" in shown.stdout
    subprocess.run([*command, "--install-completion", "bash"], env=asked, capture_output=True, check=True)
    (script,) = (tmp_path / ".bash_completions").iterdir()
    assert "_FACEPRINT_COMPLETE=complete_bash" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()
