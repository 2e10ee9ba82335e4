"""The page over HTTP: what it shows, what it escapes, and what it refuses."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from retrieval import Gallery, ModelBundle, verify
from retrieval.service import app, tokens
from retrieval.service.sessions import COOKIE, SECONDS, Sessions, new_key
from retrieval.service.tokens import Scope, TokenRegistry
from tests.service.pages import HOSTILE, HTML, first_face, form_token, make_gallery, person, send, words
from tests.service.server import Server
from tests.service.test_gate import refused
from tests.service.test_tokens import bearer

ESCAPED = "&lt;img src=x onerror=alert(1)&gt;"
PAGES = (
    "/",
    "/people",
    "/people/1",
    "/people/1/forget",
    "/people/unnamed",
    "/doubts",
    "/faces/1",
    "/enroll",
    "/health",
)


@pytest.fixture(scope="module")
def paged(bundle: ModelBundle, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for a gallery that tests change; each test has people of its own."""
    folder = tmp_path_factory.mktemp("paged")
    gallery = make_gallery(folder, bundle, faces)
    with Server(gallery, folder / "log", "--sources", folder / "photos") as server:
        yield server
    assert "Traceback" not in server.log.read_text()
    assert not verify(gallery).findings


def get(server: Server, address: str, **headers: str) -> httpx.Response:
    return server.client.get(address, headers={**HTML, **headers})


def faces_of(server: Server, name: str) -> list[dict[str, Any]]:
    answer = server.client.get("/v1/faces", params={"person": person(server, name)}).json()
    found: list[dict[str, Any]] = answer["faces"]
    return found


def photo_of(faces: Path, name: str, number: int = 2) -> bytes:
    return (faces / name / f"{name}_{number:04}.jpg").read_bytes()


@pytest.mark.parametrize("address", [*PAGES, "/nothing"])
def test_every_page_forbids_what_is_not_of_this_service_and_has_nothing_inline(
    address: str, paged: Server
) -> None:
    page = get(paged, address)
    assert page.status_code == (404 if address == "/nothing" else 200)
    policy = page.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "style-src 'self'", "form-action 'self'"} <= set(
        policy
    )
    assert page.headers["cache-control"] == "no-store"
    assert "unsafe" not in page.headers["content-security-policy"]
    assert not re.findall(r"<style|\sstyle=|<script(?! src=)|\shx-on|<[^>&]*\son\w+=", page.text)
    assert not re.findall(r"(?:src|href|action)=\"(?:https?:)?//", page.text)


def test_the_files_of_the_page_are_kept_by_browsers_under_addresses_that_change_with_them(
    paged: Server,
) -> None:
    loaded = re.findall(r'(?:href|src)="(/static/[^"]+)"', get(paged, "/").text)
    assert len(loaded) == 4
    for address in loaded:
        answer = paged.client.get(address)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
        assert "?v=" in address
    refused(paged.client.get("/static/LICENSE_HTMX"), 404, "not-found")


def test_names_and_file_names_are_text_wherever_they_stand(paged: Server, faces: Path) -> None:
    number, face = person(paged, HOSTILE), first_face(paged, HOSTILE)
    found = paged.client.post(
        "/search", files={"image": (f"{HOSTILE}.jpg", photo_of(faces, "Sky", 1))}, headers=HTML
    )
    shown = [found.text, paged.client.get("/people/names", params={"identity": "<img"}).text]
    shown += [
        get(paged, address).text
        for address in (
            "/people",
            "/people?name=%3Cimg",
            f"/people/{number}",
            f"/people/{number}/forget",
            f"/people/{person(paged, 'Adi')}/merge?identity={HOSTILE}",
            f"/faces/{face}",
        )
    ]
    for text in shown:
        assert ESCAPED in text
        assert "<img src=x" not in text
    missing = get(paged, f"/people/{number}/merge?identity=%3Cscript%3E")
    assert missing.status_code == 404
    assert "<script>" not in missing.text


