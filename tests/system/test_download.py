"""Downloads give the file of a SHA-256 or nothing, and need the network once."""

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from retrieval.system import download

CONTENT = b"a detector" * 5000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT, also behind a redirection, and what goes wrong."""

    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/file")
            self.end_headers()
            return
        if self.path == "/absent":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if self.path == "/file":
            self.wfile.write(CONTENT)
        elif self.path == "/other":
            self.wfile.write(bytes(len(CONTENT)))
        elif self.path == "/short":
            self.wfile.write(CONTENT[:-1])
        else:  # a server that sends a byte now and then
            with suppress(ConnectionError):  # the client does not wait for the end
                for _ in range(40):
                    self.wfile.write(b"a")
                    time.sleep(0.01)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a real server on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the file is kept, in a cache folder that is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "faceprint" / "downloads" / SHA256


def fetch(url: str, *, most: int = 10**6, seconds: float = 10.0) -> bytes:
    return download.fetch(url, sha256=SHA256, most=most, seconds=seconds)


def failure(url: str, **limits: float) -> str:
    with pytest.raises(download.Failed) as caught:
        download.fetch(url, **{"sha256": SHA256, "most": 10**6, "seconds": 10.0, **limits})  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("path", ["file", "moved"])
def test_a_file_is_downloaded_once_and_then_read_without_a_network(
    path: str, server: str, kept: Path
) -> None:
    assert fetch(f"{server}/{path}") == CONTENT
    assert kept.read_bytes() == CONTENT
    assert [one.name for one in kept.parent.iterdir()] == [SHA256]
    assert fetch("http://127.0.0.1:1/nobody-listens") == CONTENT


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("other", "what arrived is another file"),
        ("short", "what arrived is another file"),
        ("absent", "HTTP status 404"),
    ],
)
def test_another_file_is_neither_returned_nor_kept(path: str, why: str, server: str, kept: Path) -> None:
    assert failure(f"{server}/{path}") == why
    assert not kept.parent.exists()


def test_a_file_above_the_limit_is_not_read_to_its_end(server: str, kept: Path) -> None:
    assert failure(f"{server}/file", most=1000) == "what arrived is another file"
    assert not kept.parent.exists()


def test_a_server_that_trickles_is_left_after_twice_the_wait(server: str, kept: Path) -> None:
    assert failure(f"{server}/slow", seconds=0.05) == "it took longer than 0.1 seconds"


def test_where_nobody_answers_the_operating_systems_words_are_the_reason(kept: Path) -> None:
    assert failure("http://127.0.0.1:1/") == "connection refused"


def test_a_damaged_copy_is_replaced(server: str, kept: Path) -> None:
    kept.parent.mkdir(parents=True)
    kept.write_bytes(CONTENT[:-1])
    assert fetch(f"{server}/file") == CONTENT
    assert kept.read_bytes() == CONTENT


def test_a_cache_that_cannot_be_written_is_no_error(server: str, kept: Path) -> None:
    kept.parent.parent.parent.mkdir()
    kept.parent.parent.write_bytes(b"a file where the folder would be")
    assert fetch(f"{server}/file") == CONTENT
