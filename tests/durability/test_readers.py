"""Readers beside a writer, each a process of its own: every answer is one committed state, in order."""

import hashlib
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from retrieval.database.records import NewFace
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import verify
from retrieval.storage.backup_integrity import check_backup
from retrieval.storage.vault import Vault
from tests.operations import DIMENSION, add, tiny_model, vector_of

# Readers read and a writer writes until each reader has answered with so many states.
STATES = int(os.environ.get("FACEPRINT_READER_STATES", "40"))

# Small enough that a few dozen photos are many segments, which merge all the time.
CEILING = 24

PEOPLE = [f"Person {number}" for number in range(6)]
EVERYTHING = 10_000

# A fork of this process would share its locks and its threads.
_CONTEXT = multiprocessing.get_context("spawn")


@cache
def numbers_of(sha256: str) -> NDArray[np.float32]:
    """A vector of whole numbers, so that distances are exact and ties are many."""
    return np.rint(2 * vector_of(sha256))


def digest(ids: Iterable[int]) -> str:
    """A set of ids in a few letters."""
    return hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()[:16]


# The processes


def write(folder: Path, log: Path, stop: Event) -> None:
    """Enrolls, replaces, forgets, renames and compacts until it is told to stop; logs the states."""
    rng = np.random.default_rng(0)
    fresh = itertools.count()
    owners: dict[str, str] = {}  # the person of each path

    def enroll(gallery: Gallery, paths: Iterable[str]) -> None:
        faces = []
        for path in paths:
            owners.setdefault(path, PEOPLE[int(rng.integers(len(PEOPLE)))])
            sha256 = hashlib.sha256(f"content {next(fresh)}".encode()).hexdigest()
            faces.append(NewFace(owners[path], path, sha256))
        gallery.enroll_vectors(faces, np.stack([numbers_of(face.sha256) for face in faces]))

    def forget_somebody(gallery: Gallery) -> None:
        (name, *_) = sorted(set(owners.values()), key=lambda name: -list(owners.values()).count(name))
        gallery.forget(name)
        for path in [path for path, owner in owners.items() if owner == name]:
            del owners[path]

    def step(gallery: Gallery) -> None:
        kind = rng.integers(10)
        if len(owners) > 120:
            forget_somebody(gallery)
        elif kind < 6 or len(owners) < 20:
            enroll(gallery, [f"/photos/{next(fresh)}.png" for _ in range(rng.integers(1, 13))])
        elif kind < 8:
            enroll(gallery, rng.choice(list(owners), 3, replace=False).tolist())
        elif kind < 9:
            path = str(rng.choice(list(owners)))
            gallery.forget(path=path)
            del owners[path]
        else:
            gallery.compact()

    with Gallery.open(folder) as gallery, open(log, "a") as states:
        (generation,) = generations(gallery)
        gallery.vault.vectors(generation).ceiling = CEILING
        while not stop.is_set():
            with gallery.vault.store.read() as reader:
                print(reader.revision(), digest(reader.face_ids()), file=states, flush=True)
            step(gallery)
        with gallery.vault.store.read() as reader:
            print(reader.revision(), digest(reader.face_ids()), file=states, flush=True)


def generations(gallery: Gallery) -> list[Any]:
    with gallery.vault.store.read() as reader:
        return list(reader.generations().values())


def read(folder: Path, log: Path, stop: Event, reopen: bool) -> None:
    """Searches for everything until it is told to stop; logs what each search gave."""
    rng = np.random.default_rng(os.getpid())
    gallery = Gallery.open(folder, read_only=True)
    with open(log, "a") as answers:
        while not stop.is_set():
            query = rng.integers(-3, 4, DIMENSION).astype(np.float32)
            if reopen:
                gallery.close()
                gallery = Gallery.open(folder, read_only=bool(rng.integers(2)))
            matches = gallery.search_by_vector(query, EVERYTHING)
            found = [(match.distance, match.face.id) for match in matches]
            vectors = [numbers_of(match.face.sha256).astype(np.float64) for match in matches]
            exact = [float(np.sqrt(((vector - query) ** 2).sum())) for vector in vectors]
            assert [distance for distance, _ in found] == exact
            assert found == sorted(found)
            print(digest(number for _, number in found), file=answers, flush=True)
    gallery.close()


@contextmanager
def running(*processes: BaseProcess) -> Iterator[None]:
    """Processes that have begun; none is left behind."""
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.join(600)
            process.kill()


def lines(log: Path) -> list[list[str]]:
    """The words of each line that is whole."""
    text = log.read_text() if log.exists() else ""
    return [line.split() for line in text[: text.rfind("\n") + 1].splitlines()]