def test_a_search_shows_the_photo_with_its_face_the_closest_photos_and_what_is_missing(
    paged: Server, faces: Path
) -> None:
    files = {"image": ("who.jpg", photo_of(faces, "Adi"))}
    page = paged.client.post("/search", files=files, headers=HTML).text
    assert "<!doctype html>" in page
    part = paged.client.post("/search", files=files, headers={"hx-request": "true"}).text
    assert "<html" not in part
    assert part in page
    assert "data:image/jpeg;base64," in part
    assert ">Adi?</text>" in part
    assert part.count("/v1/thumbnails/") == 6
    assert "faceprint calibrate" in part
    assert "The classifier says" in part
    with Gallery.open(Path(paged.client.get("/v1/info").json()["gallery"]["folder"])) as gallery:
        gallery.calibrate(0.1)
    part = paged.client.post("/search", files=files, headers={"hx-request": "true"}).text
    assert 'class="threshold"' in part
    assert "faceprint calibrate" not in part


def test_health_says_what_was_measured_and_whether_the_last_backup_has_everything(
    paged: Server, tmp_path: Path
) -> None:
    folder = Path(paged.client.get("/v1/info").json()["gallery"]["folder"])
    assert "make one with" in get(paged, "/health").text
    with Gallery.open(folder) as gallery:
        gallery.backup(tmp_path / "backup")
        info = gallery.info()
    page = get(paged, "/health").text
    assert "nothing changed since" in page
    assert info.fingerprint in page
    assert f"<b>{info.faces}</b>" in page


def test_a_photo_that_cannot_be_read_is_a_sentence_in_the_page(paged: Server) -> None:
    answer = paged.client.post("/search", files={"image": b"GIF"}, headers={"hx-request": "true"})
    assert (answer.status_code, "cannot be read" in answer.text) == (422, True)
    assert "<html" not in answer.text
    refused(paged.client.post("/search", json={"face": 1}), 400, "invalid-argument")


def _changing() -> list[str]:
    """The addresses of pages that change something."""
    routes = [route for router in app._PAGES for route in router.routes if isinstance(route, Route)]
    paths = [route.path for route in routes if "POST" in (route.methods or ())]
    named = {"person": 1, "face": 1, "job": "x", "merge": 1, "doubt": "x"}
    return [path.format(**named) for path in paths if path not in ("/search", "/sign-in")]


@pytest.mark.parametrize("address", _changing())
def test_a_change_without_the_token_of_a_form_is_refused(address: str, paged: Server) -> None:
    before = paged.client.get("/metrics").text.split("faceprint_gallery_revision ")[-1]
    for fields in ({}, {"form_token": "0" * 64}):
        answer = paged.client.post(address, data={"identity": "New", "face": "1", **fields}, headers=HTML)
        assert (answer.status_code, "of another session" in answer.text) == (403, True)
    assert paged.client.get("/metrics").text.split("faceprint_gallery_revision ")[-1] == before


def test_a_person_is_renamed_and_a_name_in_use_is_a_sentence(paged: Server) -> None:
    number = person(paged, "Imani")
    assert (
        send(paged.client, f"/people/{number}/rename", identity="Imani B.", keep_alias="on").status_code
        == 303
    )
    page = words(get(paged, f"/people/{number}").text)
    assert "<h1>Imani B.</h1>" in page
    assert "formerly Imani" in page
    assert person(paged, "Imani") == number
    taken = send(paged.client, f"/people/{number}/rename", identity="Adi")
    assert (taken.status_code, "already has an identity Adi" in taken.text) == (400, True)


def test_two_people_are_merged_after_a_page_that_says_what_becomes_of_them(paged: Server) -> None:
    first, second = person(paged, "Bao"), person(paged, "Eden")
    page = get(paged, f"/people/{first}/merge?identity=Eden").text
    assert "who then has 12 photos" in page
    merged = send(paged.client, f"/people/{first}/merge", identity="Eden")
    assert merged.status_code == 303
    assert merged.headers["location"].startswith(f"/people/{second}?merged=")
    shown = words(get(paged, merged.headers["location"]).text)
    assert "12 photos, formerly Bao" in shown
    assert "Bao was merged into Eden." in shown
    assert "was merged into" not in get(paged, f"/people/{second}?merged=4711").text
    assert "perhaps they were merged" in get(paged, f"/people/{first}").text


