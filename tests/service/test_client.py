"""The client has the names, arguments, results and errors of `Gallery`."""

import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from PIL import Image

from retrieval import FaceSelection, Gallery, ModelBundle, UnreadableImage, Where, ingest
from retrieval.client import Client, connect
from retrieval.database.filters import Condition
from retrieval.errors import FaceprintError, InputError, NotFound, RunError
from retrieval.service import tokens
from retrieval.service.tokens import Scope
from tests.cli.test_app import Faceprint, faceprint
from tests.cli.test_faces import aligned
from tests.detectors import save
from tests.service.server import Server

__all__ = ["aligned", "faceprint"]  # pytest finds fixtures by their names

Searching: TypeAlias = Gallery | Client

SEARCHES = [name for name in dir(Gallery) if name.startswith("search")]
MERGES = ["merges", "undo_merge"]


@pytest.fixture(scope="module")
def client(served: Server) -> Iterator[Client]:
    with connect(served.url) as connected:
        yield connected


@pytest.fixture(scope="module")
def gallery(enrolled: Path) -> Iterator[Gallery]:
    with Gallery.open(enrolled) as opened:
        yield opened


@pytest.mark.parametrize("name", [*SEARCHES, *MERGES])
def test_every_search_of_a_gallery_has_the_same_arguments(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(kind, name)) for kind in (Client, Gallery))
    assert ours == theirs


def vectors(number: int) -> Any:
    return np.random.default_rng(number).normal(size=(3, 2048)).astype(np.float32)


def same(one: Any, other: Any) -> bool:
    """Whether results are equal, with the decisions that tuples of them carry."""
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other and getattr(one, "decision", None) == getattr(other, "decision", None))


ASKED: list[Callable[[Searching, list[Path]], Any]] = [
    lambda searching, photos: searching.search(photos[0]),
    lambda searching, photos: searching.search(photos[0].read_bytes(), 2, exclude_self=True),
    lambda searching, photos: searching.search(photos[1], None, within=2.0, max_distance=1.0),
    lambda searching, photos: searching.search_many(photos, 3),
    lambda searching, photos: searching.search_many(map(str, photos), 1, exclude_self=True),
    lambda searching, photos: searching.search_many([]),
    lambda searching, photos: searching.search_faces(photos[:3], 2),
    lambda searching, photos: searching.search(Image.open(photos[2]), 2),
    lambda searching, photos: searching.search(np.asarray(Image.open(photos[2])), 2),
    lambda searching, photos: searching.search(np.asarray(Image.open(photos[2]).convert("L")), 2),
    lambda searching, photos: searching.search_by_vector(vectors(1)[0], 4),
    lambda searching, photos: searching.search_by_vectors(vectors(2), None, within=70.0),
    lambda searching, photos: searching.search_by_vectors(vectors(3).astype(np.float64)),
    lambda searching, photos: searching.search_by_face(7, 3),
    lambda searching, photos: searching.search_people(photos[:2], 2, rule="mean", mean_of=2, photos=1),
    lambda searching, photos: searching.search_people_of_faces(photos[:2], exclude_self=True),
    lambda searching, photos: searching.search_people_by_vectors(vectors(4), 3, rule="centroid"),
    lambda searching, photos: searching.search_people_by_face(9, max_distance=0.1),
]


@pytest.mark.parametrize("ask", ASKED, ids=range(len(ASKED)))
def test_a_search_has_the_result_of_the_gallery(
    ask: Callable[[Searching, list[Path]], Any], client: Client, gallery: Gallery, faces: Path
) -> None:
    photos = sorted(faces.glob("*/*.jpg"))
    assert same(ask(client, photos), ask(gallery, photos))


