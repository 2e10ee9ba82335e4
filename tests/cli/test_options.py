"""Each option has one name and one meaning in all commands, and old spellings still work."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import typer

from retrieval.cli.app import app
from retrieval.cli.command import in_options
from retrieval.cli.spellings import OLD_SPELLINGS, in_todays, json_in_a_file, renewed
from retrieval.errors import InputError
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from tests.cli.test_app import Faceprint, faceprint

__all__ = ["faceprint"]  # pytest finds the fixture by its name

COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

# Options of which a command knows more, or other, values than another: what they choose is the same.
CHOICES = {"--crop", "--faces", "--out", "--precision", "--weights"}


def options(command: str) -> dict[str, Any]:
    return {
        max(one.opts, key=len): one for one in COMMANDS[command].params if one.param_type_name == "option"
    }


def test_an_option_takes_the_same_kind_of_value_in_every_command() -> None:
    kinds = defaultdict(set)
    for command in COMMANDS:
        for name, one in options(command).items():
            kinds[name].add("flag" if one.is_flag else one.metavar if name not in CHOICES else "value")
    assert {name: found for name, found in kinds.items() if len(found) > 1} == {}


def test_the_new_spellings_are_options_and_the_old_ones_are_not() -> None:
    for command, spellings in OLD_SPELLINGS.items():
        for old, new in spellings.items():
            assert new.split()[0] in options(command)
            assert " " in old or old not in options(command)


@pytest.mark.parametrize(
    ("command", "args", "now", "told"),
    [
        ("audit", ["g", "--show", "3"], ["g", "--top", "3"], "--show is spelled --top"),
        ("audit", ["g", "--show=3"], ["g", "--top=3"], "--show is spelled --top"),
        (
            "train",
            ["d", "--precision", "fp32", "--out", "m"],
            ["d", "--precision", "float32", "--out", "m"],
            "--precision fp32 is spelled --precision float32",
        ),
        (
            "train",
            ["--precision=fp32", "d"],
            ["--precision", "float32", "d"],
            "--precision fp32 is spelled --precision float32",
        ),
        ("train", ["d", "--precision", "bf16"], ["d", "--precision", "bf16"], None),
        ("model", ["m", "--layers"], ["m", "--layer-table"], "--layers is spelled --layer-table"),
        ("model", ["--", "--layers"], ["--", "--layers"], None),
        ("derive", ["m", "--layers", "layer3"], ["m", "--layers", "layer3"], None),
    ],
)
def test_old_spellings_become_new_ones(
    command: str, args: list[str], now: list[str], told: str | None
) -> None:
    sentences = [] if told is None else [f"{told} now; the old spelling still works."]
    assert renewed(command, args) == (now, sentences)


@pytest.mark.parametrize("args", [["--json", "f.json"], ["--json=f.json"]])
def test_json_that_names_a_file_becomes_json_file(args: list[str]) -> None:
    now, (told,) = json_in_a_file(["d", *args, "--", "--json"])
    assert now == ["d", args[0].replace("--json", "--json-file"), *args[1:], "--", "--json"]
    assert told == "--json FILE is spelled --json-file FILE now; the old spelling still works."


@pytest.mark.parametrize("before", [True, False])
def test_check_prints_json_or_writes_it_and_still_takes_the_old_spelling(
    faceprint: Faceprint, faces: Path, tmp_path: Path, before: bool
) -> None:
    def check(*arguments: object) -> tuple[int, str, str]:
        return faceprint("check", *((*arguments, faces) if before else (faces, *arguments)))

    status, out, err = check("--json")
    assert (status, err) == (0, "")
    said = json.loads(out)
    status, out, err = check("--json-file", tmp_path / "new.json")
    assert (status, err) == (0, "")
    status, same, err = check("--json", tmp_path / "old.json")
    assert (status, same) == (0, out)
    assert err == "faceprint: --json FILE is spelled --json-file FILE now; the old spelling still works.\n"
    assert [json.loads((tmp_path / name).read_text()) for name in ("new.json", "old.json")] == [said, said]


def test_a_sentence_of_the_library_names_the_options_of_the_command() -> None:
    spelled = {"out": "--out", "device": "--device", "val_fraction": "--val-fraction"}
    said = "Choose another `out`, or `device='cpu'`, or less `fraction`; `pairs` and `faceprint demo` stay."
    assert in_options(said, spelled) == (
        "Choose another --out, or --device cpu, or less --val-fraction; `pairs` and `faceprint demo` stay."
    )


def test_an_error_that_a_command_ends_with_names_its_options(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    """The same error of the library names an argument."""
    status, _, err = faceprint("ingest", tmp_path / "g", faces, "--model", bundle.folder, "--device", "warp")
    said = "There is no device warp here; use"
    assert (status, err) == (2, f"faceprint: {said} --device auto or --device cpu.\n")
    with pytest.raises(InputError) as caught:
        Embedder.open(bundle, device="warp")
    assert str(caught.value) == f"{said} `device='auto'` or `device='cpu'`."


def test_a_sentence_that_advises_an_old_spelling_says_the_new_one() -> None:
    said = "The device cpu has no bfloat16; use --precision fp32."
    assert in_todays("train", said) == said.replace("fp32", "float32")
    assert in_todays("model", "See --layers.") == "See --layers."
