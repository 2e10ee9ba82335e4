"""A published gallery with followers, for tests that kill publishers and followers at any call.

The functions that sweeps run take the folder that `lay` filled.
"""

import os
import secrets
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import verify
from retrieval.replication.follow import FollowerFolder, Synced
from retrieval.replication.objects import open_objects
from retrieval.replication.publish import Published, Publisher
from retrieval.replication.states import (
    OBJECTS,
    head_numbers,
    newest_head,
    read_confirmations,
    read_manifest,
)
from tests.operations import _TRACES, GONE, Contents, add, coded, contents, tiny_model

GALLERY, STORE, COPY, NEW = "people.gallery", "store", "copy.gallery", "new.gallery"
TRACES = _TRACES


def address(root: Path) -> str:
    """The address at which sweeps publish: a folder; with a file `shimmed`, one that the shim reaches."""
    shimmed = (root / "shimmed").exists()
    return f"{Shim.protocol}://{root / STORE}" if shimmed else os.fspath(root / STORE)


def publish(root: Path, gallery: str = GALLERY) -> Published:
    with Gallery.open(root / gallery) as opened:
        return Publisher(opened.vault, address(root)).publish()


def follow(root: Path, copy: str = COPY) -> Synced:
    with FollowerFolder(address(root), root / copy, name=copy.partition(".")[0]) as following:
        return following.sync()


def follow_anew(root: Path) -> None:
    follow(root, NEW)


def publish_again(root: Path) -> None:
    publish(root)


def follow_again(root: Path) -> None:
    follow(root)


@coded
def lay(root: Path) -> None:
    """State 1 of a gallery in a store, and a follower that has it; then a person was forgotten."""
    with Gallery.create(root / GALLERY, tiny_model(root / "model")) as gallery:
        add(gallery, range(4))
        add(gallery, range(4, 7))
        gallery.optimize(anew=True)
    publish(root)
    follow(root)
    with Gallery.open(root / GALLERY) as gallery:
        gallery.forget(GONE)
        add(gallery, range(9, 11))


def lay_published(root: Path) -> None:
    """The same, and state 2 is published."""
    lay(root)
    publish(root)


def states(root: Path) -> tuple[Contents, Contents]:
    """The contents of states 1 and 2."""
    return contents(root / COPY), contents(root / GALLERY)


def check_publisher(root: Path, state: str, before: Contents, after: Contents) -> None:
    """After a publisher was killed, or failed: one state or the other is published, and whole."""
    follow(root, NEW)
    found = contents(root / NEW)
    assert found in (before, after), "neither state is published"
    if state == "done":
        assert found == after
    assert contents(root / COPY) == before
    publish(root)
    check_published(root)
    follow(root)
    follow(root, NEW)
    for copy in (COPY, NEW):
        check_copy(root, copy, after)


def check_published(root: Path) -> None:
    """The store has what the newest state needs and nothing else, and nothing of the forgotten person."""
    objects = open_objects(address(root))
    head = newest_head(objects)
    assert head is not None
    manifest = read_manifest(objects, head)
    assert head.revision == _revision(root / GALLERY)
    assert objects.sizes(OBJECTS).keys() == manifest.keys() | {head.manifest.key}
    assert head_numbers(objects)[-1] == head.number
    scan(root / STORE)
    assert [erasure.number <= head.number for erasure in manifest.erasures] == [True]


def check_follower(root: Path, state: str, before: Contents, after: Contents) -> None:
    """After a follower was killed, or failed: it has one state or the other, and gets the later one."""
    found = contents(root / COPY)
    assert found in (before, after), "neither one state nor the other"
    if state == "done":
        assert found == after
    confirmed = {one.name: one.number for one in read_confirmations(open_objects(address(root)))}
    if confirmed["copy"] == 2:
        check_copy(root, COPY, after)
    follow(root)
    check_copy(root, COPY, after)


def check_new_follower(root: Path, state: str, after: Contents) -> None:
    """After a first run was killed, or failed: the folder has no database, or the whole state."""
    if state == "done" or (root / NEW / "gallery.db").exists():
        assert contents(root / NEW) == after
    follow(root, NEW)
    check_copy(root, NEW, after)


def check_copy(root: Path, copy: str, after: Contents) -> None:
    assert contents(root / copy) == after
    found = verify(root / copy)
    assert found.whole, found.findings
    assert not [note for note in found.notes if "sums" in note]
    scan(root / copy)


def scan(folder: Path) -> None:
    """Checks that no file of a folder has a trace of the forgotten person."""
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert not [trace for trace in TRACES if trace in data], path


def _revision(folder: Path) -> int:
    with Gallery.open(folder, read_only=True) as gallery, gallery.vault.store.read() as reader:
        return reader.revision()


class Shim(LocalFileSystem):  # type: ignore[misc]
    """A file system of fsspec that counts its calls, and runs a function before one of them."""

    protocol = "shim"
    calls: ClassVar[int] = 0
    before: ClassVar[Callable[[int, str, str], None]] = lambda number, call, path: None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "auto_mkdir": True})

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return super()._strip_protocol(str(path).removeprefix("shim://"))

    def _note(self, call: str, path: str) -> None:
        Shim.calls += 1
        Shim.before(Shim.calls, call, path)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        """Writes whole files, as an object store does."""
        self._note("create" if mode == "create" else "put", path)
        path = self._strip_protocol(path)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # Not in the store: another thread may be killed while this one writes, and a store has no such files.
        part = Path(f"{path.partition(f'/{STORE}/')[0]}/{secrets.token_hex(8)}.part")
        part.write_bytes(value)
        try:
            if mode == "create":
                os.link(part, path)
            else:
                os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> bytes:
        self._note("get", path)
        return bytes(super().cat_file(path, *arguments, **options))

    def find(self, path: str, *arguments: Any, **options: Any) -> Any:
        self._note("list", path)
        return super().find(path, *arguments, **options)

    def rm(self, path: Any, *arguments: Any, **options: Any) -> None:
        for one in [path] if isinstance(path, str) else path:
            self.rm_file(one)

    def rm_file(self, path: str) -> None:
        self._note("delete", path)
        super().rm_file(self._strip_protocol(path))


fsspec.register_implementation("shim", Shim, clobber=True)


def killed_at(root: Path, work: str, at: int) -> int:
    """Runs a function of this module, killed before call `at` of the store; returns the number of calls."""

    def kill(number: int, call: str, path: str) -> None:
        if number == at:
            os.kill(os.getpid(), signal.SIGKILL)

    Shim.calls, Shim.before = 0, staticmethod(kill)
    globals()[work](root)
    return Shim.calls
