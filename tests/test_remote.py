"""Files at addresses, by fsspec's memory and a server on this machine."""

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pytest

from retrieval import remote
from retrieval.errors import DataError, MissingDependency, Reason, UnreadableImage

CONTENT = bytes(range(256)) * 300


class _Server(BaseHTTPRequestHandler):
    """/N answers with status N; /stream without saying how long it is; anything else with the content."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.strip("/")
        if name.isdigit():
            self.send_error(int(name))
            return
        body = b"" if name == "empty" else CONTENT
        self.send_response(200)
        if name == "stream":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def reason_of(url: str, max_bytes: int = 10**6) -> Reason:
    with pytest.raises(UnreadableImage) as caught:
        remote.read(url, max_bytes=max_bytes)
    assert "\n" not in caught.value.detail
    return caught.value.reason


def test_bytes_come_from_a_server_whether_or_not_it_says_how_many(server: str) -> None:
    assert remote.read(f"{server}/a.jpg", max_bytes=len(CONTENT)) == CONTENT
    assert remote.read(f"{server}/stream", max_bytes=len(CONTENT)) == CONTENT


def test_no_more_is_read_than_is_allowed(server: str) -> None:
    assert reason_of(f"{server}/a.jpg", len(CONTENT) - 1) is Reason.TOO_MANY_BYTES
    assert reason_of(f"{server}/stream", len(CONTENT) - 1) is Reason.TOO_MANY_BYTES


def test_what_a_server_refuses_has_a_reason(server: str) -> None:
    assert reason_of(f"{server}/404") is Reason.MISSING
    assert reason_of(f"{server}/410") is Reason.MISSING
    assert reason_of(f"{server}/403") is Reason.NO_PERMISSION
    assert reason_of(f"{server}/500") is Reason.UNREACHABLE
    assert reason_of(f"{server}/empty") is Reason.EMPTY_FILE


def test_a_server_that_does_not_answer_may_do_so_another_time() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as listening:
        port = listening.server_port
    reason = reason_of(f"http://127.0.0.1:{port}/a.jpg")
    assert reason is Reason.UNREACHABLE
    assert reason.may_pass_when_retried


def test_whatever_fsspec_knows_is_read() -> None:
    fsspec.filesystem("memory").pipe("/Ann/1.jpg", CONTENT)
    assert remote.read("memory://Ann/1.jpg", max_bytes=10**6) == CONTENT
    assert reason_of("memory://Ann/2.jpg") is Reason.MISSING


def test_an_address_that_nobody_can_read_is_said_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    remote.check("memory://x")
    with pytest.raises(DataError, match="no way to read gopherx://"):
        remote.check("gopherx://host/1.jpg")
    with pytest.raises(MissingDependency, match=r"^s3:// cannot be read yet: .*s3fs"):
        remote.check("s3://bucket/1.jpg")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingDependency, match=r"install it with pip install 'faceprint\[remote\]'"):
        remote.check("https://host/1.jpg")
