"""Searches over HTTP: a real server answers what the command line prints."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from retrieval import Gallery, ModelBundle, ingest
from retrieval.search.answers import answer_json, answers_of_image
from retrieval.service.schemas import Answers
from tests.cli.test_app import Faceprint, faceprint
from tests.cli.test_faces import aligned
from tests.detectors import save
from tests.service.server import Server

__all__ = ["aligned", "faceprint"]  # pytest finds fixtures by their names

OPTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, ()),
    ({"k": 3, "exclude_self": True}, ("-k", "3", "--exclude-self")),
    ({"within": 1.5}, ("--within", "1.5")),
    ({"k": 2, "within": 1.5}, ("-k", "2", "--within", "1.5")),
    ({"by_person": True, "k": 2}, ("--by-person", "-k", "2")),
    (
        {"by_person": True, "rule": "mean", "mean_of": 2, "photos": 1},
        ("--by-person", "--rule", "mean", "--mean-of", "2", "--photos", "1"),
    ),
    ({"by_person": True, "rule": "centroid"}, ("--by-person", "--rule", "centroid")),
    ({"identity": ["Adi", "Sky"], "k": 4}, ("--identity", "Adi", "--identity", "Sky", "-k", "4")),
    ({"where": ["enrolled>=2020-01-01", "face=7"]}, ("--where", "enrolled>=2020-01-01", "--where", "face=7")),
    ({"max_distance": 0.5, "exclude_self": True}, ("--max-distance", "0.5", "--exclude-self")),
]

SELECTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, ()),
    ({"faces": "largest"}, ("--faces", "largest")),
    ({"faces": "none"}, ("--faces", "none")),
    ({"min_face": 100}, ("--min-face", "100")),
    ({"by_person": True}, ("--by-person",)),
]


@pytest.fixture(scope="module")
def photo(faces: Path) -> Path:
    return sorted(faces.glob("*/*_0003.jpg"))[2]


def asked(server: Server, **options: Any) -> list[dict[str, Any]]:
    """The answers of a search, which are as the OpenAPI document says."""
    response = server.client.post("/v1/search", **options)
    assert response.status_code == 200, response.text
    Answers.model_validate(response.json())
    answers: list[dict[str, Any]] = response.json()["answers"]
    return answers


@pytest.mark.parametrize(("options", "typed"), OPTIONS, ids=lambda one: json.dumps(one))
def test_a_photo_in_each_form_gets_the_answer_of_the_command_line(
    options: dict[str, Any],
    typed: tuple[str, ...],
    served: Server,
    enrolled: Path,
    photo: Path,
    faceprint: Faceprint,
) -> None:
    status, out, _ = faceprint("search", enrolled, photo, "--json", *typed)
    assert status == 0
    expected = json.loads(out)
    data = photo.read_bytes()
    in_form = asked(served, files={"image": (photo.name, data)}, data=options)
    in_query = asked(served, content=data, headers={"content-type": "image/jpeg"}, params=options)
    in_json = asked(served, json={"image": base64.b64encode(data).decode(), **options})
    in_both = asked(served, files={"image": (photo.name, data)}, params=options)
    assert in_form == in_both == [{**answer, "query": photo.name} for answer in expected]
    assert in_query == in_json == [{**answer, "query": "image"} for answer in expected]


@pytest.mark.parametrize(
    ("options", "typed"),
    [one for one in OPTIONS if "exclude_self" not in one[0]],
    ids=lambda one: json.dumps(one),
)
def test_a_stored_face_and_a_vector_get_the_answers_of_the_command_line(
    options: dict[str, Any],
    typed: tuple[str, ...],
    served: Server,
    enrolled: Path,
    tmp_path: Path,
    faceprint: Faceprint,
) -> None:
    vector = np.random.default_rng(3).normal(size=(1, 2048)).astype(np.float32)
    np.save(tmp_path / "v.npy", vector)
    _, out, _ = faceprint("search", enrolled, "--face", 7, "--json", *typed)
    assert asked(served, json={"face": 7, **options}) == json.loads(out)
    _, out, _ = faceprint("search", enrolled, "--vectors", tmp_path / "v.npy", "--json", *typed)
    answers = asked(served, json={"vector": vector[0].tolist(), **options})
    assert answers == [{**answer, "query": "vector"} for answer in json.loads(out)]


def test_each_face_of_a_photo_is_answered(aligned: ModelBundle, tmp_path: Path, faceprint: Faceprint) -> None:
    for number, name in enumerate(("Ada", "Bo")):
        save(tmp_path / "photos" / name / "one.png", (320, 200), [(64, 64, 16)], seed=number)
    with Gallery.create(tmp_path / "g", aligned) as gallery:
        ingest(gallery, [tmp_path / "photos"])
    group = save(tmp_path / "group.png", (480, 200), [(64, 64, 16), (288, 64, 32)], seed=7)
    nobody = save(tmp_path / "nobody.png", (320, 200), [], seed=8)
    with Server(tmp_path / "g", tmp_path / "log") as server:
        for options, typed in SELECTIONS:
            _, out, _ = faceprint("search", tmp_path / "g", group, "--json", *typed)
            answers = asked(server, files={"image": ("image", group.read_bytes())}, data=options)
            assert answers == [{**answer, "query": "image"} for answer in json.loads(out)]
        assert len(asked(server, files={"image": ("image", group.read_bytes())})) == 2
        refused = server.client.post("/v1/search", files={"image": ("image", nobody.read_bytes())})
    assert refused.status_code == 422
    error = refused.json()["error"]
    assert (error["code"], error["reason"]) == ("unreadable-image", "no-face")


def test_explain_says_what_answering_took(served: Server, photo: Path) -> None:
    response = served.client.post("/v1/search", files={"image": photo.read_bytes()}, data={"explain": True})
    assert response.json()["explanation"]["photos to compare with"] == 36
    assert {"read", "embed", "refine"} <= set(response.json()["explanation"]["milliseconds"])


def test_a_calibrated_gallery_decides_as_the_command_line_does(
    own_gallery: Path, photo: Path, tmp_path: Path, faceprint: Faceprint
) -> None:
    with Gallery.open(own_gallery) as gallery:
        gallery.calibrate(0.1)
    with Server(own_gallery, tmp_path / "log") as server:
        answers = asked(
            server, files={"image": (str(photo), photo.read_bytes())}, data={"exclude_self": True}
        )
        other = server.client.post("/v1/search", json={"face": 1, "fpir": 0.00042})
    _, out, _ = faceprint("search", own_gallery, photo, "--json", "--exclude-self")
    assert answers == json.loads(out)
    assert answers[0]["decision"]["fpir"] == 0.1
    assert other.status_code == 400
    assert "not calibrated for an FPIR of 0.00042" in other.json()["error"]["message"]


def test_callers_at_once_get_each_their_own_answer(served: Server, enrolled: Path, faces: Path) -> None:
    """48 at once, of photos with different options, of stored faces and of bad photos."""
    photos = sorted(faces.glob("*/*.jpg"))
    with Gallery.open(enrolled) as gallery:
        found = {k: gallery.search_faces([*map(str, photos)], k=k, exclude_self=True) for k in (1, 4)}

    def expected(number: int) -> Any:
        k, place = (1, 4)[number % 2], number % len(photos)
        return [answer_json(one) for one in answers_of_image("image", None, found[k][place])]

    def ask(number: int) -> Any:
        photo = photos[number % len(photos)].read_bytes()
        if number % 7 == 3:
            return served.client.post(
                "/v1/search", content=photo[:100], headers={"content-type": "image/jpeg"}
            )
        options: dict[str, Any] = {"k": (1, 4)[number % 2], "exclude_self": True}
        return served.client.post("/v1/search", files={"image": ("image", photo)}, data=options)

    with ThreadPoolExecutor(48) as threads:
        responses = list(threads.map(ask, range(96)))
    for number, response in enumerate(responses):
        if number % 7 == 3:
            assert response.status_code == 422
        else:
            assert response.json() == {"answers": json.loads(json.dumps(expected(number)))}, number


def test_a_change_of_the_gallery_is_seen_by_the_next_search(
    own_gallery: Path, faces: Path, tmp_path: Path
) -> None:
    """Renamed, forgotten and enrolled by another process, with two workers, each of which must see it."""
    photo = sorted(faces.glob("*/*.jpg"))[0]

    def found() -> set[tuple[int, ...]]:
        """The numbers of faces, and of those of two names, in the answers of both workers."""
        counts = set()
        for _ in range(8):
            # Each on a connection of its own, so that both workers get some.
            answer = httpx.post(f"{server.url}/v1/search", json={"face": 2, "k": 36}, trust_env=False)
            names = [match["identity"] for match in answer.json()["answers"][0]["matches"]]
            counts.add((len(names), names.count("Adi"), names.count("Zoe")))
        return counts

    with (
        Server(own_gallery, tmp_path / "log", "--workers", 2) as server,
        Gallery.open(own_gallery) as gallery,
    ):
        assert found() == {(35, 5, 0)}
        gallery.rename_identity("Adi", "Zoe")
        assert found() == {(35, 0, 5)}
        gallery.forget(face_id=1)
        assert found() == {(34, 0, 4)}
        gallery.enroll([(photo.read_bytes() + b"\n", "Zoe")])
        assert found() == {(35, 0, 5)}
