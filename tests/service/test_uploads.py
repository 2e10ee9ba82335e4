"""Uploads over HTTP: photos and zips that a job enrolls, of which no file stays."""

import hashlib
import io
import signal
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from retrieval import Gallery, ModelBundle
from retrieval.client import Client, connect
from retrieval.service.schemas import JobDetails
from tests.service.pages import words
from tests.service.server import Server
from tests.service.test_gate import refused
from tests.service.test_jobs import drawn

UPLOADS = "/v1/jobs/uploads"


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder for temporary files of the servers of this module."""
    folder = tmp_path_factory.mktemp("temporary")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def taking(
    bundle: ModelBundle, temporary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("taking")
    Gallery.create(folder / "g", bundle).close()
    with Server(folder / "g", folder / "log", "--workers", 2, "--max-body", 1) as server:
        yield server
    assert "Traceback" not in server.log.read_text()
    assert kept(temporary) == []
    with Gallery.open(folder / "g") as gallery:
        assert not gallery.verify().findings


@pytest.fixture
def client(taking: Server) -> Iterator[Client]:
    with connect(taking.url) as connected:
        yield connected


def kept(temporary: Path) -> list[Path]:
    """The folders of uploads."""
    return sorted(temporary.glob("faceprint-uploads-*"))


def zipped(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def sent(files: dict[str, bytes], **fields: Any) -> dict[str, Any]:
    """The arguments of a request with a form."""
    return {"files": [("file", one) for one in files.items()], "data": fields}


def started(server: Server, files: dict[str, bytes], **fields: Any) -> str:
    response = server.client.post(UPLOADS, **sent(files, **fields))
    assert response.status_code == 202, response.text
    JobDetails.model_validate(response.json())
    assert response.json()["kind"] == "upload"
    number: str = response.json()["id"]
    return number


def names_and_paths(server: Server) -> list[tuple[str, str | None]]:
    """The names and paths of all faces, by their ids."""
    faces = server.client.get("/v1/faces", params={"limit": 500}).json()["faces"]
    return [(face["identity"], face["path"]) for face in faces]


def test_photos_are_enrolled_under_a_name_and_leave_no_file(
    taking: Server, client: Client, temporary: Path, tmp_path: Path
) -> None:
    files = {"a.png": drawn(1), "dir/b.png": drawn(2), "cut.jpg": b"\xff\xd8\xff cut", "again.png": drawn(1)}
    done = client.wait_for_job(started(taking, files, identity="Ada"))
    assert done.counts == {"enrolled": 2, "duplicate": 1, "rejected": 1}
    assert [(one["path"], one["reason"]) for one in done.rejected] == [("cut.jpg", "damaged")]
    assert done.report is not None
    assert (done.report["found"], done.report["enrolled"]) == (4, 2)
    assert names_and_paths(taking) == [("Ada", None)] * 2
    assert kept(temporary) == []
    shown = taking.client.get("/enroll").text
    assert "<h3>upload </h3>" in shown
    assert '<span class="file">cut.jpg</span>' in words(shown)
    (tmp_path / "c.png").write_bytes(drawn(3))
    by_client = client.wait_for_job(client.upload([tmp_path / "c.png"]).id)
    assert by_client.counts == {"enrolled": 1}
    assert names_and_paths(taking)[-1] == (None, None)


def test_the_folders_of_a_zip_name_the_people(taking: Server, client: Client, temporary: Path) -> None:
    members = {
        "new people/Bo/x/1.png": drawn(11),
        "new people/Cy/2.png": drawn(12),
        "new people/Cy/cut.jpg": b"\xff\xd8\xff cut",
        "new people/a\nb/3.png": drawn(13),
        "../../up/4.png": drawn(14),
    }
    before = len(names_and_paths(taking))
    done = client.wait_for_job(started(taking, {"new people.zip": zipped(members)}))
    assert done.counts == {"enrolled": 3, "rejected": 2}
    assert {(one["path"], one["reason"]) for one in done.rejected} == {
        ("new people.zip/new people/Cy/cut.jpg", "damaged"),
        ("new people.zip/new people/a\nb/3.png", "bad-identity"),
    }
    assert sorted(names_and_paths(taking)[before:]) == [("Bo", None), ("Cy", None), ("up", None)]
    under = client.wait_for_job(
        started(taking, {"z": zipped({"Q/R/5.png": drawn(15)})}, identity_from="parent")
    )
    named = client.wait_for_job(started(taking, {"z": zipped({"Q/R/6.png": drawn(16)})}, identity="Di"))
    assert under.counts == named.counts == {"enrolled": 1}
    assert names_and_paths(taking)[-2:] == [("R", None), ("Di", None)]
    broken = client.wait_for_job(started(taking, {"broken.zip": b"PK\x03\x04 no"}))
    assert [(one["path"], one["reason"]) for one in broken.rejected] == [("broken.zip", "damaged")]
    assert kept(temporary) == []


def test_what_cannot_be_one_upload_is_refused_before_it_is_a_job(taking: Server, temporary: Path) -> None:
    archive, photo = zipped({"Bo/1.png": drawn(21)}), drawn(22)
    post, jobs = taking.client.post, len(taking.client.get("/v1/jobs").json()["jobs"])
    wrong = [
        (sent({"a.zip": archive, "b.png": photo}), "one zip"),
        (sent({"a.zip": archive, "b.zip": archive}), "one zip"),
        (sent({"b.png": photo}, identity_from="first"), "`identity_from`"),
        (sent({"a.zip": archive}, identity_from="first", identity="Bo"), "`identity_from`"),
        (sent({"a.zip": archive}, identity_from="(.*)"), "`identity_from`"),
        (sent({"b.png": photo}, identity=" "), "nothing but spaces"),
        (sent({"b.png": photo}, path="/etc"), "`path`"),
        (sent({"b.png": photo}, faces="one"), "no face detector"),
        ({"files": {"note": (None, "no file")}}, "has no file"),
    ]
    for options, sentence in wrong:
        assert sentence in refused(post(UPLOADS, **options), 400, "invalid-argument"), options
    refused(post(UPLOADS, json={"identity": "Bo"}), 415, "unsupported-media-type")
    refused(post(UPLOADS, **sent({"b.png": bytes(2**20 + 1)})), 413, "body-too-large")
    too_many = {f"{number}.png": b"" for number in range(1001)}
    refused(post(UPLOADS, **sent(too_many)), 400, "bad-request")
    assert len(taking.client.get("/v1/jobs").json()["jobs"]) == jobs
    assert kept(temporary) == []


def test_a_killed_service_keeps_what_was_done_and_its_next_start_removes_uploads(
    own_gallery: Path, temporary: Path, tmp_path: Path
) -> None:
    """The first job waits for a writer that does not let go before the service is killed."""
    with Server(own_gallery, tmp_path / "log") as server:
        with connect(server.url) as client:
            done = client.wait_for_job(started(server, {"done.png": drawn(31)}, identity="Eva"))
        with Gallery.open(own_gallery) as gallery, gallery.vault.writing():
            running, waiting = (started(server, {"x.png": drawn(number)}) for number in (32, 33))
            while server.client.get(f"/v1/jobs/{running}").json()["state"] != "running":
                time.sleep(0.01)
            assert len(kept(temporary)) == 2
            server.client.post(f"/v1/jobs/{waiting}/cancel").raise_for_status()
            [left] = kept(temporary)
            assert (left.stat().st_mode & 0o077, (left / "0").stat().st_mode & 0o077) == (0, 0)
            server.stop(signal.SIGKILL)
    assert done.counts == {"enrolled": 1}
    assert kept(temporary) == [left]
    with Gallery.open(own_gallery) as gallery:
        with gallery.vault.store.read() as reader:
            stored = reader.photos_by_sha256({hashlib.sha256(drawn(31)).hexdigest()})
        assert len(stored) == 1
    with Server(own_gallery, tmp_path / "log2") as server:
        assert kept(temporary) == []
        with Gallery.open(own_gallery) as gallery, gallery.vault.writing():
            first, _ = (started(server, {"x.png": drawn(number)}) for number in (34, 35))
            stream = httpx.Client(base_url=server.url, trust_env=False, timeout=60)
            with stream, stream.stream("GET", f"/v1/jobs/{first}/events") as response:
                lines = response.iter_lines()
                next(lines)
                server.process.terminate()
                assert "event: end" not in list(lines)
        assert server.process.wait(60) == 0
    assert kept(temporary) == []