def test_a_merge_is_undone_after_a_page_that_says_what_does_not_come_back(paged: Server) -> None:
    def give(name: str, face: int) -> int:
        send(paged.client, "/people/assign", face=face, identity=name, to="new")
        return person(paged, name)

    def merge(one: int, name: str) -> None:
        assert send(paged.client, f"/people/{one}/merge", identity=name).status_code == 303

    photos = [face["id"] for face in faces_of(paged, "Ocean")]
    one, other, last = give("One", photos[1]), give("Other", photos[2]), give("Last", photos[3])
    send(paged.client, "/people/assign", face=photos[4], identity="One", to="person")
    merge(one, "Other")
    give("Guest", photos[4])
    merge(other, "Last")
    page = words(get(paged, f"/people/{last}").text)
    [newest] = re.findall(r'href="/merges/(\d+)/undo"', page)
    assert "into Other: first undo the merge of Other" in page
    assert "Other is a person again, with 2 of 2 faces." in words(
        send(paged.client, f"/merges/{newest}/undo").text
    )
    [before] = re.findall(r'href="/merges/(\d+)/undo"', get(paged, f"/people/{other}").text)
    asked = words(get(paged, f"/merges/{before}/undo").text)
    assert "One, with 1 of the 2 photos of before" in asked
    assert "1 photo given to others since" in asked
    undone = words(send(paged.client, f"/merges/{before}/undo").text)
    assert "One is a person again, with 1 of 2 faces; given to others since and left there: 1." in undone
    assert "<h1>One</h1>" in words(get(paged, f"/people/{one}").text)
    again = get(paged, f"/merges/{before}/undo")
    assert (again.status_code, "was undone already" in again.text) == (404, True)
    send(paged.client, "/people/assign", face=photos, identity="Ocean", to="person")


def test_faces_are_given_to_another_person_and_to_nobody(paged: Server) -> None:
    face = first_face(paged, "Ocean")
    shown = get(paged, f"/faces/{face}").text
    assert shown.count(f"/v1/thumbnails/{face}?") == 1  # itself is none of its closest photos
    assert shown.count("<li>") == 6
    given = send(paged.client, "/people/assign", face=face, identity="Ola", to="person")
    assert given.headers["location"] == f"/people/{person(paged, 'Ola')}"
    nobody = send(paged.client, "/people/assign", face=face, identity="", to="nobody")
    assert nobody.headers["location"] == "/people/unnamed"
    assert f'value="{face}"' in get(paged, "/people/unnamed").text
    for known in ("Adi", "Imani"):  # a name, and one that another test has made a former one
        taken = send(paged.client, "/people/assign", face=face, identity=known, to="new")
        assert (taken.status_code, "type another name for the new person" in taken.text) == (400, True)
    assert send(paged.client, "/people/assign", identity="Ola", to="person").status_code == 400
    assert send(paged.client, "/people/assign", face=face, identity=" ", to="person").status_code == 400


def test_a_person_is_forgotten_when_the_name_is_typed_and_the_receipt_is_shown(paged: Server) -> None:
    send(paged.client, "/people/assign", face=first_face(paged, "Ocean"), identity="Gone", to="person")
    number = person(paged, "Gone")
    wrong = send(paged.client, f"/people/{number}/forget", identity="Ocean")
    assert (wrong.status_code, "nothing was erased" in wrong.text) == (422, True)
    done = send(paged.client, f"/people/{number}/forget", identity="Gone")
    receipt = get(paged, done.headers["location"]).text
    saved = get(paged, f"{done.headers['location']}/file")
    assert "attachment" in saved.headers["content-disposition"]
    assert "default-src 'none'" in saved.headers["content-security-policy"]
    assert saved.json()["identity_ids"] == [number]
    assert "1 face was erased" in receipt
    assert "Gone" not in receipt
    assert get(paged, f"/people/{number}").status_code == 404
    assert get(paged, "/receipts/none").status_code == 404
    face = first_face(paged, "Ocean")
    done = send(paged.client, f"/faces/{face}/forget")
    assert "a face, 1 face" in get(paged, done.headers["location"]).text


