"""Addresses that a gallery stores are fetched when the caller says so, from hosts that photos came from."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval.bulk.ingest import ingest, ingest_embeddings
from retrieval.database.records import NewFace
from retrieval.database.tables import host_table
from retrieval.embedding.outcome import Status
from retrieval.gallery.gallery import Gallery
from retrieval.images import pixels
from retrieval.images.photo_reader import PhotoReader
from retrieval.images.preprocessing import Preprocessing
from retrieval.models.bundle import ModelBundle
from retrieval.models.network import Network
from retrieval.quality.photo_page import Group, Item, Picture, Section, Table, sheet
from retrieval.system.paths import host_of
from retrieval.transfer import export_reader, vector_files
from tests.cli.test_app import Faceprint, faceprint
from training.fitting.export import export

__all__ = ["faceprint"]  # pytest finds the fixture by its name


@dataclass
class Server:
    """A server of photos on this machine, and the paths that it was asked for."""

    url: str
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    @property
    def host(self) -> str:
        return str(host_of(self.url))


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server("")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            made.asked.append(self.path)
            body = made.files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            if self.command == "GET" and body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        made.url = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield made
        listening.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def other_bundle(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """Another model than `bundle`."""
    torch.manual_seed(1)
    sample = np.stack([pixels.read(path, size=32) for path in sorted(faces.glob("*/*_0001.jpg"))])
    return export(
        Network(6, architecture="resnet14-narrow").eval(),
        tmp_path_factory.mktemp("models") / "other",
        labels=tuple(sorted(path.name for path in faces.iterdir())),
        reader=PhotoReader(Preprocessing(size=32, crop=1.0)),
        recipe={"epochs": 0},
        split={"train": [], "validation": []},
        figures={"validation_accuracy": 0.5},
        sample=sample,
    )


def serve(server: Server, faces: Path, count: int = 6) -> list[str]:
    """Lets a server have some photos; their addresses."""
    for number, photo in enumerate(sorted(faces.glob("*/*.jpg"))[:count]):
        server.files[f"/Ann/{number}.jpg"] = photo.read_bytes()
    return [server.url + path for path in server.files]


def write_list(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def write_rows(path: Path, urls: list[str], server: Server, model: ModelBundle) -> Path:
    """A file of embeddings whose rows say that they are of photos at addresses."""
    vectors = np.random.default_rng(0).standard_normal((len(urls), model.dimension)).astype(np.float32)
    digests = [pixels.content_sha256(server.files[url.removeprefix(server.url)]) for url in urls]
    rows = [NewFace("Ann", url, digest) for url, digest in zip(urls, digests, strict=True)]
    vector_files.write_embeddings(
        path, [(rows, vectors)], fingerprint=model.fingerprint, dimension=model.dimension
    )
    return path


def hosts(gallery: Gallery) -> frozenset[str]:
    with gallery.vault.store.read() as reader:
        return reader.hosts()


def forget_hosts(gallery: Gallery) -> None:
    """Leaves a gallery as one that an older version made."""
    with gallery.vault.writing() as writer:
        writer.clear(host_table)


def shown(gallery: Gallery, *, fetch: bool) -> str:
    """A page with every face, as `audit_report.page` makes one of those that are doubted."""
    with gallery.vault.store.read() as reader:
        faces = [face for some in reader.all_faces() for face in some]
    pictures = [Picture(face.paths, face.sha256, f"face {face.id}") for face in faces]
    sections = [Section("", "", [Item("", "", "", [Group("", pictures)])])]
    return sheet("", [], Table((), ()), sections, gallery.fetching(fetch=fetch)).decode()


def test_addresses_of_a_file_of_embeddings_are_never_asked_for(
    server: Server, gallery: Gallery, other_bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    urls = serve(server, faces)
    rows = write_rows(tmp_path / "rows.parquet", urls, server, gallery.bundle)
    assert ingest_embeddings(gallery, rows).enrolled == 6
    for fetch in (False, True):
        done = gallery.reembed(other_bundle, fetch=fetch)
        assert not done.switched
        assert len(done.lost) == 6
        assert len(done.unfetched) == (0 if fetch else 6)
        assert all(("`fetch=True`" in said) != fetch for said in done.reasons.values())
        assert "<img" not in shown(gallery, fetch=fetch)
    assert server.asked == []
    assert hosts(gallery) == frozenset()


def test_photos_that_were_enrolled_from_addresses_are_fetched_again_when_the_caller_says_so(
    server: Server, gallery: Gallery, other_bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    report = ingest(gallery, [write_list(tmp_path / "urls.txt", serve(server, faces))])
    assert report.enrolled == 6
    assert hosts(gallery) == {server.host}
    server.asked.clear()
    # Giving up means photos that are gone, not those that nobody was allowed to look for.
    kept = gallery.reembed(other_bundle, give_up=True)
    assert (kept.switched, kept.faces, len(kept.unfetched)) == (False, 6, 6)
    assert "`fetch=True`" in shown(gallery, fetch=False)
    assert server.asked == []
    assert "data:image/jpeg" in shown(gallery, fetch=True)
    assert server.asked
    done = gallery.reembed(other_bundle, fetch=True)
    assert (done.switched, done.lost, done.reasons) == (True, (), {})


def test_repair_fetches_when_it_is_told_to_and_gives_up_nobody_before(
    server: Server, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    with Gallery.create(tmp_path / "g", bundle) as gallery:
        ingest(gallery, [write_list(tmp_path / "urls.txt", serve(server, faces))])
    for segment in (tmp_path / "g" / "vectors").glob("*.faiss"):
        segment.unlink()
    server.asked.clear()
    with Gallery.open(tmp_path / "g") as gallery:
        kept = gallery.repair(give_up=True)
        assert (kept.embedded, kept.given_up, len(kept.lost), len(kept.unfetched)) == (0, 0, 6, 6)
        assert server.asked == []
        del server.files["/Ann/0.jpg"]
        done = gallery.repair(fetch=True)
        assert (done.embedded, len(done.lost), done.unfetched) == (0, 1, ())
        assert set(done.reasons.values()) == {"there is no such file at this address"}
        done = gallery.repair(fetch=True, give_up=True)
        assert (done.embedded, done.given_up, done.after.whole) == (5, 1, True)


def test_hosts_are_learned_from_photos_that_were_fetched_whatever_became_of_them(
    server: Server, gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    urls = serve(server, faces, 2)
    ingest(gallery, urls)
    forget_hosts(gallery)
    assert ingest(gallery, urls).known == 2
    assert hosts(gallery) == {server.host}, "known again"
    forget_hosts(gallery)
    server.files["/again.jpg"] = server.files["/Ann/0.jpg"]
    assert ingest(gallery, [server.url + "/again.jpg"]).duplicate == 1
    assert hosts(gallery) == {server.host}, "another address of the same bytes"
    forget_hosts(gallery)
    outcomes = gallery.enroll([(urls[0], "Somebody else")])
    assert gallery.enroll([(urls[0], "Another")])[0].status is Status.REJECTED
    assert outcomes[0].status is not Status.REJECTED
    assert hosts(gallery) == {server.host}


def test_hosts_are_not_learned_from_rejected_photos_nor_from_content_that_others_read(
    server: Server, gallery: Gallery, faces: Path
) -> None:
    url = serve(server, faces, 1)[0]
    server.files["/no.jpg"] = b"no picture"
    assert ingest(gallery, [server.url + "/no.jpg"]).rejected == 1
    gallery.enroll_prepared([gallery.prepare(server.files["/Ann/0.jpg"], "Ann", path=url)])
    assert gallery.info().faces == 1
    assert hosts(gallery) == frozenset()


def test_a_host_is_forgotten_with_the_last_path_that_lies_there(
    server: Server, gallery: Gallery, faces: Path
) -> None:
    urls = serve(server, faces, 2)
    ingest(gallery, [*urls, *sorted(faces.glob("*/*.jpg"))[2:4]])
    gallery.forget(path=urls[0])
    assert hosts(gallery) == {server.host}
    gallery.forget(path=urls[1])
    assert hosts(gallery) == frozenset()


def test_hosts_are_in_a_backup_and_in_no_export(
    server: Server, gallery: Gallery, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    ingest(gallery, serve(server, faces, 2))
    gallery.backup(tmp_path / "backup")
    Gallery.restore(tmp_path / "backup", tmp_path / "restored")
    with Gallery.open(tmp_path / "restored") as restored:
        assert hosts(restored) == {server.host}
    gallery.export(tmp_path / "export")
    with Gallery.create(tmp_path / "imported", bundle) as imported:
        imported.import_export(export_reader.read_export(tmp_path / "export"))
        assert imported.info().faces == 2
        assert hosts(imported) == frozenset()


def test_the_commands_ask_for_fetch_and_fetch_with_it(
    faceprint: Faceprint,
    server: Server,
    bundle: ModelBundle,
    other_bundle: ModelBundle,
    faces: Path,
    tmp_path: Path,
) -> None:
    urls = write_list(tmp_path / "urls.txt", serve(server, faces, 3))
    made = tmp_path / "g"
    assert faceprint("ingest", made, urls, "--model", bundle.folder)[0] == 0
    server.asked.clear()
    report = tmp_path / "lost.jsonl"
    status, _, error = faceprint(
        "reembed", made, "--model", other_bundle.folder, "--give-up", "--report", report
    )
    assert (status, "pass --fetch" in error) == (1, True)
    assert report.read_text().count("it is at an address; --fetch allows fetching it") == 3
    assert faceprint("audit", made, "--page", tmp_path / "a.html")[0] == 0
    assert "`fetch=True`" not in (tmp_path / "a.html").read_text()
    assert server.asked == []
    assert faceprint("audit", made, "--page", tmp_path / "a.html", "--fetch")[0] == 0
    assert faceprint("reembed", made, "--model", other_bundle.folder, "--fetch")[0] == 0
    assert faceprint("reembed", made, "--drop-other")[0] == 0
    for segment in (made / "vectors").glob("*.faiss"):
        segment.unlink()
    server.asked.clear()
    status, out, error = faceprint("repair", made, "--give-up")
    assert (status, "pass --fetch" in error, "it is at an address; --fetch allows fetching it" in out) == (
        1,
        True,
        True,
    )
    assert server.asked == []
    assert faceprint("repair", made, "--fetch")[0] == 0
