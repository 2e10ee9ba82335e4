"""Commands and the service, with the address of a gallery in PostgreSQL and Milvus in place of a folder."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retrieval.client import connect
from retrieval.errors import InputError
from retrieval.gallery.gallery import Gallery
from retrieval.index.milvus import MilvusVectors
from retrieval.models.bundle import ModelBundle
from tests.cli.test_app import Faceprint, faceprint
from tests.engines.postgresql_server import PostgresqlServer, programs
from tests.operations import DIMENSION, add, photo, write_photos
from tests.service.server import Server
from tests.service.test_evaluation import descendants

__all__ = ["faceprint"]  # pytest finds the fixture by its name

pytestmark = [
    # Of pymilvus's own code, and of the grpc below it.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def run(faceprint: Faceprint) -> Callable[..., str]:
    """Runs a command that must succeed; returns its standard output."""

    def run(*arguments: object) -> str:
        status, out, err = faceprint(*arguments)
        assert status == 0, err
        assert "secret-word" not in out + err
        return out

    return run


def test_a_gallery_in_databases_is_made_searched_measured_and_erased_by_commands(
    run: Callable[..., str],
    faceprint: Faceprint,
    schema_address: str,
    collection: str,
    bundle: ModelBundle,
    cache: Path,
    tmp_path: Path,
) -> None:
    address, photos = schema_address, tmp_path / "photos"
    write_photos(photos, range(9))
    model = ["--model", bundle.folder]
    status, _, err = faceprint("ingest", address, photos, *model)
    assert status == 2
    assert err.endswith("give their address too, as --vectors-at milvus://HOST:PORT/COLLECTION.\n")
    assert "enrolled 9" in run("ingest", address, photos, *model, "--vectors-at", collection)
    assert "already known 9" in run("ingest", address, photos)
    status, _, err = faceprint("ingest", address, photos, *model, "--vectors-at", collection)
    assert status == 2
    assert "leave --vectors-at out" in err
    facts = json.loads(run("info", address, "--json"))
    assert (facts["faces"], facts["vectors"]) == (9, collection)
    assert collection in run("info", address)

    [answer] = json.loads(run("search", address, photos / "Kim" / "Kim_1.png", "-k", 2, "--json"))
    assert [answer["matches"][0][key] for key in ("identity", "distance")] == ["Kim", 0.0]
    np.save(tmp_path / "asked.npy", np.zeros((2, DIMENSION), np.float32))
    asked = ["--vectors", tmp_path / "asked.npy"]
    assert len(json.loads(run("search", address, *asked, "--by-person", "--json"))) == 2

    table = pa.table(
        {
            "path": [f"/elsewhere/{number}.png" for number in range(5)],
            "identity": [f"person {number}" for number in range(5)],
            "sha256": [f"{number:064x}" for number in range(5)],
            "vector": pa.array(list(np.eye(5, DIMENSION)), pa.list_(pa.float32(), DIMENSION)),
        }
    )
    pq.write_table(table, tmp_path / "vectors.parquet")
    assert "enrolled 5" in run("ingest", address, "--embeddings", tmp_path / "vectors.parquet", *model)
    run("rename-identity", address, "Adi", "Adi Berg")
    run("calibrate", address, "--fpir", "0.2")
    assert json.loads(run("audit", address, "--json"))["faces"] == 14
    assert "14 faces" in run("export", address, tmp_path / "exported")
    receipt = json.loads(run("forget", address, "--identity", "Kim", "--json"))
    assert receipt["faces"] == 3
    assert "No answer has them from now on" in run("forget", address, "--identity", "person 1")
    verified = json.loads(run("verify", address, "--json"))
    assert (verified["faces"], verified["findings"]) == (10, [])
    assert "rename-identity" in run("audit-log", address)
    assert run("copy", address, tmp_path / "copied").startswith("copied 10 faces to ")
    assert json.loads(run("verify", tmp_path / "copied", "--json"))["findings"] == []
    status, _, err = faceprint("copy", tmp_path / "copied", address.replace("schema=", "schema=x"))
    assert status == 2
    assert err.endswith("give their address too, as --vectors-at milvus://HOST:PORT/COLLECTION.\n")


@pytest.mark.parametrize(
    ("arguments", "instead"),
    [
        (("backup", "{}", "backup"), "copy it to a folder and back up that"),
        (("restore", "backup", "{}"), "`faceprint copy`"),
        (("optimize", "{}"), "without codes"),
        (("compact", "{}"), "VACUUM"),
        (("repair", "{}"), "backups of their own"),
        (("reembed", "{}", "--drop-other"), "`faceprint copy`"),
        (("publish", "{}", "published"), "by its address"),
    ],
)
def test_commands_that_need_a_folder_say_what_to_do_instead(
    arguments: tuple[str, ...], instead: str, one_gallery: str, faceprint: Faceprint
) -> None:
    status, _, err = faceprint(*(word.format(one_gallery) for word in arguments))
    assert status == 2
    assert instead in err
    assert err.count("\n") == 1
    assert "secret-word" not in err


@pytest.mark.parametrize("command", ["info", "verify", "search", "serve", "forget", "audit"])
def test_an_address_without_a_gallery_is_one_sentence(
    command: str, schema_address: str, faceprint: Faceprint
) -> None:
    further = {"search": ("--face", "1"), "forget": ("--identity", "Kim")}.get(command, ())
    status, _, err = faceprint(command, schema_address, *further)
    assert status == 2
    assert err.startswith("faceprint: There is no gallery ")
    assert err.count("\n") == 1
    assert "secret-word" not in err


def test_the_service_answers_enrolls_and_forgets(
    one_gallery: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    picture = tmp_path / "Kim.png"
    photo(1).save(picture)
    token = run("token", "create", one_gallery, "--name", "app", "--scope", "admin").strip()
    with Server(one_gallery, tmp_path / "log", "--workers", 2) as server:  # type: ignore[arg-type]
        with connect(server.url) as client, pytest.raises(InputError, match="token"):
            client.info()
        with connect(server.url, token=token) as client:
            assert client.search(picture).matches == ()
            server.client.headers["Authorization"] = f"Bearer {token}"
            sent = server.client.post(
                "/v1/faces", files={"image": picture.read_bytes()}, data={"identity": "Kim"}
            )
            assert sent.status_code == 201, sent.text
            [match] = client.search(picture).matches
            assert (match.face.identity, round(match.distance, 3)) == ("Kim", 0.0)
            [person] = server.client.get("/v1/people").json()["people"]
            assert server.client.get("/people").status_code == 200
            assert "for a time: no answer has" in server.client.get(f"/people/{person['id']}/forget").text
            receipt = server.client.delete(f"/v1/people/{person['id']}").json()
            assert receipt["faces"] == 1
            assert receipt["remains"].startswith("No answer has them from now on.")
            assert receipt["remains"] in server.client.get(f"/receipts/{receipt['id']}").text
            assert server.client.get(f"/receipts/{receipt['id']}/file").json() == receipt
            assert client.search(picture).matches == ()
    assert "secret-word" not in (tmp_path / "log").read_text()
    [told] = json.loads(run("audit-log", one_gallery, "--receipts", "--json"))
    assert told == receipt


def test_a_service_whose_vectors_cannot_be_asked_is_not_ready(
    schema_address: str, collection: str, bundle: ModelBundle, cache: Path, tmp_path: Path
) -> None:
    with Gallery.create(schema_address, bundle, vectors=collection) as gallery:
        add(gallery, range(3))
    with Server(schema_address, tmp_path / "log") as server:  # type: ignore[arg-type]
        assert server.client.get("/readyz").json() == {"status": "ok"}
        with contextlib.closing(MilvusVectors.open(collection, DIMENSION)) as opened:
            opened.drop()
        answer = server.client.get("/readyz")
        assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage-error")
        assert server.client.get("/v1/people").status_code == 200


def test_a_service_whose_database_is_down_says_try_again_and_goes_on_with_it(
    postgresql_server: PostgresqlServer, collection: str, bundle: ModelBundle, cache: Path, tmp_path: Path
) -> None:
    found = programs()
    assert found is not None
    with contextlib.closing(PostgresqlServer(found)) as database:
        database.start()
        with Gallery.create(database.address(), bundle, vectors=collection) as gallery:
            add(gallery, range(3))
        with Server(database.address(), tmp_path / "log") as server:  # type: ignore[arg-type]
            database.kill()
            for path in ("/v1/people", "/v1/info", "/readyz"):
                answer = server.client.get(path)
                assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server-unavailable")
                assert answer.headers["retry-after"] == "1"
            database.start()
            assert len(server.client.get("/v1/people").json()["people"]) == 3
            assert server.client.get("/readyz").status_code == 200


def test_tokens_are_those_of_the_gallery_however_its_address_is_spelled(
    databases: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    address, _ = databases
    run("token", "create", address, "--name", "app")
    other = address.replace("postgresql+psycopg://", "postgres://") + "&connect_timeout=9"
    assert [token["name"] for token in json.loads(run("token", "list", other, "--json"))] == ["app"]
    with Server(other, tmp_path / "log") as server:  # type: ignore[arg-type]
        assert server.client.get("/v1/info").status_code == 401


def test_a_job_measures_a_gallery_with_the_password_that_no_process_or_record_shows(
    postgresql_server: PostgresqlServer,
    schema_address: str,
    collection: str,
    bundle: ModelBundle,
    cache: Path,
    tmp_path: Path,
    run: Callable[..., str],
) -> None:
    schema, photos = schema_address.rpartition("schema=")[2], tmp_path / "photos"
    write_photos(photos, range(9))
    postgresql_server.execute(
        "CREATE ROLE guarded LOGIN PASSWORD 'secret-word'", f"ALTER SCHEMA {schema} OWNER TO guarded"
    )
    rules = postgresql_server.folder / "data" / "pg_hba.conf"
    rules.write_text(f"local all guarded scram-sha-256\n{rules.read_text()}")
    postgresql_server.execute("SELECT pg_reload_conf()")
    address = postgresql_server.address(schema=schema, user="guarded")
    run("ingest", address, photos, "--model", bundle.folder, "--vectors-at", collection)
    with Server(
        tmp_path / "unused", tmp_path / "log", command=["serve", address, "--port", 0, "--sources", tmp_path]
    ) as server:
        job = server.client.post("/v1/jobs", json={"kind": "evaluate", "data": str(photos)}).json()
        shown = set()
        while (job := server.client.get(f"/v1/jobs/{job['id']}").json())["state"] in ("waiting", "running"):
            with contextlib.suppress(OSError):  # one that ends meanwhile
                for number in descendants(server.process.pid):
                    shown.add(Path(f"/proc/{number}/cmdline").read_bytes())
            assert "secret-word" not in json.dumps(job)
        assert job["state"] == "done", job["error"]
        assert job["report"]["open"]
    assert any(b"evaluate" in one for one in shown)
    assert not [one for one in shown if b"secret-word" in one]
    assert "secret-word" not in (tmp_path / "log").read_text() + json.dumps(job)
