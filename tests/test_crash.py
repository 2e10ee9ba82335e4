"""A process that is killed at any moment leaves a whole gallery: as it was before a batch, or after it."""

import hashlib
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import event

from retrieval.bundle import ModelBundle
from retrieval.gallery import Gallery, Outcome, Status
from retrieval.store import NewFace

BATCH = 5
KILLS = 15

# A process that has imported everything and started no thread; each child is a fork of it, in milliseconds.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["pytest", "retrieval.gallery"])

Row = tuple[str, str, str | None]  # SHA-256, identity, path


def vector_of(sha256: str) -> NDArray[np.float32]:
    """A vector that a photo with these bytes might have given: the same every time."""
    return np.random.default_rng(int(sha256, 16)).standard_normal(2048).astype(np.float32)


def face(number: int) -> NewFace:
    """One of two people's photos."""
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return NewFace(("Kim", "Adi")[number % 2], f"/photos/{number}.jpg", digest)


def add(gallery: Gallery, first: int, count: int) -> list[Outcome]:
    """Adds the faces with these numbers, in one batch."""
    faces = [face(number) for number in range(first, first + count)]
    return gallery._add(faces, np.stack([vector_of(face.sha256) for face in faces]))


def contents(folder: Path) -> set[Row]:
    """Who is in a gallery, after a look at every file with SQLite and FAISS themselves.

    Each face has its own vector and no other, each named file is what its row says.
    """
    connection = sqlite3.connect(folder / "gallery.db")
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    query = "SELECT f.id, sha256, name, path FROM face f JOIN identity i ON i.id = f.identity_id"
    faces = {number: tuple(row) for number, *row in connection.execute(query)}
    identities = connection.execute("SELECT name FROM identity").fetchall()
    segments = connection.execute("SELECT id, rows, bytes, sha256 FROM segment").fetchall()
    ((next_face, next_segment),) = connection.execute("SELECT next_face_id, next_segment_id FROM gallery")
    connection.close()
    vectors: list[tuple[int, NDArray[np.float32]]] = []
    for number, rows, size, digest in segments:
        path = folder / "vectors" / f"{number:08d}.faiss"
        data = path.read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest)
        index = faiss.read_index(os.fspath(path))
        ids = faiss.vector_to_array(index.id_map).tolist()
        assert len(ids) == rows
        vectors += zip(ids, index.index.reconstruct_n(0, rows), strict=True)
    assert sorted(number for number, _ in vectors) == sorted(faces)
    assert all(np.array_equal(vector, vector_of(faces[number][0])) for number, vector in vectors)
    assert sorted(identities) == sorted({(name,) for _, name, _ in faces.values()})
    assert next_face > max(faces, default=0)
    assert next_segment > max((number for number, *_ in segments), default=0)
    return set(faces.values())


def named_files(folder: Path) -> set[str]:
    """The vector files that exist as far as the database is concerned."""
    connection = sqlite3.connect(folder / "gallery.db")
    names = {f"{number:08d}.faiss" for (number,) in connection.execute("SELECT id FROM segment")}
    connection.close()
    return names


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "vectors").iterdir()}


def rows_of(*numbers: int) -> set[Row]:
    faces = map(face, numbers)
    return {(face.sha256, face.identity or "", face.path) for face in faces}


# At random moments


def enroll_forever(folder: Path, ready: Connection) -> None:
    """Adds batch after batch, from where the gallery stands; tells when it begins. Runs in a child."""
    with Gallery.open(folder) as gallery:
        ready.send("begin")
        for first in itertools.count(gallery.info().faces, BATCH):
            add(gallery, first, BATCH)


def test_a_writer_killed_at_random_moments_leaves_whole_batches(gallery: Gallery) -> None:
    """Fifteen times in a row, on one gallery that is open in another process all the while."""
    rng, folder, total = random.Random(0), gallery.folder, 0
    for _ in range(KILLS):
        here, there = CHILDREN.Pipe(duplex=False)
        child = CHILDREN.Process(target=enroll_forever, args=(folder, there))
        child.start()
        there.close()
        assert here.recv() == "begin"
        time.sleep(rng.uniform(0, 0.12))
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        child.close()
        here.close()

        found = contents(folder)
        assert found == rows_of(*range(len(found)))
        assert len(found) % BATCH == 0
        assert len(found) >= total
        total = len(found)
        with Gallery.open(folder) as reopened:
            assert reopened.info().faces == total
        assert [outcome.face_id for outcome in add(gallery, total, BATCH)] == list(
            range(total + 1, total + BATCH + 1)
        )
        total += BATCH
        assert contents(folder) == rows_of(*range(total))
        assert files(folder) == named_files(folder)
    assert total > KILLS * BATCH  # the children too have enrolled something, not only this process
    nearest = gallery.search_by_vector(vector_of(face(2).sha256), 1)[0]
    assert (nearest.face.path, nearest.distance) == ("/photos/2.jpg", 0.0)


