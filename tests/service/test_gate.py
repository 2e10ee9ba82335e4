"""What requests pass before they are answered: limits, origins, errors in one form, and the stop."""

import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from retrieval.service.schemas import ErrorBody
from tests.service.server import Server

_JPEG = {"content-type": "image/jpeg"}


def refused(response: httpx.Response, status: int, code: str) -> str:
    """Checks the one form of errors, and returns the message."""
    assert response.status_code == status, response.text
    error = ErrorBody.model_validate(response.json()).error
    assert error.code == code
    assert error.request_id == response.headers["x-request-id"]
    assert error.message.endswith(".")
    return error.message


BAD: list[tuple[dict[str, Any], int, str, str]] = [
    ({"json": {}}, 400, "invalid-argument", "one of `image`, `face` and `vector`"),
    ({"json": {"face": 1, "vector": [1.0]}}, 400, "invalid-argument", "one of"),
    ({"json": {"face": 1, "k": 0}}, 400, "invalid-argument", "`k`"),
    ({"json": {"face": 1, "k": 1001}}, 400, "invalid-argument", "1,000 is the limit"),
    ({"json": {"face": 1, "colour": 1}}, 400, "invalid-argument", "`colour`"),
    ({"json": {"face": 1}, "params": {"colour": 1}}, 400, "invalid-argument", "`colour`"),
    ({"json": {"face": 1, "k": 2}, "params": {"k": 2}}, 400, "invalid-argument", "give it once"),
    ({"json": {"face": 1, "where": ["?"]}}, 400, "invalid-argument", "is not a condition"),
    (
        {"json": {"face": 1, "identity": ["Adi"], "where": ["identity=Sky"]}},
        400,
        "invalid-argument",
        "people",
    ),
    ({"json": {"face": 1, "identity": ["Ady"]}}, 404, "not-found", "nearest name is Adi"),
    ({"json": {"face": 1, "by_person": True, "within": 1}}, 400, "invalid-argument", "`within`"),
    ({"json": {"face": 1, "fpir": 0.1}}, 400, "invalid-argument", "calibrate"),
    ({"json": {"face": 99}}, 404, "not-found", "no face 99"),
    ({"json": {"vector": [1.0, 2.0]}}, 400, "invalid-argument", "(n, 2048)"),
    ({"json": {"image": "not base64!"}}, 400, "invalid-argument", "base64"),
    ({"json": [1]}, 400, "bad-request", "JSON object"),
    ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "bad-request", "not JSON"),
    ({"content": b"", "headers": _JPEG}, 422, "unreadable-image", "empty"),
    ({"content": b"GIF", "headers": _JPEG}, 422, "unreadable-image", "cannot be read"),
    ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415, "unsupported-media-type", "image/*"),
    ({"files": [("image", b"1"), ("image", b"2")]}, 400, "bad-request", "Too many files"),
    ({"files": {"image": b"1"}, "data": {"k": "many"}}, 400, "invalid-argument", "`k`"),
    ({"files": {"image": b"1"}, "data": {"k": ["1", "2"]}}, 400, "invalid-argument", "twice"),
    ({"files": {"image": b"1"}, "data": {"vector": "1"}}, 400, "invalid-argument", "`vector`"),
    ({"files": {"image": b"1"}, "data": {"where": ["a?"] * 99}}, 400, "bad-request", "Too many fields"),
    ({"files": {"image": b"1"}, "data": {"where": "a" * 70_000}}, 400, "bad-request", "Part exceeded"),
    (
        {"content": b"--x\r\n", "headers": {"content-type": "multipart/form-data"}},
        400,
        "bad-request",
        "boundary",
    ),
]


@pytest.mark.parametrize(("options", "status", "code", "words"), BAD, ids=str)
def test_a_wrong_search_gets_a_status_a_stable_code_and_a_sentence(
    options: dict[str, Any], status: int, code: str, words: str, served: Server
) -> None:
    assert words in refused(served.client.post("/v1/search", **options), status, code)


def test_unknown_addresses_and_methods_have_the_same_form(served: Server) -> None:
    refused(served.client.get("/v2/search"), 404, "not-found")
    refused(served.client.get("/v1/../../etc/passwd"), 404, "not-found")
    assert refused(served.client.get("/v1/search"), 405, "method-not-allowed")


def test_a_request_id_is_kept_if_it_is_harmless(served: Server) -> None:
    kept = served.client.get("/healthz", headers={"x-request-id": "door-1.42"})
    assert kept.headers["x-request-id"] == "door-1.42"
    for harmful in ("a b", "x" * 65, '"><script>'):
        given = served.client.get("/healthz", headers={"x-request-id": harmful})
        assert re.fullmatch(r"[0-9a-f]{32}", given.headers["x-request-id"])


def test_health_info_metrics_and_the_document_answer(served: Server, enrolled: Path) -> None:
    assert served.client.get("/healthz").json() == {"status": "ok"}
    assert served.client.get("/readyz").json() == {"status": "ok"}
    told = served.client.get("/v1/info").json()
    assert (told["gallery"]["faces"], told["gallery"]["folder"]) == (36, str(enrolled))
    assert served.client.get("/openapi.json").json()["info"]["title"] == "faceprint"
    text = served.client.get("/metrics").text
    assert "faceprint_gallery_faces 36.0" in text
    assert 'faceprint_requests_total{method="GET",route="/healthz",status="200"}' in text


