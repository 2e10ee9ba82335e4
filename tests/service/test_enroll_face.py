"""Enrolling a face from the card that says UNKNOWN: which face, under which name, and by whom."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from retrieval import Gallery, ModelBundle, verify
from retrieval.service import tokens
from retrieval.service.tokens import Scope
from tests.cli.test_faces import aligned
from tests.detectors import save
from tests.service.pages import HTML, form_token
from tests.service.server import Server

__all__ = ["aligned"]  # pytest finds the fixture by its name

PART = {**HTML, "hx-request": "true"}


@pytest.fixture(scope="module")
def asked(aligned: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of two workers for a calibrated gallery of two people, with a token of each scope."""
    folder = tmp_path_factory.mktemp("asked")
    with Gallery.create(folder / "g", aligned) as gallery:
        for number, name in enumerate(("Ada", "Bo")):
            for place in (64, 224):
                photo = save(folder / name / f"{place}.png", (320, 200), [(place, 64, 16)], seed=number)
                gallery.enroll([(photo, name)])
        decide_narrowly(gallery, sorted(folder.glob("*/*.png")))
    for scope in Scope:
        (folder / scope).write_text(tokens.create(folder / "g", scope, scope)[0])
    with Server(folder / "g", folder / "log", "--workers", 2) as server:
        yield server
    assert "Traceback" not in server.log.read_text()
    assert not verify(folder / "g").findings


def decide_narrowly(gallery: Gallery, photos: list[Path]) -> None:
    """Calibrates by strangers who are as good as enrolled, so that any other face is UNKNOWN."""
    reader = gallery.photo_reader
    vectors = gallery.embedder.embed(np.stack([reader.square(photo) for photo in photos])).vectors
    gallery.calibrate(0.5, strangers=[(vectors + np.float32(1e-4), [None] * len(photos))])


@contextmanager
def viewer(server: Server, scope: Scope) -> Iterator[httpx.Client]:
    """A browser that signed in with the token of a scope, with the token of its forms as a header."""
    secret = (server.log.parent / scope).read_text()
    with httpx.Client(base_url=server.url, trust_env=False, timeout=120, headers=PART) as client:
        client.post("/sign-in", data={"token": secret, "to": "/"})
        client.headers["x-form-token"] = form_token(client.get("/", headers=HTML).text)
        yield client


def search(client: httpx.Client, photo: Path) -> str:
    """The cards of a photo."""
    return client.post("/search", files={"image": (photo.name, photo.read_bytes())}).text


def names(cards: str) -> list[str]:
    """What the cards call their faces, from left to right."""
    return re.findall(r'<h2 id="name-\d+">(?:<bdi>)?([^<]*)', cards)


def addresses(cards: str) -> list[str]:
    """Where the cards send a name."""
    return re.findall(r'hx-post="(/enroll/face[^"]*)"', cards)


def enroll(client: httpx.Client, address: str, photo: Path, name: str | None) -> httpx.Response:
    files = {"image": (photo.name, photo.read_bytes())}
    return client.post(address, data={} if name is None else {"identity": name}, files=files)


def test_each_face_of_a_photo_is_enrolled_under_its_own_name(asked: Server, tmp_path: Path) -> None:
    photo = save(tmp_path / "two.png", (480, 200), [(64, 64, 16), (288, 64, 32)], seed=5)
    with viewer(asked, Scope.ADMIN) as client:
        cards = search(client, photo)
        assert names(cards) == ["UNKNOWN", "UNKNOWN"]
        left, right = addresses(cards)
        done = enroll(client, right, photo, " Rex ")
        assert (done.status_code, "Enrolled as" in done.text) == (200, True)
        cards = search(client, photo)
        assert names(cards) == ["UNKNOWN", "Rex"]
        assert addresses(cards) == [left]
        assert "Enrolled as" in enroll(client, left, photo, "Lea").text
        assert names(search(client, photo)) == ["Lea", "Rex"]
        assert "Known already, as" in enroll(client, left, photo, "Lea").text
        taken = enroll(client, left, photo, "Rex")
        assert (taken.status_code, "enrolled as Lea" in taken.text) == (409, True)

        [shown, forget] = re.findall(r'href="(/faces/[^"]+)"', done.text)
        assert "Rex" in client.get(shown, headers=HTML).text
        assert "Forget this face?" in client.get(forget, headers=HTML).text
        assert client.post(forget).status_code == 303
        assert names(search(client, photo)) == ["Lea", "UNKNOWN"]
    with Gallery.open(asked.log.parent / "g") as gallery:
        with gallery.vault.store.read() as reader:
            [lea] = reader.faces(reader.face_ids_of("Lea")).values()
        assert lea.box == pytest.approx((24.5, 24.5, 96, 96), abs=0.1)
        entries = [entry.via for entry in gallery.audit_log() if entry.action in ("enroll", "forget")]
    assert entries[-2:] == ["faceprint serve, token admin"] * 2  # one entry has both enrollments


