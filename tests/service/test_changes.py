"""People and faces over HTTP: listed, shown, enrolled, annotated, renamed, merged and forgotten."""

import base64
import hashlib
import io
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from retrieval import Gallery, ModelBundle, verify
from retrieval.service import cursors, tokens
from retrieval.service.schemas import FacesPage, MergesPage, PeoplePage, PersonDetails, Receipt
from retrieval.service.tokens import Scope
from tests.cli.test_faces import aligned
from tests.detectors import save
from tests.service.server import Server
from tests.service.test_gate import refused
from tests.service.test_tokens import bearer

__all__ = ["aligned"]  # pytest finds the fixture by its name


@pytest.fixture(scope="module")
def photos(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the drawn faces, of which files are changed."""
    return Path(shutil.copytree(faces, tmp_path_factory.mktemp("library") / "faces"))


@pytest.fixture(scope="module")
def changing(bundle: ModelBundle, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose gallery tests change; each test has people of its own."""
    folder = tmp_path_factory.mktemp("changing")
    with Gallery.create(folder / "g", bundle) as gallery:
        gallery.enroll([(path, path.parent.name) for path in sorted(photos.glob("*/*.jpg"))])
    with Server(folder / "g", folder / "log") as server:
        yield server
    assert "Traceback" not in server.log.read_text()
    assert not verify(folder / "g").findings


def photo(number: int) -> bytes:
    """The bytes of one of many photos."""
    data = io.BytesIO()
    Image.new("RGB", (40, 40), (number % 256, number // 256, 90)).save(data, format="PNG")
    return data.getvalue()


def enroll(server: Server, number: int, identity: str | None) -> dict[str, Any]:
    data = {} if identity is None else {"identity": identity}
    response = server.client.post("/v1/faces", files={"image": photo(number)}, data=data)
    assert response.status_code == 201, response.text
    answer: dict[str, Any] = response.json()
    return answer


def person(server: Server, name: str) -> dict[str, Any]:
    """The one person with a name, current or former."""
    [found] = server.client.get("/v1/people", params={"name": name}).json()["people"]
    shown: dict[str, Any] = server.client.get(f"/v1/people/{found['id']}").json()
    PersonDetails.model_validate(shown)
    return shown


def pages(server: Server, path: str, of: str, **options: Any) -> list[Any]:
    """All items of a list, page by page."""
    items: list[Any] = []
    cursor: dict[str, Any] = {}
    while True:
        page = server.client.get(path, params={**options, **cursor}).json()
        {"people": PeoplePage, "faces": FacesPage, "merges": MergesPage}[of].model_validate(page)
        assert len(page[of]) <= options["limit"]
        items += page[of]
        if page["next"] is None:
            return items
        cursor = {"cursor": page["next"]}


@pytest.mark.parametrize("limit", [1, 4, 500])
def test_lists_have_everything_once_whatever_the_page(limit: int, changing: Server) -> None:
    people = pages(changing, "/v1/people", "people", limit=limit)
    names = [one["identity"] for one in people]
    assert names == sorted(set(names))
    assert {"Adi", "Sky"} <= set(names)
    adi = person(changing, "Adi")
    assert (adi["faces"], adi["former_names"]) == (6, [])
    found = pages(changing, "/v1/faces", "faces", limit=limit, person=adi["id"])
    assert [one["id"] for one in found] == [1, 2, 3, 4, 5, 6]
    assert {(one["identity"], one["person"]) for one in found} == {("Adi", adi["id"])}
    assert adi["face_id"] == 1
    few = pages(changing, "/v1/faces", "faces", limit=limit, where="face=3")
    assert [changing.client.get("/v1/faces/3").json()] == few
    ids = [one["id"] for one in pages(changing, "/v1/faces", "faces", limit=limit)]
    assert ids == sorted(set(ids))
    assert len(ids) >= 36


def test_wrong_pages_and_ids_are_refused(changing: Server) -> None:
    get = changing.client.get
    for wrong in (
        "x",
        "====",
        "Mg",
        cursors.encoded("A") + "!",
        "bnVsbA",
        "\ud800".encode("utf-8", "replace"),
    ):
        refused(get("/v1/people", params={"cursor": wrong}), 400, "invalid-argument")
    for wrong in (cursors.encoded("Adi"), cursors.encoded(-1), cursors.encoded(2**63), "dHJ1ZQ"):
        refused(get("/v1/faces", params={"cursor": wrong}), 400, "invalid-argument")
    for limit in ("0", "501", "many"):
        refused(get("/v1/faces", params={"limit": limit}), 400, "invalid-argument")
    refused(get("/v1/faces", params={"where": "?"}), 400, "invalid-argument")
    refused(get("/v1/faces", params={"person": 4711}), 404, "not-found")
    for path in ("/v1/people/4711", "/v1/faces/4711", "/v1/thumbnails/4711"):
        refused(get(path), 404, "not-found")
    for path in (
        "/v1/people/0",
        "/v1/people/Adi",
        f"/v1/faces/{2**63}",
        "/v1/thumbnails/..%2f..%2fetc%2fpasswd",
    ):
        response = get(path)
        assert response.status_code in (400, 404)
    assert get("/v1/people", params={"name": "nobody of this name"}).json() == {"people": [], "next": None}


def test_a_photo_in_each_form_is_enrolled_once(changing: Server) -> None:
    post = changing.client.post
    first = enroll(changing, 1, "Una")
    assert first == {"status": "enrolled", "face_ids": first["face_ids"], "identity": "Una", "detail": None}
    again = post("/v1/faces", files={"image": photo(1)}, data={"identity": "Una"})
    assert (again.status_code, again.json()["status"]) == (200, "duplicate")
    assert again.json()["face_ids"] == first["face_ids"]
    raw = post(
        "/v1/faces", content=photo(2), params={"identity": "Una"}, headers={"content-type": "image/png"}
    )
    coded = base64.b64encode(photo(3)).decode()
    in_json = post("/v1/faces", json={"image": coded, "identity": "Una", "metadata": {"year": 2020}})
    in_form = post(
        "/v1/faces", files={"image": photo(4)}, data={"identity": "Una", "metadata": '{"year": 2021}'}
    )
    assert [one.status_code for one in (raw, in_json, in_form)] == [201, 201, 201]
    una = person(changing, "Una")
    shown = pages(changing, "/v1/faces", "faces", limit=9, person=una["id"])
    assert [one["metadata"] for one in shown] == [{}, {}, {"year": 2020}, {"year": 2021}]
    assert {one["path"] for one in shown} == {None}
    nearest = post("/v1/search", files={"image": photo(3)}, data={"k": 1}).json()["answers"][0]["matches"]
    assert (nearest[0]["identity"], nearest[0]["face_id"]) == ("Una", in_json.json()["face_ids"][0])


def test_a_photo_that_is_refused_changes_nothing(changing: Server) -> None:
    post = changing.client.post
    before = changing.client.get("/v1/info").json()["gallery"]["faces"]
    enroll(changing, 11, "Vera")
    conflict = post("/v1/faces", files={"image": photo(11)}, data={"identity": "Wanda"})
    assert "enrolled as Vera" in refused(conflict, 409, "identity-conflict")
    assert conflict.json()["error"]["reason"] == "identity-conflict"
    cut = post("/v1/faces", files={"image": photo(12)[:50]})
    refused(cut, 422, "rejected")
    for data, words in [
        ({"identity": " "}, "nothing but spaces"),
        ({"identity": "a\nb"}, "control character"),
        ({"identity": "x" * 1025}, "identity"),
        ({"faces": "one"}, "no face detector"),
        ({"max_yaw": "0.5"}, "no face detector"),
        ({"metadata": "[]"}, "`metadata`"),
        ({"metadata": "{"}, "`metadata`"),
        ({"path": "/etc/passwd"}, "`path`"),
    ]:
        response = post("/v1/faces", files={"image": photo(12)}, data=data)
        assert response.status_code == 400, response.text
        assert words in response.json()["error"]["message"]
    refused(post("/v1/faces", json={"identity": "Wanda"}), 400, "invalid-argument")
    assert changing.client.get("/v1/info").json()["gallery"]["faces"] == before + 1


def test_a_person_is_annotated_renamed_and_merged(changing: Server) -> None:
    client = changing.client
    enroll(changing, 21, "Xenia")
    enroll(changing, 22, "Ines/../Adi")
    xenia, other = person(changing, "Xenia"), person(changing, "Ines/../Adi")
    annotated = client.put(f"/v1/people/{xenia['id']}/metadata", json={"country": "FR"})
    assert annotated.json() == {**xenia, "metadata": {"country": "FR"}}
    renamed = client.post(f"/v1/people/{xenia['id']}/rename", json={"identity": "Xenia Ω"})
    assert renamed.json() == {**annotated.json(), "identity": "Xenia Ω", "former_names": ["Xenia"]}
    assert person(changing, "Xenia") == renamed.json()
    merged = client.post(f"/v1/people/{other['id']}/merge", json={"into": xenia["id"]})
    [merge] = [one["id"] for one in pages(changing, "/v1/merges", "merges", limit=1)]
    assert merged.json() == {
        **renamed.json(),
        "faces": 2,
        "former_names": ["Ines/../Adi", "Xenia"],
        "merge": merge,
    }
    undone = client.post(f"/v1/merges/{merge}/undo").json()
    assert (undone["person"], undone["into"]) == (other, renamed.json())
    assert undone["says"] == ["Ines/../Adi is a person again, with 1 of 1 faces."]
    refused(client.post(f"/v1/merges/{merge}/undo"), 404, "not-found")
    client.post(f"/v1/people/{other['id']}/merge", json={"into": xenia["id"]})
    refused(client.get(f"/v1/people/{other['id']}"), 404, "not-found")
    refused(
        client.post(f"/v1/people/{xenia['id']}/merge", json={"into": xenia["id"]}), 400, "invalid-argument"
    )
    taken = client.post(f"/v1/people/{xenia['id']}/rename", json={"identity": "Sky"})
    assert "already has an identity Sky" in refused(taken, 400, "invalid-argument")
    erased = client.post(f"/v1/people/{xenia['id']}/rename", json={"identity": "Yara", "keep_alias": False})
    assert "Xenia Ω" not in erased.text
    emptied = client.put(f"/v1/people/{xenia['id']}/metadata", json={})
    assert emptied.json()["metadata"] == {}
    refused(client.put(f"/v1/people/{xenia['id']}/metadata", json=[1]), 400, "invalid-argument")
    refused(client.put("/v1/people/4711/metadata", json={}), 404, "not-found")


def test_a_face_is_annotated_and_the_next_search_can_ask_for_it(changing: Server) -> None:
    [number] = enroll(changing, 31, "Zita")["face_ids"]
    annotated = changing.client.put(f"/v1/faces/{number}/metadata", json={"badge": 4711})
    assert annotated.json()["metadata"] == {"badge": 4711}
    answer = changing.client.post("/v1/search", json={"face": 1, "where": ["badge=4711"]}).json()["answers"][
        0
    ]
    assert [match["face_id"] for match in answer["matches"]] == [number]
    refused(changing.client.put("/v1/faces/4711/metadata", json={}), 404, "not-found")


def test_a_face_gets_a_name_and_loses_it(changing: Server) -> None:
    [number] = enroll(changing, 61, None)["face_ids"]
    path = f"/v1/faces/{number}/identity"
    assert changing.client.put(path, json={"identity": "Pia"}).json()["identity"] == "Pia"
    assert person(changing, "Pia")["face_id"] == number
    assert changing.client.put(path, json={"identity": None}).json()["person"] is None
    assert changing.client.get("/v1/people", params={"name": "Pia"}).json()["people"] == []
    refused(changing.client.put(path, json={}), 400, "invalid-argument")
    refused(changing.client.put("/v1/faces/4711/identity", json={"identity": "Pia"}), 404, "not-found")


def test_a_forgotten_person_is_gone_and_the_receipt_names_nobody(changing: Server) -> None:
    client = changing.client
    for number in (41, 42, 43):
        enroll(changing, number, "Olga")
    olga = person(changing, "Olga")
    one = client.delete(f"/v1/faces/{olga['face_id']}")
    assert one.status_code == 200
    assert one.json()["face_ids"] == [olga["face_id"]]
    receipt = client.delete(f"/v1/people/{olga['id']}")
    Receipt.model_validate(receipt.json())
    assert (receipt.json()["faces"], "Olga" in receipt.text) == (2, False)
    refused(client.delete(f"/v1/people/{olga['id']}"), 404, "not-found")
    assert client.get("/v1/people", params={"name": "Olga"}).json()["people"] == []


def test_a_face_is_shown_only_while_its_photo_is_where_it_was_enrolled_from(
    changing: Server, photos: Path
) -> None:
    client = changing.client
    sky = person(changing, "Sky")
    [first, second, *_] = pages(changing, "/v1/faces", "faces", limit=9, person=sky["id"])
    shown = client.get(f"/v1/thumbnails/{first['id']}", params={"side": 48})
    assert shown.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(shown.content)).size == (48, 48)
    Path(first["path"]).write_bytes(Path(second["path"]).read_bytes())
    assert "no longer where" in refused(client.get(f"/v1/thumbnails/{first['id']}"), 404, "not-found")
    Path(second["path"]).unlink()
    Path(second["path"]).symlink_to("/etc/passwd")
    refused(client.get(f"/v1/thumbnails/{second['id']}"), 404, "not-found")
    [uploaded] = enroll(changing, 51, None)["face_ids"]
    refused(client.get(f"/v1/thumbnails/{uploaded}"), 404, "not-found")
    for wrong in ({"side": 15}, {"side": 1025}, {"part": "all"}, {"path": "/etc/passwd"}):
        refused(client.get(f"/v1/thumbnails/{first['id']}", params=wrong), 400, "invalid-argument")


def test_faces_of_a_photo_are_enrolled_and_shown_each(aligned: ModelBundle, tmp_path: Path) -> None:
    two = save(tmp_path / "two.png", (480, 200), [(64, 64, 16), (288, 64, 32)], seed=7)
    with Gallery.create(tmp_path / "g", aligned) as gallery:
        gallery.enroll([(two, None)])
    other = save(tmp_path / "other.png", (480, 200), [(64, 64, 16), (288, 64, 32)], seed=8)
    with Server(tmp_path / "g", tmp_path / "log") as server:
        enrolled = server.client.post("/v1/faces", files={"image": other.read_bytes()})
        assert (enrolled.status_code, enrolled.json()["face_ids"]) == (201, [3, 4])
        one = server.client.post(
            "/v1/faces", files={"image": other.read_bytes() + b" "}, data={"faces": "one"}
        )
        assert (one.status_code, one.json()["error"]["reason"]) == (422, "several-faces")
        boxes = [server.client.get(f"/v1/faces/{number}").json()["box"] for number in (1, 2)]
        assert boxes == [[24.5, 24.5, 96, 96], [208.5, -15.5, 192, 192]]
        shown = [server.client.get(f"/v1/thumbnails/{number}").content for number in (1, 2)]
        assert [Image.open(io.BytesIO(data)).size for data in shown] == [(160, 160)] * 2
        assert shown[0] != shown[1]
        whole = server.client.get("/v1/thumbnails/1", params={"part": "photo"}).content
        assert Image.open(io.BytesIO(whole)).size == (160, 67)


def test_scopes_allow_what_they_say_and_the_audit_log_names_the_token(
    own_gallery: Path, tmp_path: Path
) -> None:
    secrets = {scope: tokens.create(own_gallery, f"caller-{scope}", scope)[0] for scope in Scope}
    requests: list[tuple[Scope, str, str, dict[str, Any]]] = [
        (Scope.READ, "GET", "/metrics", {}),
        (Scope.READ, "GET", "/v1/people", {}),
        (Scope.READ, "GET", "/v1/faces/1", {}),
        (Scope.READ, "GET", "/v1/thumbnails/1", {}),
        (Scope.READ, "POST", "/v1/search", {"json": {"face": 1}}),
        (Scope.WRITE, "POST", "/v1/faces", {"files": {"image": photo(1)}, "data": {"identity": "Una"}}),
        (Scope.WRITE, "PUT", "/v1/faces/1/metadata", {"json": {"a": 1}}),
        (Scope.WRITE, "PUT", "/v1/people/1/metadata", {"json": {"a": 1}}),
        (Scope.WRITE, "POST", "/v1/people/1/rename", {"json": {"identity": "Adi"}}),
        (Scope.WRITE, "POST", "/v1/people/2/merge", {"json": {"into": 1}}),
        (Scope.READ, "GET", "/v1/merges", {}),
        (Scope.WRITE, "POST", "/v1/merges/6/undo", {}),
        (Scope.WRITE, "POST", "/v1/people/2/merge", {"json": {"into": 1}}),
        (Scope.READ, "GET", "/v1/doubts", {}),
        (Scope.WRITE, "POST", "/v1/doubts/hub.f1.p1/dismiss", {}),
        (Scope.WRITE, "POST", "/v1/doubts/hub.f1.p1/reopen", {}),
        (Scope.ADMIN, "DELETE", "/v1/faces/2", {}),
        (Scope.ADMIN, "DELETE", "/v1/people/3", {}),
    ]
    with Server(own_gallery, tmp_path / "log", "--workers", 2) as server:
        for needed, method, path, options in requests:
            for scope in Scope:
                if not scope.includes(needed):
                    response = server.client.request(method, path, headers=bearer(secrets[scope]), **options)
                    refused(response, 403, "forbidden")
            response = server.client.request(method, path, headers=bearer(secrets[needed]), **options)
            assert response.status_code in (200, 201), response.text
    with Gallery.open(own_gallery) as gallery:
        entries = [(entry.via, entry.action) for entry in gallery.audit_log()][1:]
        assert not gallery.verify().findings
    write, admin = ("faceprint serve, token caller-write", "faceprint serve, token caller-admin")
    assert entries == [
        (write, "enroll"),
        (write, "annotate"),
        (write, "annotate"),
        (write, "rename-identity"),
        (write, "merge-identities"),
        (write, "undo-merge"),
        (write, "merge-identities"),
        (write, "dismiss-doubt"),
        (write, "reopen-doubt"),
        (admin, "forget"),
        (admin, "forget"),
    ]


def test_enrollments_of_two_callers_are_two_entries_of_the_audit_log(
    own_gallery: Path, tmp_path: Path
) -> None:
    secrets = [tokens.create(own_gallery, name, Scope.WRITE)[0] for name in ("door", "desk")]
    with Server(own_gallery, tmp_path / "log") as server:
        for number, secret in enumerate([secrets[0], secrets[0], secrets[1], secrets[0]]):
            files = {"image": photo(number)}
            server.client.post("/v1/faces", files=files, headers=bearer(secret)).raise_for_status()
    with Gallery.open(own_gallery) as gallery:
        found = [(entry.via.rpartition(" ")[2], entry.faces) for entry in gallery.audit_log()][1:]
    assert found == [("door", 2), ("desk", 1), ("door", 1)]


def killed_in_the_middle(server: Server, pid: int) -> dict[int, int]:
    """Enrolls 200 photos by 8 callers and kills a process after the 50th; what was acknowledged."""
    acknowledged: dict[int, int] = {}
    enough = threading.Event()

    def ask(number: int) -> None:
        try:
            response = httpx.post(
                f"{server.url}/v1/faces",
                files={"image": photo(number)},
                data={"identity": f"P{number % 20}"},
                timeout=120,
                trust_env=False,
            )
        except httpx.HTTPError:
            return
        if response.status_code in (200, 201):
            [acknowledged[number]] = response.json()["face_ids"]
            if len(acknowledged) >= 50:
                enough.set()
        else:
            assert response.status_code == 503, response.text
            assert response.json()["error"]["code"] == "interrupted"

    def kill() -> None:
        enough.wait()
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(ask, range(200)))
    killer.join()
    return acknowledged


def check_acknowledged(folder: Path, acknowledged: dict[int, int]) -> None:
    """Each acknowledged photo is in the gallery once, under its id, and the gallery is whole."""
    with Gallery.open(folder) as gallery:
        with gallery.vault.writing():
            pass  # removes what the killed write left
        with gallery.vault.store.read() as reader:
            stored = {face.sha256: face.id for some in reader.all_faces() for face in some}
            assert reader.count() == len(stored)
        assert not gallery.verify().findings
    for number, face in acknowledged.items():
        assert stored[hashlib.sha256(photo(number)).hexdigest()] == face


def test_a_killed_server_has_what_it_acknowledged_once(own_gallery: Path, tmp_path: Path) -> None:
    with Server(own_gallery, tmp_path / "log") as server:
        acknowledged = killed_in_the_middle(server, server.process.pid)
    assert 50 <= len(acknowledged) < 200
    check_acknowledged(own_gallery, acknowledged)
    with Server(own_gallery, tmp_path / "log2") as server:
        files = {"image": photo(min(acknowledged))}
        again = server.client.post("/v1/faces", files=files)
        assert (again.status_code, again.json()["face_ids"]) == (200, [acknowledged[min(acknowledged)]])


def test_a_killed_writer_is_started_again_and_has_what_it_acknowledged_once(
    own_gallery: Path, tmp_path: Path
) -> None:
    """Requests of its time are answered by the next one, but for those that it had begun."""
    with Server(own_gallery, tmp_path / "log", "--workers", 2) as server:
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        if not children.exists():
            pytest.skip("this system does not list the children of a process")
        writer = min(map(int, children.read_text().split()))  # it is started first
        acknowledged = killed_in_the_middle(server, writer)
        assert len(acknowledged) >= 150
        files = {"image": photo(max(acknowledged))}
        again = server.client.post("/v1/faces", files=files)
        assert again.json()["face_ids"] == [acknowledged[max(acknowledged)]]
    assert f"worker {writer} ended with -9; starting another" in server.log.read_text()
    check_acknowledged(own_gallery, acknowledged)


def test_erased_vectors_leave_the_memory_of_a_process_that_nobody_asks(
    own_gallery: Path, tmp_path: Path
) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not list the maps of a process")
    with Server(own_gallery, tmp_path / "log") as server:
        maps = Path(f"/proc/{server.process.pid}/maps")
        server.client.post("/v1/search", json={"face": 1}).raise_for_status()
        with Gallery.open(own_gallery) as gallery:
            gallery.forget(face_id=1)
        while any("(deleted)" in line for line in maps.read_text().splitlines() if ".faiss" in line):
            time.sleep(0.05)
        assert json.loads(server.client.get("/healthz").text) == {"status": "ok"}
