"""Every command that reads what another one wrote ends in one sentence where that is something else."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from retrieval.gallery.gallery import Gallery
from retrieval.transfer.manifest import MANIFEST
from tests.cli.test_app import Faceprint, faceprint
from tests.operations import add, tiny_model, write_photos

__all__ = ["faceprint"]  # pytest finds the fixture by its name

DIGITS = "9" * 5000


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery, its model, a backup, an export and some photos; no test changes them."""
    root = tmp_path_factory.mktemp("whole")
    write_photos(root / "photos", range(9))
    with Gallery.create(root / "gallery", tiny_model(root / "model")) as gallery:
        add(gallery, range(8))
        gallery.backup(root / "backup")
        gallery.export(root / "export")
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy of these."""
    return Path(shutil.copytree(whole, tmp_path / "root"))


def _deep(_: bytes) -> bytes:
    return b'{"a": ' + b"[" * 100_000


# What a file of JSON is replaced with.
TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "text": lambda _: b"hello\n",
    "binary": lambda _: bytes(range(256)),
    "null": lambda _: b"null",
    "list": lambda _: b"[]",
    "object": lambda _: b"{}",
    "half": lambda data: data[: len(data) // 2],
    "deep": _deep,
    "digits": lambda data: data.replace(b'"format": ', b'"format": %s' % DIGITS.encode(), 1),
}
OTHERS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "folder": os.mkdir,
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path.name),
}

# The file that is broken, and the commands that read it; {} is the folder of everything.
COMMANDS: dict[str, list[list[str]]] = {
    "model/bundle.json": [
        ["model", "{}/model"],
        ["ingest", "{}/new", "{}/photos", "--model", "{}/model"],
        ["embed", "{}/model", "{}/photos", "--out", "{}/v.npy"],
        ["derive", "{}/model", "--out", "{}/derived", "--length", "unit"],
        ["evaluate", "{}/model", "{}/photos", "--out", "{}/report"],
        ["reembed", "{}/gallery", "--model", "{}/model"],
        ["repair", "{}/gallery", "--model", "{}/model"],
        ["import", "{}/export", "{}/new", "--model", "{}/model"],
    ],
    "backup/backup.json": [
        ["verify", "{}/backup"],
        ["restore", "{}/backup", "{}/new"],
        ["restore", "{}/backup", "{}/gallery"],
        ["repair", "{}/gallery", "--backup", "{}/backup"],
    ],
    f"export/{MANIFEST}": [["import", "{}/export", "{}/new", "--model", "{}/model"]],
}


def told(done: tuple[int, str, str]) -> tuple[int, str]:
    """Exit status and the last line of standard error, which is the only one of ours."""
    status, _, err = done
    assert "Traceback" not in err, err
    lines = err.strip().splitlines()
    assert len([line for line in lines if line.startswith("faceprint: ")]) == (1 if status else 0), err
    return status, lines[-1] if lines else ""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_that_is_something_else_is_one_sentence_and_status_2(
    name: str, root: Path, faceprint: Faceprint
) -> None:
    path = root / name
    data = path.read_bytes()
    for kind in (*TEXTS, *OTHERS):
        (path.rmdir if path.is_dir() else path.unlink)()
        if kind in TEXTS:
            path.write_bytes(TEXTS[kind](data))
        else:
            OTHERS[kind](path)
        for command in COMMANDS[name]:
            status, sentence = told(faceprint(*(part.format(root) for part in command)))
            assert status == 2, (kind, command, sentence)
            assert str(path.parent) in sentence, (kind, command, sentence)
            assert sentence.endswith("."), (kind, command, sentence)
            assert not (root / "new").exists()
        path.touch() if kind == "missing" else None


WRONG = (None, True, -1, 0, 1.5, 10**30, "text", "", [], [None], {}, {"a": None}, [[1]])


def changes(tree: Any, *, levels: int = 3) -> Iterator[Any]:
    """The tree with each field, at some levels, of another type, or without it."""
    if not isinstance(tree, dict) or levels == 0:
        return
    for name, value in tree.items():
        yield {other: one for other, one in tree.items() if other != name}
        for wrong in WRONG:
            yield {**tree, name: wrong}
        for changed in changes(value, levels=levels - 1):
            yield {**tree, name: changed}


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("model/bundle.json", ["model", "{}/model"]),
        ("model/bundle.json", ["repair", "{}/gallery", "--model", "{}/model"]),
        ("backup/backup.json", ["verify", "{}/backup"]),
        (f"export/{MANIFEST}", ["import", "{}/export", "{}/gallery"]),
    ],
)
def test_a_field_of_another_type_is_passed_over_or_one_sentence(
    name: str, command: list[str], root: Path, faceprint: Faceprint
) -> None:
    tree = json.loads((root / name).read_text())
    statuses = set()
    for changed in changes(tree):
        (root / name).write_text(json.dumps(changed))
        status, sentence = told(faceprint(*(part.format(root) for part in command)))
        assert status in (0, 2), (changed, sentence)
        statuses.add(status)
    assert 2 in statuses


# Weights


class Anything:
    """A class of ours, which a pickle of weights must not make."""


def _pickled(value: object) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(pickle.dumps(value))


WEIGHTS: dict[str, Callable[[Path], object]] = {
    "text.pth": lambda path: path.write_text("hello\n"),
    "text.safetensors": lambda path: path.write_text("hello\n"),
    "empty.pth": lambda path: path.touch(),
    "empty.safetensors": lambda path: path.touch(),
    "no-name": lambda path: path.touch(),
    "pickle-of-text.pth": _pickled("hello"),
    "pickle-of-a-list.pkl": _pickled([1, 2, 3]),
    "pickle-of-a-class.pkl": _pickled(Anything()),
    "torch-of-a-class.pth": lambda path: torch.save(Anything(), path),
    "torch-of-a-tensor.pth": lambda path: torch.save(torch.zeros(3), path),
    "torch-of-nothing.pth": lambda path: torch.save({}, path),
    "torch-of-numbers.pth": lambda path: torch.save({"conv1.weight": 3}, path),
    "torch-by-number.pth": lambda path: torch.save({1: torch.zeros(3)}, path),
    "other-shape.pth": lambda path: torch.save({"conv1.weight": torch.zeros(3)}, path),
    "deep.pth": lambda path: path.write_bytes(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
    "large-header.safetensors": lambda path: path.write_bytes(b"\xff" * 7 + b"\x7f" + b"{}"),
    "larger-header.safetensors": lambda path: path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}"),
    "header-of-lies.safetensors": lambda path: path.write_bytes(
        (lie := b'{"conv1.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4000000000]}}')
        and len(lie).to_bytes(8, "little") + lie
    ),
    "folder": os.mkdir,
    "folder.safetensors": os.mkdir,
    "pipe": os.mkfifo,
    "pipe.safetensors": os.mkfifo,
    "loop": lambda path: path.symlink_to(path.name),
}


def test_weights_that_are_something_else_are_one_sentence_and_status_2(
    root: Path, faceprint: Faceprint, tmp_path: Path
) -> None:
    for name, make in WEIGHTS.items():
        make(tmp_path / name)
        arguments = ("train", root / "photos", "--out", tmp_path / "m", "--weights", tmp_path / name)
        status, sentence = told(faceprint(*arguments))
        assert (status, name in sentence) == (2, True), (name, sentence)
        assert not (tmp_path / "m" / "bundle.json").exists()


def test_a_checkpoint_that_is_something_else_is_one_sentence_and_status_2(
    root: Path, faceprint: Faceprint, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "m" / "checkpoint.safetensors"
    checkpoint.parent.mkdir()
    # A link that leads nowhere is no checkpoint: the run starts from the beginning.
    for name, make in ((name, make) for name, make in WEIGHTS.items() if name != "loop"):
        make(checkpoint)
        arguments = ("train", root / "photos", "--out", checkpoint.parent, "--weights", "none", "--resume")
        status, sentence = told(faceprint(*arguments, "--image-size", "32"))
        assert status == 2, (name, sentence)
        assert f"The checkpoint {checkpoint} is " in sentence, (name, sentence)
        (checkpoint.rmdir if checkpoint.is_dir() else checkpoint.unlink)()
