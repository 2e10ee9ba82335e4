"""Doubts over HTTP: a job audits, and each doubt is shown, dismissed, confirmed and reopened."""

from collections.abc import Iterator
from typing import Any

import pytest

from retrieval import Gallery, ModelBundle
from retrieval.service.schemas import DoubtShown, DoubtsPage, JobDetails
from tests.quality.test_audit import Drawn
from tests.service.server import Server
from tests.service.test_gate import refused
from tests.service.test_jobs import events


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two workers"])
def doubted(
    request: pytest.FixtureRequest, bundle: ModelBundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server whose gallery was audited: a photo of P17 is among those of P03, and P05 is Double too."""
    folder = tmp_path_factory.mktemp("doubted")
    drawn = Drawn()
    drawn.add("P03", drawn.near("P17", 1))
    drawn.add("Double", drawn.near("P05", 4))
    with Gallery.create(folder / "g", bundle) as gallery:
        drawn.into(gallery)
    with Server(folder / "g", folder / "log", "--workers", request.param) as server:
        before = page(server)
        assert (before["doubts"], before["audited_at"]) == ([], None)
        audit(server)
        yield server
    assert "Traceback" not in server.log.read_text()
    with Gallery.open(folder / "g") as gallery:
        assert gallery.verify().whole


def audit(server: Server) -> None:
    response = server.client.post("/v1/jobs", json={"kind": "audit"})
    assert response.status_code == 202, response.text
    JobDetails.model_validate(response.json())
    last = events(server, response.json()["id"])[-1]
    assert (last[0], last[1]["kind"], last[1]["state"]) == ("end", "audit", "done")
    assert last[1]["done"] == last[1]["total"] > 0


def page(server: Server, **options: Any) -> dict[str, Any]:
    response = server.client.get("/v1/doubts", params=options)
    DoubtsPage.model_validate(response.json())
    shown: dict[str, Any] = response.json()
    return shown


def planted(server: Server, kind: str, *names: str) -> dict[str, Any]:
    [found] = [
        one
        for one in page(server, limit=500)["doubts"]
        if one["kind"] == kind and {person["identity"] for person in one["people"]} == set(names)
    ]
    return found


def decide(server: Server, doubt: dict[str, Any], what: str) -> dict[str, Any]:
    response = server.client.post(f"/v1/doubts/{doubt['id']}/{what}")
    assert response.status_code == 200, response.text
    DoubtShown.model_validate(response.json())
    decided: dict[str, Any] = response.json()
    return decided


def test_a_doubt_has_what_it_takes_to_show_its_faces_side_by_side(doubted: Server) -> None:
    wrong = planted(doubted, "anothers-photo", "P03", "P17")
    [person, other] = wrong["people"]
    [[face], own, theirs] = [group["faces"] for group in wrong["groups"]]
    names = [group["name"] for group in wrong["groups"]]
    assert names == ["doubted", "nearest of P03", "nearest of P17"]
    assert face == {"face_id": 241, "person": person["id"], "identity": "P03"}
    assert {one["person"] for one in own} == {person["id"]}
    assert {one["person"] for one in theirs} == {other["id"]}
    assert wrong["act"] == {"does": "assign", "into": other["id"], "faces": [241], "person": None}
    assert wrong["distance"] == wrong["measured"]["other"] < wrong["measured"]["own"]
    assert wrong["says"].startswith("Face 241 of P03 is ")
    assert doubted.client.get(f"/v1/doubts/{wrong['id']}").json() == wrong


def test_pages_have_every_doubt_once_and_open_ones_first(doubted: Server) -> None:
    everything = page(doubted, limit=500)["doubts"]
    dismissed = decide(doubted, everything[0], "dismiss")
    assert (dismissed["state"], dismissed["decided_at"] is None) == ("dismissed", False)
    found: list[dict[str, Any]] = []
    cursor: dict[str, Any] = {}
    while True:
        shown = page(doubted, limit=1, **cursor)
        found += shown["doubts"]
        if shown["next"] is None:
            break
        cursor = {"cursor": shown["next"]}
    assert found == [*everything[1:], dismissed]
    assert page(doubted, state="dismissed")["doubts"] == [dismissed]
    audit(doubted)
    assert [one["id"] for one in page(doubted, state="dismissed")["doubts"]] == [dismissed["id"]]
    assert decide(doubted, dismissed, "reopen")["state"] == "open"
    assert page(doubted, limit=500)["doubts"] == everything


def test_a_confirmed_doubt_is_done_and_undone(doubted: Server) -> None:
    wrong, double = (
        planted(doubted, "anothers-photo", "P03", "P17"),
        planted(doubted, "two-like-one", "P05", "Double"),
    )
    assert decide(doubted, wrong, "confirm")["state"] == "confirmed"
    assert doubted.client.get("/v1/faces/241").json()["identity"] == "P17"
    assert decide(doubted, double, "confirm")["state"] == "confirmed"
    [merge] = doubted.client.get("/v1/merges").json()["merges"]
    assert (merge["person"], merge["into"]) == (double["act"]["person"], double["act"]["into"])
    assert "is confirmed already" in refused(
        doubted.client.post(f"/v1/doubts/{wrong['id']}/confirm"), 400, "invalid-argument"
    )
    for doubt in (wrong, double):
        assert decide(doubted, doubt, "reopen")["state"] == "open"
    assert doubted.client.get("/v1/merges").json()["merges"] == []
    assert planted(doubted, "anothers-photo", "P03", "P17") == wrong
    assert planted(doubted, "two-like-one", "P05", "Double") == double


def test_what_is_no_doubt_no_job_and_no_page_is_refused(doubted: Server) -> None:
    client = doubted.client
    refused(client.get("/v1/doubts/hub.f4711.p1"), 404, "not-found")
    refused(client.post("/v1/doubts/hub.f4711.p1/confirm"), 404, "not-found")
    refused(client.post("/v1/doubts/hub/dismiss"), 400, "invalid-argument")
    refused(client.get("/v1/doubts", params={"state": "closed"}), 400, "invalid-argument")
    refused(client.get("/v1/doubts", params={"cursor": "x"}), 400, "invalid-argument")
    for body in (
        {"kind": "evaluate"},
        {"kind": "audit", "limit": 0},
        {"kind": "audit", "sources": ["."]},
        [1],
    ):
        refused(client.post("/v1/jobs", json=body), 400, "invalid-argument")