def test_every_response_forbids_caches_and_scripts(served: Server) -> None:
    for response in (served.client.get("/healthz"), served.client.get("/nothing")):
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "server" not in response.headers


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://[x"},
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:8000"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
    ids=str,
)
def test_pages_of_other_sites_are_refused(headers: dict[str, str], served: Server) -> None:
    """Also those whose name leads to this machine."""
    refused(served.client.get("/v1/info", headers=headers), 403, "foreign-origin")


def test_this_machine_may_be_called_by_each_of_its_names(served: Server) -> None:
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:80"):
        assert served.client.get("/v1/info", headers={"host": host}).status_code == 200
    same = {"origin": served.url, "sec-fetch-site": "same-origin"}
    assert served.client.get("/v1/info", headers=same).status_code == 200


def test_a_body_above_the_limit_is_refused_with_its_length_or_in_chunks(
    enrolled: Path, tmp_path: Path
) -> None:
    with Server(enrolled, tmp_path / "log", "--max-body", 1) as server:
        large = b"\xff" * (1024 * 1024 + 1)
        stated = server.client.post("/v1/search", content=large, headers=_JPEG)
        assert "1,048,576 bytes" in refused(stated, 413, "body-too-large")
        chunks = (large[start : start + 65_536] for start in range(0, len(large), 65_536))
        refused(server.client.post("/v1/search", content=chunks, headers=_JPEG), 413, "body-too-large")
        refused(server.client.post("/v1/search", files={"image": large}), 413, "body-too-large")
        assert server.client.get("/readyz").status_code == 200


@contextlib.contextmanager
def begun(server: Server, body: bytes) -> Iterator[socket.socket]:
    """A connection that has sent a search, without the last byte of its body."""
    head = f"POST /v1/search?k=1 HTTP/1.1\r\nhost: localhost\r\ncontent-type: image/jpeg\r\ncontent-length: {len(body)}\r\n\r\n"  # fmt: skip  # noqa: E501
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + body[:-1])
        while "faceprint_pending_requests 1.0" not in server.client.get("/metrics").text:
            time.sleep(0.01)
        yield connection


def test_more_requests_than_the_limit_are_told_to_come_again(
    enrolled: Path, faces: Path, tmp_path: Path
) -> None:
    photo = sorted(faces.glob("*/*.jpg"))[0].read_bytes()
    with Server(enrolled, tmp_path / "log", "--max-pending", 1) as server:
        with begun(server, photo) as connection:
            response = server.client.post("/v1/search", json={"face": 1})
            refused(response, 429, "too-many-requests")
            assert int(response.headers["retry-after"]) >= 1
            assert server.client.get("/healthz").status_code == 200
            assert server.client.get("/readyz").status_code == 200
            connection.sendall(photo[-1:])
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")
        assert server.client.post("/v1/search", json={"face": 1}).status_code == 200


def test_bodies_that_nobody_reads_hold_no_place(served: Server) -> None:
    """More bytes than all pending requests may hold, to addresses that take no body."""
    for path in ("/healthz", "/v1/jobs/x/events", "/v1/info", "/nothing"):
        for _ in range(3):
            status = served.client.request("GET", path, content=b"x" * 30_000_000).status_code
            assert status in (200, 404, 413)
    assert served.client.post("/v1/search", json={"face": 1}).status_code == 200


def test_a_client_that_goes_away_gives_its_place_back(enrolled: Path, faces: Path, tmp_path: Path) -> None:
    photo = sorted(faces.glob("*/*.jpg"))[0].read_bytes()
    with Server(enrolled, tmp_path / "log", "--max-pending", 1) as server:
        with begun(server, photo):
            pass
        while server.client.post("/v1/search", json={"face": 1}).status_code != 200:
            time.sleep(0.01)
        assert "faceprint_pending_requests 0.0" in server.client.get("/metrics").text


def accepts_connections(server: Server) -> bool:
    try:
        socket.create_connection(("127.0.0.1", server.port)).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)]
)
def test_a_signal_stops_the_server_after_what_is_in_flight(
    number: signal.Signals, workers: int, enrolled: Path, faces: Path, tmp_path: Path
) -> None:
    photo = sorted(faces.glob("*/*.jpg"))[0].read_bytes()
    with Server(enrolled, tmp_path / "log", "--workers", workers) as server:
        with begun(server, photo) as connection:
            server.process.send_signal(number)
            while accepts_connections(server):
                time.sleep(0.01)
            connection.sendall(photo[-1:])
            answer = b""
            while more := connection.recv(65_536):
                answer += more
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert json.loads(body)["answers"][0]["matches"][0]["distance"] == 0.0
        assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_worker_that_is_killed_is_started_again(enrolled: Path, tmp_path: Path) -> None:
    with Server(enrolled, tmp_path / "log", "--workers", 2) as server:
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        if not children.exists():
            pytest.skip("this system does not list the children of a process")
        before = set(children.read_text().split())
        os.kill(int(min(before)), signal.SIGKILL)
        while min(before) in (now := set(children.read_text().split())) or len(now) < 2:
            time.sleep(0.01)
        for _ in range(8):
            answer = httpx.post(f"{server.url}/v1/search", json={"face": 1}, trust_env=False)
            assert answer.status_code == 200
        log = server.log.read_text()
    assert f"worker {min(before)} ended with -9; starting another" in log
