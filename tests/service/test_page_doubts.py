"""The page of doubts over HTTP: an audit, answers and their undo, lists, scopes, and names that are text."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from retrieval import Gallery, ModelBundle, verify
from retrieval.service import tokens
from retrieval.service.tokens import Scope
from tests.quality.test_audit import Drawn
from tests.service.pages import HOSTILE, HTML, doubtful, send, words
from tests.service.server import Server
from tests.service.test_doubts import audit, page, planted
from tests.service.test_jobs import events
from tests.service.test_tokens import bearer

ESCAPED = "&lt;img src=x onerror=alert(1)&gt;"


@pytest.fixture(scope="module")
def doubted(bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for an audited gallery: a photo of the hostile name among those of P03, and P05 twice."""
    folder = tmp_path_factory.mktemp("doubted-page")
    with Server(doubtful(folder / "g", bundle), folder / "log") as server:
        assert "was not audited yet" in get(server).text
        assert send(server.client, "/doubts/audit").headers["location"] == "/doubts"
        [job] = server.client.get("/v1/jobs").json()["jobs"]
        assert events(server, job["id"])[-1][1]["state"] == "done"
        yield server
    assert "Traceback" not in server.log.read_text()
    assert not verify(folder / "g").findings


def get(server: Server, address: str = "/doubts", **headers: str) -> httpx.Response:
    return server.client.get(address, headers={**HTML, **headers})


def counted(text: str) -> list[int]:
    """How many doubts are to decide, dismissed and confirmed."""
    return [int(number) for number in re.findall(r"(?:decide|Dismissed|Confirmed) <b>(\d+)</b>", text)]


def test_a_doubt_has_its_faces_side_by_side_and_says_what_yes_does(doubted: Server) -> None:
    doubt = planted(doubted, "anothers-photo", "P03", HOSTILE)
    page = get(doubted, f"/doubts?doubt={doubt['id']}").text
    text = words(page)
    assert HOSTILE not in text
    assert f"Is the first photo of {ESCAPED}, not of P03?" in text
    assert f"Yes gives the photo to {ESCAPED}. That can be undone." in text
    assert f"{doubt['measured']['own']:.3f} apart" in text
    assert f"{doubt['measured']['other']:.3f} apart" in text
    for group in doubt["groups"]:
        assert f'href="/faces/{group["faces"][0]["face_id"]}"' in text
    part = get(doubted, f"/doubts?doubt={doubt['id']}", **{"hx-request": "true"}).text
    assert "<html" not in part
    assert part in page
    assert get(doubted, "/doubts?doubt=hub.f4711.p1").status_code == 404
    assert get(doubted, "/doubts/closed").status_code == 400


def test_every_doubt_comes_once_when_each_is_skipped_and_the_first_one_follows_the_last(
    doubted: Server,
) -> None:
    expected = [one["id"] for one in page(doubted, limit=500, state="open")["doubts"]]
    found, address = [], "/doubts"
    for _ in range(len(expected) + 1):
        text = get(doubted, address).text
        found += re.findall(r'action="/doubts/([^/"]+)/confirm"', text)
        [address] = re.findall(r'href="(/doubts\?after=[^"]+)"', text)
    assert found == [*expected, expected[0]]


def test_an_answer_is_said_and_undone_and_the_next_doubt_is_shown_at_once(doubted: Server) -> None:
    first, second = (one["id"] for one in page(doubted, limit=2)["doubts"])
    before = counted(get(doubted).text)
    answered = send(doubted.client, f"/doubts/{first}/dismiss")
    assert (answered.status_code, answered.headers["location"]) == (303, f"/doubts?answered={first}")
    text = get(doubted, answered.headers["location"]).text
    assert "<p>Dismissed.</p>" in text
    assert f'action="/doubts/{second}/confirm"' in text
    assert counted(text) == [before[0] - 1, before[1] + 1, before[2]]
    undone = send(doubted.client, f"/doubts/{first}/reopen")
    text = get(doubted, undone.headers["location"]).text
    assert "The answer was taken back." in text
    assert f'action="/doubts/{first}/confirm"' in text
    assert counted(text) == before


def test_a_confirmation_merges_two_people_and_the_list_of_confirmed_ones_undoes_it(doubted: Server) -> None:
    doubt = planted(doubted, "two-like-one", "P05", "Double")
    page = get(doubted, f"/doubts?doubt={doubt['id']}").text
    assert "Yes merges Double into P05. That can be undone." in words(page)
    done = send(doubted.client, f"/doubts/{doubt['id']}/confirm", after="")
    assert "Confirmed: Double was merged into P05." in words(get(doubted, done.headers["location"]).text)
    again = send(doubted.client, f"/doubts/{doubt['id']}/confirm")
    assert (again.status_code, "is confirmed already" in again.text) == (400, True)
    assert "Double was merged into P05." in words(get(doubted, "/doubts/confirmed").text)
    undone = send(doubted.client, f"/doubts/{doubt['id']}/reopen", back="confirmed")
    assert undone.headers["location"] == f"/doubts/confirmed?answered={doubt['id']}"
    text = get(doubted, undone.headers["location"]).text
    assert "The answer was taken back." in text
    assert "No doubt was confirmed." in text
    assert planted(doubted, "two-like-one", "P05", "Double") == doubt


def test_a_confirmation_gives_a_photo_to_another_person(doubted: Server) -> None:
    doubt = planted(doubted, "anothers-photo", "P03", HOSTILE)
    done = send(doubted.client, f"/doubts/{doubt['id']}/confirm")
    assert f"the photo was given to {ESCAPED}." in words(get(doubted, done.headers["location"]).text)
    [face] = doubt["act"]["faces"]
    assert doubted.client.get(f"/v1/faces/{face}").json()["identity"] == HOSTILE
    assert HOSTILE not in get(doubted, "/doubts/confirmed").text
    send(doubted.client, f"/doubts/{doubt['id']}/reopen")
    assert doubted.client.get(f"/v1/faces/{face}").json()["identity"] == "P03"


def test_a_doubt_that_was_dismissed_without_an_audit_is_dropped_when_it_is_reopened(doubted: Server) -> None:
    doubted.client.post("/v1/doubts/two-like-one.p1.p2/dismiss")
    assert "Two people who look like one" in get(doubted, "/doubts/dismissed").text
    undone = send(doubted.client, "/doubts/two-like-one.p1.p2/reopen")
    assert undone.headers["location"] == "/doubts"
    assert "No doubt was dismissed." in get(doubted, "/doubts/dismissed").text


def test_who_may_only_read_sees_doubts_and_decides_nothing(
    bundle: ModelBundle, empty_gallery: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(empty_gallery, tmp_path / "g"))
    secrets = {scope: tokens.create(folder, scope, scope)[0] for scope in (Scope.READ, Scope.WRITE)}
    reader = {**HTML, **bearer(secrets[Scope.READ])}
    with Server(folder, tmp_path / "log", "--workers", 2) as server:
        assert "The gallery is empty." in server.client.get("/doubts", headers=reader).text
        with Gallery.open(folder) as gallery:
            drawn = Drawn()
            drawn.add("Double", drawn.near("P05", 4))
            drawn.into(gallery)
        assert "A token with the scope" in server.client.get("/doubts", headers=reader).text
        server.client.headers.update(bearer(secrets[Scope.WRITE]))
        audit(server)
        text = server.client.get("/doubts", headers=reader).text
        assert 'id="question"' in text
        assert not re.findall('<form(?! class="out")', text)
        assert ">Skip " in text
        assert server.client.post("/doubts/audit", headers=reader).status_code == 403
