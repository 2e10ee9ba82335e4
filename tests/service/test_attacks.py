"""What callers may send to harm the service: bodies that cost more than their bytes, and unclear framing."""

import socket
from typing import Any

import pytest

from tests.service.server import Server
from tests.service.test_gate import refused

_VALUES = b"[" + b"0," * 2**18 + b"0]"
_MIB = 2**20


@pytest.mark.parametrize(
    ("method", "path", "kind"),
    [
        ("PUT", "/v1/people/1/metadata", "application/json"),
        ("POST", "/v1/people/1/rename", "application/json"),
        ("POST", "/v1/jobs", "application/json"),
        ("POST", "/people/1/rename", "application/x-www-form-urlencoded"),
    ],
)
def test_a_body_that_is_no_photo_is_small(method: str, path: str, kind: str, served: Server) -> None:
    answer = served.client.request(method, path, content=b" " * (_MIB + 1), headers={"content-type": kind})
    assert "1,048,576 bytes" in refused(answer, 413, "body-too-large")


@pytest.mark.parametrize("path", ["/v1/search", "/v1/faces", "/search", "/enroll/photos"])
def test_a_body_that_may_be_a_photo_is_not(path: str, served: Server) -> None:
    """Where photos are taken, larger bodies are read."""
    answer = served.client.post(path, content=b"x" * (_MIB + 1), headers={"content-type": "text/plain"})
    assert answer.status_code in (403, 415)


def test_json_with_very_many_values_is_refused_before_it_is_parsed(served: Server) -> None:
    body = b'{"vector":' + _VALUES + b"}"
    answer = served.client.post("/v1/search", content=body, headers={"content-type": "application/json"})
    assert "131,072 values" in refused(answer, 413, "body-too-large")
    lines = served.client.post(
        "/v1/search/bulk", content=body + b"\n", headers={"content-type": "application/x-ndjson"}
    )
    assert lines.json()["error"]["code"] == "body-too-large"


def test_json_with_many_unknown_fields_is_one_short_sentence(served: Server) -> None:
    body: dict[str, Any] = {f"field {number}": 0 for number in range(1000)}
    message = refused(served.client.post("/v1/search", json=body), 400, "invalid-argument")
    assert message == "The body has 1,000 fields, and 64 is the limit."


def test_an_error_does_not_repeat_megabytes_of_a_request(served: Server) -> None:
    for body in ({"face": 1, "where": ["a" * _MIB]}, {"face": 1, "a" * _MIB: 1}):
        message = refused(served.client.post("/v1/search", json=body), 400, "invalid-argument")
        assert 2000 < len(message) < 2010


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/search HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"POST /v1/search HTTP/1.0\r\nTransfer-Encoding: chunked\r\n",
    ],
    ids=["length and chunks", "chunks in HTTP/1.0"],
)
def test_a_request_with_two_possible_ends_is_refused_and_the_connection_closed(
    head: bytes, served: Server
) -> None:
    """A proxy may see the second request as a part of the first one, or the other way round."""
    host = b"Host: localhost\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        connection.sendall(head + host + b"0\r\n\r\nGET /v1/info HTTP/1.1\r\n" + host)
        received = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert received.startswith(b"HTTP/1.1 400 ")
    assert received.count(b"HTTP/1.1 ") == 1
