"""What callers may send to harm the service: bodies that cost more than their bytes."""

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
