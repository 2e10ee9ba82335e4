"""A face detector is opened by its path or downloaded by its name."""

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from retrieval.errors import InputError, RunError
from retrieval.models.detectors import YUNET_SHA256, open_detector


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder."""

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder and its address, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/detector.onnx"
        server.shutdown()
        thread.join()


def test_a_file_is_opened_and_yunet_is_the_same_file_downloaded(
    shared: Path, served: tuple[Path, str]
) -> None:
    path = shared / "weights" / "yunet_s_640_640.onnx"
    folder, url = served
    (folder / "detector.onnx").write_bytes(path.read_bytes())
    opened = open_detector(path)
    assert opened.sha256 == YUNET_SHA256
    assert open_detector("yunet", url=url).graph == opened.graph
    (folder / "detector.onnx").unlink()
    assert open_detector("yunet", url=url).graph == opened.graph


@pytest.mark.parametrize(
    ("served_bytes", "reason"),
    [(b"<html>", "what arrived is another file"), (None, "HTTP status 404")],
)
def test_without_the_download_a_sentence_says_what_to_do(
    served_bytes: bytes | None, reason: str, served: tuple[Path, str]
) -> None:
    folder, url = served
    if served_bytes is not None:
        (folder / "detector.onnx").write_bytes(served_bytes)
    with pytest.raises(RunError) as caught:
        open_detector("yunet", url=url)
    assert str(caught.value) == (
        f"The face detector YuNet cannot be downloaded ({reason}); get {url} in another way and give its "
        "path as `detector`."
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "The face detector {} cannot be read (no such file or directory); give `detector='yunet'`"),
        (b"no network", "{} is not run as a face detector: it is not an ONNX file"),
    ],
)
def test_a_file_that_is_no_detector_is_refused(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "detector.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_detector(path)
    assert str(caught.value).startswith(said.format(path))