# At every step


def merge_everything(gallery: Gallery) -> None:
    """One more photo: three segments and it become one."""
    add(gallery, 7, 1)


def forget(gallery: Gallery) -> None:
    """Three segments are rewritten without Kim's photos, or removed."""
    gallery.forget("Kim")


def run_until(step: int, folder: Path, work: Callable[[Gallery], None]) -> None:
    """Does `work`, and dies before its step-th call that makes something durable. Runs in a child."""
    steps = itertools.count(1)

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return counted

    with Gallery.open(folder) as gallery:
        for name in ("fsync", "replace", "unlink"):
            setattr(os, name, before(getattr(os, name)))
        event.listen(gallery._store._engine, "commit", before(lambda connection: None))
        work(gallery)


@pytest.fixture(scope="module")
def three_segments(bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed gallery of four, two and one photos. Its model is a link, so that copies are cheap."""
    folder = tmp_path_factory.mktemp("crash") / "people.gallery"
    with Gallery.create(folder, bundle) as gallery:
        for first, count in ((0, 4), (4, 2), (6, 1)):
            add(gallery, first, count)
    shutil.rmtree(folder / "model")
    (folder / "model").symlink_to(bundle.folder)
    assert len(named_files(folder)) == 3
    return folder


def crashes(original: Path, tmp_path: Path, work: Callable[[Gallery], None]) -> Iterator[tuple[Path, int]]:
    """Copies of a gallery in which `work` died before each of its steps, and one in which it lived."""
    for step in itertools.count(1):
        folder = tmp_path / f"{step}.gallery"
        shutil.copytree(original, folder, symlinks=True)
        child = CHILDREN.Process(target=run_until, args=(step, folder, work))
        child.start()
        child.join()
        exit_code = child.exitcode
        child.close()
        assert exit_code in (0, -signal.SIGKILL)
        yield folder, step
        if exit_code == 0:
            return


def test_a_merge_killed_before_any_of_its_steps_is_done_or_was_never_begun(
    three_segments: Path, tmp_path: Path
) -> None:
    """Adding the same photo again then ends in the same gallery, without a file too many."""
    before, after = rows_of(*range(7)), rows_of(*range(8))
    states: list[set[Row]] = []
    for folder, _ in crashes(three_segments, tmp_path, merge_everything):
        states.append(contents(folder))
        with Gallery.open(folder) as gallery:
            assert gallery.info().faces == len(states[-1])
            (outcome,) = add(gallery, 7, 1)
            expected = Status.KNOWN if states[-1] == after else Status.ENROLLED
            assert (outcome.status, outcome.face_id) == (expected, 8)
            assert contents(folder) == after
            assert files(folder) == named_files(folder) == {"00000004.faiss"}
    # Two fsyncs, a rename, a commit, three files removed, at the least; all or nothing at each.
    assert len(states) > 7
    done = states.index(after)
    assert states == [before] * done + [after] * (len(states) - done)
    assert done > 3


def test_a_forget_killed_before_any_of_its_steps_is_done_or_was_never_begun(
    three_segments: Path, tmp_path: Path
) -> None:
    """No vector outlives its face, and after the next write no file of theirs is left."""
    before, after = rows_of(*range(7)), rows_of(1, 3, 5)
    kim = [vector_of(face(number).sha256)[:8].tobytes() for number in (0, 2, 4, 6)]
    states: list[set[Row]] = []
    for folder, _ in crashes(three_segments, tmp_path, forget):
        states.append(contents(folder))
        with Gallery.open(folder) as gallery:
            if states[-1] == before:
                assert gallery.forget("Kim") == 4
            else:
                add(gallery, 1, 1)  # known already: a write that changes nothing
            assert contents(folder) == after
            assert files(folder) == named_files(folder)
        data = b"\0".join(path.read_bytes() for path in (folder / "vectors").iterdir())
        assert [needle in data for needle in kim] == [False] * 4
    # Two new files with two fsyncs and a rename each, a commit, three files removed, at the least.
    assert len(states) > 10
    done = states.index(after)
    assert states == [before] * done + [after] * (len(states) - done)
    assert done > 6