def states_in(log: Path) -> int:
    """How many states a reader has answered with."""
    return len({state for (state,) in lines(log)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty gallery."""
    Gallery.create(tmp_path / "people.gallery", tiny_model(tmp_path / "model")).close()
    return tmp_path / "people.gallery"


# What they show


def test_every_answer_is_a_committed_state(folder: Path, tmp_path: Path) -> None:
    """One reader stays open, one opens the gallery for each search, and a third process verifies it."""
    stop = _CONTEXT.Event()
    logs = [tmp_path / "lasting.log", tmp_path / "reopening.log"]
    written = tmp_path / "written.log"
    processes = [
        _CONTEXT.Process(target=write, args=(folder, written, stop)),
        _CONTEXT.Process(target=read, args=(folder, logs[0], stop, False)),
        _CONTEXT.Process(target=read, args=(folder, logs[1], stop, True)),
    ]
    with running(*processes):
        try:
            # Who stays open notices by itself what others commit, or this would never end.
            while min(map(states_in, logs)) < STATES:
                assert [process.exitcode for process in processes] == [None] * 3
                assert verify(folder).findings == ()
        finally:
            stop.set()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    states = [state for _, state in lines(written)]
    for log in logs:
        assert_in_order([state for (state,) in lines(log)], states)
    assert verify(folder).findings == ()


def test_no_reader_waits_for_who_writes(folder: Path) -> None:
    """In the middle of a transaction, with every lock of a writer: a reader that waits would be refused."""
    with Gallery.open(folder) as gallery:
        add(gallery, range(5))
    with (
        Gallery.open(folder, read_only=True) as lasting,
        Gallery.open(folder) as writer,
        writer.vault.writing() as rows,
    ):
        rows.set_gallery(next_identity_id=100)
        for _ in range(2):
            with Gallery.open(folder, read_only=True) as opened:
                for reader in (lasting, opened):
                    assert len(reader.search_by_vector(np.zeros(DIMENSION, np.float32), EVERYTHING)) == 5


def assert_in_order(answers: list[str], states: list[str]) -> None:
    """Each answer is a state, and never an earlier one than the answer before."""
    now = 0
    for number, answer in enumerate(answers):
        assert answer in states, f"answer {number} is no committed state"
        assert answer in states[now:], f"answer {number} is older than the one before"
        now = states.index(answer, now)


def test_a_backup_beside_a_writer_is_one_committed_state(folder: Path, tmp_path: Path) -> None:
    """Five times, into the same folder; each is restored, and whole."""
    stop = _CONTEXT.Event()
    written = tmp_path / "written.log"
    writer = _CONTEXT.Process(target=write, args=(folder, written, stop))
    found: list[tuple[str, str]] = []
    with running(writer):
        try:
            while len(lines(written)) < 20:
                assert writer.exitcode is None
                time.sleep(0.05)
            for number in range(5):
                with Gallery.open(folder) as gallery:
                    done = gallery.backup(tmp_path / "backup")
                assert check_backup(tmp_path / "backup") == []
                restored = tmp_path / f"restored-{number}.gallery"
                assert Gallery.restore(tmp_path / "backup", restored).faces == done.faces
                assert verify(restored).findings == ()
                found.append((str(done.revision), digest(ids_in(restored))))
        finally:
            stop.set()
    assert writer.exitcode == 0
    states = [state for _, state in lines(written)]
    assert_in_order([state for _, state in found], states)
    assert len({state for _, state in found}) > 1
    # Where the writer noted the very revision that was backed up, the state is that one.
    by_revision = dict(lines(written))
    assert all(by_revision.get(revision, state) == state for revision, state in found)


def ids_in(folder: Path) -> list[int]:
    with closing(Vault.open(folder, read_only=True)) as vault, vault.store.read() as reader:
        return list(reader.face_ids())


def test_a_second_backup_copies_only_new_segments(folder: Path, tmp_path: Path) -> None:
    """Three photos more are one small file; what is there is not copied, what is unnamed is not kept."""
    backup = tmp_path / "backup"
    with Gallery.open(folder) as gallery:
        add(gallery, range(8))
        first = gallery.backup(backup)
        assert (first.faces, first.segments_copied, first.segments_kept) == (8, 1, 0)
        (kept,) = (backup / "vectors").iterdir()
        before = kept.stat()
        add(gallery, range(8, 11))
        second = gallery.backup(backup)
        assert (second.faces, second.segments_copied, second.segments_kept) == (11, 1, 1)
        assert second.bytes_copied < first.bytes_copied
        assert (kept.stat().st_ino, kept.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        third = gallery.backup(backup)
        assert (third.segments_copied, third.segments_kept, third.bytes_copied) == (0, 2, 0)
        gallery.compact()
        last = gallery.backup(backup)
        assert (last.segments_copied, last.segments_kept) == (1, 0)
    assert len(list((backup / "vectors").iterdir())) == len(list(backup.glob("gallery-*.db"))) == 1