def test_filters_mean_what_they_mean_in_the_library(own_gallery: Path, faces: Path, tmp_path: Path) -> None:
    odd = {'a "b".c': "x y", "face": 3, "deep": {"er": True}, "person": {"x": "Ω"}, "none": None}
    wheres = [
        Where(identities=("Adi", "Sky")),
        Where(face_ids=(3, 9)),
        Where(path_prefixes=(str(faces / "Adi"),)),
        Where(enrolled_after="2020-01-01", enrolled_before="2999-01-01"),
        Where(enrolled_before="2020-01-01"),
        *(Where(faces=(Condition((key,), "=", odd[key]),)) for key in ('a "b".c', "face", "none")),
        Where(faces=(Condition(("deep", "er"), "=", True), Condition(("person", "x"), "~", "Ω"))),
        Where(faces=(Condition(("face",), ">", 2.5), Condition("none", "?"))),
        Where(people=(Condition(("country",), "!=", "FR"),)),
    ]
    with Gallery.open(own_gallery) as gallery:
        gallery.annotate(faces={8: odd}, identities={"Adi": {"country": "FR"}, "Bao": {"country": "IT"}})
        with Server(own_gallery, tmp_path / "log") as server, connect(server.url) as client:
            for where in wheres:
                found = gallery.search_by_face(1, 40, where=where)
                assert client.search_by_face(1, 40, where=where) == found, where
            assert [m.face.meant for m in client.search_by_face(2, 9, where=wheres[2])] == [1] * 5


def test_each_face_of_a_photo_has_its_place_exactly(aligned: ModelBundle, tmp_path: Path) -> None:
    for number, name in enumerate(("Ada", "Bo")):
        save(tmp_path / "photos" / name / "one.png", (320, 200), [(64, 64, 16)], seed=number)
    group = save(tmp_path / "group.png", (480, 200), [(64, 64, 16), (288, 64, 32)], seed=7)
    nobody = save(tmp_path / "nobody.png", (320, 200), [], seed=8)
    with Gallery.create(tmp_path / "g", aligned) as gallery:
        ingest(gallery, [tmp_path / "photos"])
        gallery.calibrate(0.5)
        with Server(tmp_path / "g", tmp_path / "log") as server, connect(server.url) as client:
            for ask in (
                lambda one: one.search_faces([group, group]),
                lambda one: one.search(group, selection=FaceSelection("largest", min_side=30)),
                lambda one: one.search_people([group]),
                lambda one: one.search_faces([group], selection=FaceSelection("all", max_yaw=0.9)),
            ):
                assert same(ask(client), ask(gallery))
            found = client.search_faces([group])[0]
            assert [len(one.matches) for one in found] == [2, 2]
            assert found[0].face is not None
            assert found[0].matches[0].face.region is not None
            with pytest.raises(UnreadableImage) as ours:
                client.search(nobody)
            with pytest.raises(UnreadableImage) as theirs:
                gallery.search(nobody)
            assert (ours.value.reason, ours.value.detail) == (theirs.value.reason, theirs.value.detail)


WRONG: list[tuple[Callable[[Searching], Any], type[FaceprintError]]] = [
    (lambda searching: searching.search_by_face(99), NotFound),
    (lambda searching: searching.search_by_face(-1), NotFound),
    (lambda searching: searching.search("missing.jpg"), UnreadableImage),
    (lambda searching: searching.search(b"GIF89a"), UnreadableImage),
    (lambda searching: searching.search_by_face(1, 0), InputError),
    (lambda searching: searching.search_by_face(1, None), InputError),
    (lambda searching: searching.search_by_face(1, fpir=0.1), InputError),
    (lambda searching: searching.search_by_face(1, within=-1.0), InputError),
    (lambda searching: searching.search_by_vectors(np.ones((1, 5))), InputError),
    (lambda searching: searching.search_by_vectors(np.full((1, 2048), np.nan)), InputError),
    (lambda searching: searching.search(b"x", selection=FaceSelection("all")), InputError),
]


@pytest.mark.parametrize(("ask", "error"), WRONG, ids=range(len(WRONG)))
def test_errors_are_those_of_the_gallery(
    ask: Callable[[Searching], Any], error: type[FaceprintError], client: Client, gallery: Gallery
) -> None:
    for searching in (client, gallery):
        with pytest.raises(error) as raised:
            ask(searching)
        assert type(raised.value) is error