def test_a_photo_is_enrolled_and_a_rejected_one_says_why(paged: Server, faces: Path) -> None:
    headers = {"x-form-token": form_token(get(paged, "/enroll").text), "hx-request": "true"}
    image = photo_of(faces, "Adi") + b"x"

    def enroll(content: bytes, name: str) -> httpx.Response:
        return paged.client.post(
            "/enroll/photos", data={"identity": name}, files={"image": content}, headers=headers
        )

    new = enroll(image, "Nova")
    assert (new.status_code, f'href="/people/{person(paged, "Nova")}"' in new.text) == (200, True)
    assert "known already" in enroll(image, "Nova").text
    broken = enroll(b"GIF", "Nova")
    assert (broken.status_code, "The photo was rejected" in broken.text) == (422, True)
    conflict = enroll(image, "Adi")
    assert (conflict.status_code, "identity-conflict" in conflict.text) == (409, True)


def test_a_job_enrolls_a_folder_and_the_page_shows_it(paged: Server, faces: Path, tmp_path: Path) -> None:
    outside = send(paged.client, "/enroll/jobs", source=str(tmp_path), identity_from="")
    assert (outside.status_code, "no folder and no archive" in outside.text) == (400, True)
    assert send(paged.client, "/enroll/jobs", source="Adi", identity_from="word").status_code == 400
    started = send(paged.client, "/enroll/jobs", source="Adi", identity_from="none")
    job = started.headers["location"].removeprefix("/enroll#job-")
    with paged.client.stream("GET", f"/v1/jobs/{job}/events") as events:
        assert "event: end" in "".join(events.iter_text())
    assert "6 already-known" in get(paged, "/enroll").text
    assert "6 already-known" in get(paged, f"/jobs/{job}").text


def test_a_page_of_another_site_leads_here_by_one_more_step_and_changes_nothing(paged: Server) -> None:
    led = get(paged, "/people?name=A", **{"sec-fetch-site": "cross-site"})
    assert (led.status_code, 'href="/people?name=A"' in led.text) == (403, True)
    sent = paged.client.post("/people/1/rename", headers={**HTML, "origin": "https://evil.example"})
    assert (sent.status_code, "Pages of other sites" in sent.text) == (403, True)
    named = get(paged, "/people", host="evil.example")
    assert (named.status_code, "localhost alone" in named.text) == (403, True)
    for answer in (led, sent, named):
        assert 'name="form-token" content=""' in answer.text
        assert "people.gallery" not in answer.text


def test_an_empty_gallery_says_what_to_do(empty_gallery: Path, tmp_path: Path, faces: Path) -> None:
    folder = Path(shutil.copytree(empty_gallery, tmp_path / "empty.gallery"))
    with Server(folder, tmp_path / "log") as server:
        assert "The gallery is empty" in get(server, "/").text
        assert "Nobody is enrolled yet" in get(server, "/people").text
        assert "make one with" in get(server, "/health").text
        assert "--sources FOLDER" in get(server, "/enroll").text
        files = {"image": photo_of(faces, "Adi")}
        found = server.client.post("/search", files=files, headers={"hx-request": "true"}).text
        assert "No stored photo to compare with" in found


