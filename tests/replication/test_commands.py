"""The commands publish, follow and published; and a follower that answers over HTTP."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from retrieval.gallery.gallery import Gallery
from tests.cli.test_app import Faceprint
from tests.cli.test_app import faceprint as faceprint_here
from tests.operations import GONE, add, contents, face, tiny_model, vector_of
from tests.service.server import Server

__all__ = ["faceprint_here"]  # pytest finds the fixture by its name


class Done(NamedTuple):
    """The exit status of a command, and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def faceprint(faceprint_here: Faceprint) -> Callable[..., Done]:
    return lambda *arguments: Done(*faceprint_here(*arguments))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a gallery, which is the current folder."""
    with Gallery.create(tmp_path / "my.gallery", tiny_model(tmp_path / "model")) as gallery:
        add(gallery, range(9))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_gallery_is_published_followed_and_forgets(root: Path, faceprint: Callable[..., Done]) -> None:
    done = faceprint("publish", "my.gallery", "store")
    assert done.status == 0, done.err
    assert f"state 1 of {root / 'store'}: 9 faces, revision 2; 6 objects written" in done.out
    done = faceprint("follow", "store", "copy", "--once", "--name", "edge-1")
    assert (done.status, "copy has state 1: 9 faces" in done.out) == (0, True), done.err
    shown = json.loads(faceprint("info", "copy", "--json").out)["follows"]
    assert (shown["address"], shown["number"], shown["max_age"]) == (str(root / "store"), 1, None)
    assert f"{root / 'store'}, state 1, by" in faceprint("info", "copy").out
    assert json.loads(faceprint("info", "my.gallery", "--json").out)["follows"] is None
    assert faceprint("verify", "copy").status == 0
    refused = faceprint("forget", "copy", "--identity", GONE)
    assert (refused.status, "is a read-only copy of" in refused.err) == (2, True)
    assert faceprint("forget", "my.gallery", "--identity", GONE).status == 0
    done = faceprint("publish", "my.gallery", "store", "--json")
    said = json.loads(done.out)
    assert (said["number"], said["faces"], said["followers"]) == (2, 6, 1)
    assert [one["waiting"] for one in said["waiting"]] == [["edge-1"]]
    assert "not yet by edge-1" in faceprint("publish", "my.gallery", "store").out
    assert json.loads(faceprint("follow", "store", "copy", "--once", "--json").out)["number"] == 3
    done = faceprint("published", "store")
    assert "confirmed by edge-1" in done.out
    assert "edge-1: current" in done.out
    said = json.loads(faceprint("published", "store", "--json").out)
    assert said["erasures"][0]["waiting"] == []
    assert (
        json.loads(faceprint("published", "store", "--remove-follower", "edge-1", "--json").out)["followers"]
        == []
    )
    assert contents(root / "copy") == contents(root / "my.gallery")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("publish", "my.gallery", "store", "--every", "soon"), "--every is 'soon'; give a time such as 30s"),
        (("publish", "my.gallery", "my.gallery/store"), "is in the gallery itself"),
        (("publish", "my.gallery", "sftq://host/store"), "There is no way to read sftq://"),
        (("follow", "store", "copy"), "No gallery is published at"),
        (("follow", "store", "copy", "--max-age", "0s"), "--max-age is '0s'"),
        (("follow", "store", "copy", "--name", "../x"), "--name is '../x'; use up to 100 letters"),
        (("follow", "store", "copy", "--port", 8001), "--port is of use only with --serve"),
        (("follow", "store", "copy", "--once", "--serve"), "--once is of no use with --serve"),
        (("published", "store"), "No gallery is published at"),
    ],
)
def test_what_cannot_be_is_refused_by_a_sentence(
    arguments: tuple[object, ...], sentence: str, root: Path, faceprint: Faceprint
) -> None:
    done = faceprint(*arguments)
    assert (done.status, done.out) == (2, "")
    assert sentence in done.err
    assert sorted(path.name for path in root.iterdir()) == ["model", "my.gallery"]


def test_commands_that_go_on_follow_each_change_and_end_at_a_signal(root: Path) -> None:
    """The store is away for a while: both say so, and go on when it is back."""
    publisher = running("publish", "my.gallery", "store", "--every", "0.1s")
    wait(lambda: (root / "store" / "heads").is_dir() and any((root / "store" / "heads").iterdir()))
    follower = running("follow", "store", "copy", "--every", "0.1s")
    try:
        wait(lambda: (root / "copy" / "gallery.db").exists())
        with Gallery.open(root / "my.gallery") as gallery:
            add(gallery, range(20, 22))
        wait(lambda: len(contents(root / "copy")) == 11)
        (root / "store").rename(root / "away")
        (root / "store").write_text("no folder")
        for process in (publisher, follower):
            assert process.stderr is not None
            assert "Trying again." in process.stderr.readline()
        (root / "store").unlink()
        (root / "away").rename(root / "store")
        with Gallery.open(root / "my.gallery") as gallery:
            add(gallery, range(22, 23))
        wait(lambda: len(contents(root / "copy")) == 12)
    finally:
        for process in (publisher, follower):
            process.send_signal(signal.SIGTERM)
    for process in (publisher, follower):
        out, err = process.communicate(timeout=120)
        assert (process.returncode, "Traceback" in err) == (0, False), err
        # Which number a state has depends on how often it was confirmed before it was fetched.
        faces = re.findall(r"(\d+) faces, ", " ".join(out.split()))
        assert (faces[0], faces[-1]) == ("9", "12")


def test_a_follower_answers_over_http_says_its_age_and_refuses_changes(root: Path) -> None:
    program = [sys.executable, "-m", "retrieval.cli.app"]
    subprocess.run([*program, "publish", "my.gallery", "store"], check=True)
    command = ("follow", "store", "copy", "--serve", "--port", 0, "--every", "0.1s", "--max-age", "1h")
    query = {"vector": vector_of(face(20).sha256).tolist(), "k": 1}
    with Server(root / "copy", root / "log", command=command) as server:

        def distance() -> float:
            [answer] = server.client.post("/v1/search", json=query).json()["answers"]
            return float(answer["matches"][0]["distance"])

        assert distance() > 0
        ready = server.client.get("/readyz").json()
        assert ready["status"] == "ok"
        assert 0 <= ready["age_seconds"] < 3600
        assert "faceprint_gallery_age_seconds" in server.client.get("/metrics").text
        follows = server.client.get("/v1/info").json()["gallery"]["follows"]
        assert (follows["number"], follows["max_age"]) == (1, 3600)
        [person] = server.client.get("/v1/people", params={"name": "Kim"}).json()["people"]
        refused = server.client.post(f"/v1/people/{person['id']}/rename", json={"identity": "Joe"})
        assert refused.status_code == 400, refused.text
        assert "is a read-only copy of" in refused.json()["error"]["message"]
        with Gallery.open(root / "my.gallery") as gallery:
            add(gallery, range(20, 21))
        subprocess.run([*program, "publish", "my.gallery", "store"], check=True)
        wait(lambda: distance() == 0)
        card = root / "copy" / "follower.json"
        (root / "store" / "heads").rename(root / "away")
        said = json.loads(card.read_text())
        part = root / "card"
        part.write_text(json.dumps({**said, "current_at": "2026-01-01T00:00:00+00:00"}))
        part.rename(card)
        for answer in (server.client.get("/readyz"), server.client.post("/v1/search", json=query)):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out-of-date")
        assert server.client.get("/healthz").status_code == 200
        (root / "away").rename(root / "store" / "heads")
        subprocess.run([*program, "publish", "my.gallery", "store"], check=True)
        wait(lambda: server.client.get("/readyz").status_code == 200)
        assert distance() == 0
        assert server.stop() == 0
    log = (root / "log").read_text()
    assert "Traceback" not in log, log


def running(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "retrieval.cli.app", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait(until: object) -> None:
    """Waits for an event; the limit is for what hangs."""
    assert callable(until)
    deadline = time.monotonic() + 120
    while not until():
        assert time.monotonic() < deadline, "it did not happen within 120 s"
        time.sleep(0.05)