def test_what_a_service_cannot_do_is_said(client: Client, faces: Path) -> None:
    photo = Image.open(sorted(faces.glob("*/*.jpg"))[0])
    with pytest.raises(InputError, match="1,000 is the limit"):
        client.search_by_face(1, 1001)
    with pytest.raises(InputError, match="compares files"):
        client.search(photo, exclude_self=True)
    with pytest.raises(InputError, match="cannot be sent"):
        client.search(photo.convert("CMYK"))


def test_an_address_that_is_no_service_is_said(served: Server) -> None:
    for url in ("my.gallery", "ftp://host", "http://host:port"):
        with pytest.raises(InputError):
            connect(url)
    with connect("http://127.0.0.1:1") as nobody, pytest.raises(RunError, match="faceprint serve"):
        nobody.search_by_face(1)
    with connect(f"{served.url}/elsewhere") as lost, pytest.raises(NotFound):
        lost.search_by_face(1)


def test_the_command_line_asks_a_service_as_it_asks_a_gallery(
    own_gallery: Path,
    faces: Path,
    tmp_path: Path,
    faceprint: Faceprint,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret, _ = tokens.create(own_gallery, "shell", Scope.READ)
    photos = sorted(faces.glob("*/*.jpg"))[:2]
    np.save(tmp_path / "v.npy", vectors(1))
    (tmp_path / "cut.jpg").write_bytes(photos[0].read_bytes()[:100])
    commands: list[tuple[object, ...]] = [
        (*photos, "-k", 2),
        ("--face", 3, "--by-person", "--json"),
        ("--vectors", tmp_path / "v.npy", "--json"),
        (tmp_path / "cut.jpg", photos[0], "--json"),
        (photos[0], "--where", "identity=Adi", "--exclude-self"),
        (photos[0], "--identity", "Ady"),
    ]
    with Server(own_gallery, tmp_path / "log") as server:
        status, _, err = faceprint("search", server.url, photos[0])
        assert (status, "valid token" in err) == (2, True)
        monkeypatch.setenv("FACEPRINT_TOKEN", secret)
        for command in commands:
            status, out, err = faceprint("search", server.url, *command)
            assert (status, out, err) == faceprint("search", own_gallery, *command), command
        status, _, err = faceprint("search", server.url, photos[0], "--explain")
        assert (status, "--explain is of no use" in err) == (2, True)
    status, _, err = faceprint("search", server.url, photos[0])
    assert (status, "cannot be asked" in err, err.count("\n")) == (1, True, 1)


def test_info_is_that_of_the_gallery(client: Client, gallery: Gallery) -> None:
    import dataclasses

    assert client.info() == json.loads(json.dumps(dataclasses.asdict(gallery.info())))


def test_merges_are_listed_and_undone_as_those_of_the_gallery(own_gallery: Path, tmp_path: Path) -> None:
    with Gallery.open(own_gallery) as gallery:
        gallery.annotate(identities={"Bao": {"badge": 7}})
        gallery.rename_identity("Bao", "Bao Li")
        gallery.merge_identities("Bao Li", "Sky")
        gallery.merge_identities("Ocean", "Sky")
        second, first = gallery.merges()
    with Server(own_gallery, tmp_path / "log") as server, connect(server.url) as client:
        assert client.merges() == [second, first]
        assert client.merges(before=second.id) == client.merges(before=second.id, limit=1) == [first]
        undone = client.undo_merge(first.id)
        assert (undone.merge, undone.into, undone.former_names) == (first, "Sky", ("Bao",))
        assert client.undo_merge().merge == second
        for number in (None, first.id):
            with pytest.raises(NotFound):
                client.undo_merge(number)
    with Gallery.open(own_gallery) as gallery:
        assert gallery.identity_metadata(["Bao", "Sky"]) == {"Bao": {"badge": 7}, "Sky": {}}