@pytest.fixture(scope="module")
def guarded(bundle: ModelBundle, faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of two workers for a gallery with a token of each scope; `secrets` are in its folder."""
    folder = tmp_path_factory.mktemp("guarded")
    gallery = make_gallery(folder, bundle, faces)
    for scope in Scope:
        (folder / scope).write_text(tokens.create(gallery, scope, scope)[0])
    options = ("--workers", 2, "--access-log", "--sources", folder / "photos")
    with Server(gallery, folder / "log", *options) as server:
        yield server
    log = server.log.read_text()
    assert "Traceback" not in log
    for scope in Scope:
        assert (folder / scope).read_text() not in log


def secret(server: Server, scope: Scope) -> str:
    return (server.log.parent / scope).read_text()


@contextmanager
def signed_in(server: Server, secret: str) -> Iterator[httpx.Client]:
    """A browser that signed in; each of its requests has a connection of its own, so any worker answers."""
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=server.url, trust_env=False, timeout=120, limits=limits) as client:
        answer = client.post("/sign-in", data={"token": secret, "to": "/people"}, headers=HTML)
        assert (answer.status_code, answer.headers["location"]) == (303, "/people")
        yield client


def test_without_a_session_every_page_leads_to_the_one_that_asks_for_a_token(guarded: Server) -> None:
    for address in PAGES:
        answer = get(guarded, address)
        expected = "/sign-in" if address == "/" else f"/sign-in?to={address}"
        assert (answer.status_code, answer.headers["location"]) == (303, expected)
        assert HOSTILE not in answer.text
    part = get(guarded, "/people", **{"hx-request": "true"})
    assert (part.status_code, part.headers["hx-redirect"]) == (401, "/sign-in")
    refused(guarded.client.get("/people"), 401, "unauthorized")
    asked = get(guarded, "/sign-in").text
    assert 'type="password"' in asked
    assert not re.findall("<nav|people.gallery|[0-9a-f]{64}", asked)


def test_a_session_is_a_cookie_for_this_site_alone_and_holds_with_every_worker(guarded: Server) -> None:
    known = secret(guarded, Scope.READ)
    answer = guarded.client.post("/sign-in", data={"token": known}, headers=HTML)
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    assert known not in cookie
    assert known.removeprefix("fpt_") not in cookie
    guarded.client.cookies.clear()
    host = guarded.url.removeprefix("http://")
    origin = {"origin": f"https://{host}"}
    over_tls = guarded.client.post("/sign-in", data={"token": known}, headers={**HTML, **origin})
    assert "Secure" in over_tls.headers["set-cookie"].split("; ")
    guarded.client.cookies.clear()
    with signed_in(guarded, known) as browser:
        for _ in range(8):
            assert browser.get("/people", headers=HTML).status_code == 200
        assert browser.get(f"/v1/thumbnails/{1}").status_code == 200
        # Programs change /v1 with their token, never with a session.
        refused(browser.post("/v1/search", json={"face": 1}), 401, "unauthorized")
        left = send(browser, "/sign-out")
        assert (left.status_code, left.headers["location"]) == (303, "/sign-in")
        assert browser.get("/people", headers=HTML).status_code == 303


@pytest.mark.parametrize("wrong", ["", "fpt_wrong", "x" * 3000])
def test_a_wrong_token_begins_no_session(wrong: str, guarded: Server) -> None:
    answer = guarded.client.post("/sign-in", data={"token": wrong}, headers=HTML)
    assert (answer.status_code, "no valid token" in answer.text) == (401, True)
    assert "set-cookie" not in answer.headers
    assert not wrong or wrong not in answer.text


def test_the_form_with_a_token_is_bounded_before_it_is_read(guarded: Server) -> None:
    answer = guarded.client.post("/sign-in", data={"token": "x" * 5000}, headers=HTML)
    assert answer.status_code == 413


@pytest.mark.parametrize("to", ["//evil.example", "https://evil.example", "/\\evil.example", "x", "/\n/x"])
def test_signing_in_leads_to_no_other_site(to: str, guarded: Server) -> None:
    answer = guarded.client.post("/sign-in", data={"token": secret(guarded, Scope.READ), "to": to})
    assert answer.headers["location"] == "/"
    guarded.client.cookies.clear()


def test_scopes_hold_on_the_page_as_they_do_in_v1(guarded: Server) -> None:
    with signed_in(guarded, secret(guarded, Scope.READ)) as browser:
        page = browser.get("/people/1", headers=HTML).text
        assert not re.findall("Rename|Merge|Forget|checkbox|/enroll", page)
        assert browser.get("/enroll", headers=HTML).status_code == 403
        assert browser.get("/people/1/forget", headers=HTML).status_code == 403
        assert send(browser, "/people/1/rename", identity="X").status_code == 403
    with signed_in(guarded, secret(guarded, Scope.WRITE)) as browser:
        page = browser.get("/people/1", headers=HTML).text
        assert "Rename" in page
        assert "Forget" not in page
        assert send(browser, "/people/1/forget", identity="Adi").status_code == 403
        # What one process answers for all has the headers of a page too.
        enroll = browser.get("/enroll", headers=HTML)
        assert "script-src 'self'" in enroll.headers["content-security-policy"]
        started = send(browser, "/enroll/jobs", source="Adi", identity_from="none")
        job = started.headers["location"].removeprefix("/enroll#job-")
        with browser.stream("GET", f"/v1/jobs/{job}/events") as events:
            assert "event: end" in "".join(events.iter_text())
        assert "6 already-known" in browser.get(f"/jobs/{job}", headers=HTML).text
        assert send(browser, "/people/1/rename", identity="Adi B.", keep_alias="on").status_code == 303
        # The form token of one session is of no use in another.
        token = form_token(browser.get("/", headers=HTML).text)
    with signed_in(guarded, secret(guarded, Scope.ADMIN)) as browser:
        fields = {"form_token": token, "identity": "Y"}
        assert browser.post("/people/1/rename", data=fields, headers=HTML).status_code == 403
        done = send(browser, "/people/1/forget", identity="Adi B.")
        receipt = browser.get(done.headers["location"], headers=HTML).text
        assert "1 face was erased" in receipt


def test_a_revoked_token_ends_its_sessions_at_once(guarded: Server) -> None:
    gallery = guarded.log.parent / "people.gallery"
    made, _ = tokens.create(gallery, "lost", Scope.READ)
    with signed_in(guarded, made) as browser:
        assert browser.get("/people", headers=HTML).status_code == 200
        tokens.revoke(gallery, "lost")
        for _ in range(4):
            assert browser.get("/people", headers=HTML).status_code == 303


def test_a_session_is_of_one_key_one_token_and_twelve_hours(own_gallery: Path) -> None:
    _, token = tokens.create(own_gallery, "a", Scope.READ)
    _, other = tokens.create(own_gallery, "b", Scope.ADMIN)
    registry = TokenRegistry(own_gallery)
    sessions = Sessions(new_key(), registry)
    cookie = sessions.begun(token, now=1000.0)
    assert sessions.token_of(cookie, now=1000.0 + SECONDS - 1) == token
    assert sessions.token_of(cookie, now=1000.0 + SECONDS) is None
    assert Sessions(new_key(), registry).token_of(cookie, now=1000.0) is None
    end = cookie.split(".")[1]
    for forged in (
        cookie.replace(token.id, other.id),
        cookie.replace(end, f"{int(end) + 1}"),
        cookie.replace(end, "9" * 400),
        cookie[:-1],
        f"{token.id}.{end}.\udcff",
        "",
        "..",
    ):
        assert sessions.token_of(forged, now=1000.0) is None
    assert sessions.is_form_token(sessions.form_token(cookie), cookie)
    assert not sessions.is_form_token(sessions.form_token(""), cookie)


def test_a_program_with_a_token_may_look_at_the_page(guarded: Server) -> None:
    answer = guarded.client.get("/health", headers={**HTML, **bearer(secret(guarded, Scope.READ))})
    assert (answer.status_code, COOKIE in answer.headers.get("set-cookie", "")) == (200, False)