def test_only_one_who_may_write_is_offered_to_enroll(asked: Server, tmp_path: Path) -> None:
    photo = save(tmp_path / "one.png", (320, 200), [(64, 64, 16)], seed=6)
    with viewer(asked, Scope.WRITE) as client:
        [address] = addresses(search(client, photo))
        del client.headers["x-form-token"]
        forged = enroll(client, address, photo, "Zed")
        assert (forged.status_code, "of another session" in forged.text) == (403, True)
    with viewer(asked, Scope.READ) as client:
        cards = search(client, photo)
        assert (names(cards), addresses(cards)) == (["UNKNOWN"], [])
        assert enroll(client, address, photo, "Zed").status_code == 403
    with viewer(asked, Scope.WRITE) as client:
        assert names(search(client, photo)) == ["UNKNOWN"]
        done = enroll(client, address, photo, "Zed").text
        assert "/forget" not in done  # takes the scope admin


@pytest.mark.parametrize(
    ("box", "name", "status", "words"),
    [
        ("24.5,24.5,96,96", None, 400, "type whose face it is"),
        ("24.5,24.5,96,96", "  ", 400, "type whose face it is"),
        ("124,24,96,96", "Zoe", 422, "no face was found"),
        ("24.5,24.5,96", "Zoe", 400, "`box`"),
        ("nan,24.5,96,96", "Zoe", 400, "box"),
        ("24.5,24.5,-96,96", "Zoe", 400, "box"),
        ("24.5,24.5,96,96", "Z" * 2000, 400, "1024"),
    ],
)
def test_a_wrong_name_or_box_is_a_sentence_and_enrolls_nothing(
    box: str, name: str | None, status: int, words: str, asked: Server, tmp_path: Path
) -> None:
    photo = save(tmp_path / "one.png", (320, 200), [(64, 64, 16)], seed=8)
    with viewer(asked, Scope.WRITE) as client:
        refused = enroll(client, f"/enroll/face?box={box}", photo, name)
        assert (refused.status_code, 'role="alert"' in refused.text) == (status, True)
        assert words.strip("`") in refused.text
        assert client.get("/v1/people", params={"name": "Zoe"}).json()["people"] == []


def test_a_model_that_takes_photos_as_they_are_enrolls_the_photo(
    own_gallery: Path, faces: Path, tmp_path: Path
) -> None:
    photo = save(tmp_path / "other.png", (96, 96), [(40, 40, 8)], seed=3)
    with Gallery.open(own_gallery) as gallery:
        decide_narrowly(gallery, sorted(faces.glob("*/*_0001.jpg")))
    with Server(own_gallery, tmp_path / "log") as server:
        token = form_token(server.client.get("/", headers=HTML).text)
        server.client.headers.update(PART | {"x-form-token": token})
        cards = search(server.client, photo)
        assert (names(cards), addresses(cards)) == (["UNKNOWN"], ["/enroll/face"])
        useless = enroll(server.client, "/enroll/face?box=1,1,9,9", photo, "Mo")
        assert (useless.status_code, "no face detector" in useless.text) == (400, True)
        assert "Enrolled as" in enroll(server.client, "/enroll/face", photo, "Mo").text
        assert names(search(server.client, photo)) == ["Mo"]
