"""Files at addresses, by fsspec's memory and a server on this machine."""

import pickle
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import fsspec
import pytest

from retrieval.errors import DataError, MissingDependency, Reason, UnreadableImage
from retrieval.sources import remote
from retrieval.sources.remote import Fetching, NotFetched
from retrieval.system.paths import host_of

CONTENT = bytes(range(256)) * 300


class _Server(BaseHTTPRequestHandler):
    """/N answers with status N; /stream without saying how long it is; anything else with the content.

    /to/URL redirects to URL. What was asked for stands in `asked`.
    """

    asked: ClassVar[list[str]] = []

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name = self.path.strip("/")
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
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


@pytest.fixture
def other(server: str) -> Iterator[tuple[str, list[str]]]:
    """Another server than the first, and what it is asked for."""

    class Other(_Server):
        asked: ClassVar[list[str]] = []

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}", Other.asked
        listening.shutdown()
        thread.join()


def refusal_of(fetching: Fetching, url: str) -> UnreadableImage:
    with pytest.raises(UnreadableImage) as caught:
        fetching.read(url, max_bytes=10**6)
    assert caught.value.reason is Reason.UNREACHABLE
    return caught.value


def from_hosts(*urls: str) -> Fetching:
    return Fetching(True, frozenset(str(host_of(url)) for url in urls))


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
    remote.check_address("memory://x")
    with pytest.raises(DataError, match="no way to read gopherx://"):
        remote.check_address("gopherx://host/1.jpg")
    with pytest.raises(MissingDependency, match=r"^s3:// cannot be read yet: .*s3fs"):
        remote.check_address("s3://bucket/1.jpg")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingDependency, match=r"install it with pip install 'faceprint\[remote\]'"):
        remote.check_address("https://host/1.jpg")


def test_a_stored_address_is_fetched_when_that_is_allowed_and_its_host_is_known(server: str) -> None:
    assert from_hosts(server).read(f"{server}/a.jpg", max_bytes=10**6) == CONTENT
    assert from_hosts(server).read(f"{server}/stream", max_bytes=10**6) == CONTENT


def test_a_stored_address_is_not_fetched_unless_that_is_allowed(other: tuple[str, list[str]]) -> None:
    url, asked = other
    hosts = frozenset({str(host_of(url))})
    refused = refusal_of(Fetching(hosts=hosts), f"{url}/a.jpg")
    assert isinstance(refused, NotFetched)
    assert "`fetch=True`" in refused.detail
    assert asked == []
    assert pickle.loads(pickle.dumps(refused)).detail == refused.detail


def test_a_stored_address_is_not_fetched_from_a_host_that_is_not_known(other: tuple[str, list[str]]) -> None:
    url, asked = other
    refused = refusal_of(from_hosts("http://127.0.0.1:1/"), f"{url}/a.jpg")
    assert not isinstance(refused, NotFetched)
    assert str(host_of(url)) in refused.detail
    assert asked == []


def test_a_redirect_of_a_stored_address_is_followed_to_a_known_host_only(
    server: str, other: tuple[str, list[str]]
) -> None:
    url, asked = other
    redirecting = f"{server}/to/{url}/a.jpg"
    assert remote.read(redirecting, max_bytes=10**6) == CONTENT, "an address that is named by the user"
    asked.clear()
    assert from_hosts(server, url).read(redirecting, max_bytes=10**6) == CONTENT
    assert asked
    asked.clear()
    assert str(host_of(url)) in refusal_of(from_hosts(server), redirecting).detail
    assert asked == []


def test_a_redirect_of_a_stored_address_ends_at_servers_and_after_a_few(server: str) -> None:
    fetching = from_hosts(server, "memory://Ann/1.jpg")
    fsspec.filesystem("memory").pipe("/Ann/1.jpg", CONTENT)
    refusal_of(fetching, f"{server}/to/memory://Ann/1.jpg")
    six = f"{server}/to/" * 6 + f"{server}/a.jpg"
    refusal_of(fetching, six)
    assert fetching.read(f"{server}/to/" * 5 + f"{server}/a.jpg", max_bytes=10**6) == CONTENT


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://Example.ORG/a.jpg", "http://example.org:80"),
        ("https://example.org/a.jpg", "https://example.org:443"),
        ("HTTPS://name:secret@example.org:8443?a", "https://example.org:8443"),
        ("http://example.org#@other.org/a.jpg", "http://example.org:80"),
        ("http://[2001:db8:1:2:3:4:5:6]/a.jpg", "http://[2001:db8:1:2:3:4:5:6]:80"),
        ("s3://Bucket/a/b.jpg", "s3://Bucket"),
        ("http://example.org\\@other.org/a.jpg", None),
        ("http://example.org\t.other.org/a.jpg", None),
        ("http://example.org:port/a.jpg", None),
        ("http://:80/a.jpg", None),
        ("zip://a.jpg::https://example.org/b.zip", None),
        ("https://example.org/::http://other.org/a.jpg", None),
        ("/photos/a.jpg", None),
    ],
)
def test_a_host_has_one_spelling_and_what_is_ambiguous_has_none(url: str, host: str | None) -> None:
    assert host_of(url) == host
