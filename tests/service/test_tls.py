"""TLS: the service speaks it, and says what is wrong with its files before it starts."""

import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import trustme

from retrieval import Gallery
from retrieval.client import connect
from retrieval.errors import InputError
from retrieval.service.settings import Settings
from retrieval.service.tls import check_certificate
from tests.service.server import Server


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 and its key."""
    folder = tmp_path_factory.mktemp("tls")
    issued = authority.issue_cert("127.0.0.1")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    return certificate, key


@pytest.fixture(scope="module")
def changed(enrolled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the gallery, to be changed."""
    return Path(shutil.copytree(enrolled, tmp_path_factory.mktemp("secured") / "people.gallery"))


@pytest.fixture(scope="module")
def secured(
    authority: trustme.CA,
    files: tuple[Path, Path],
    changed: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    log = tmp_path_factory.mktemp("log") / "log"
    options = ("--certfile", files[0], "--keyfile", files[1], "--workers", 2)
    with Server(changed, log, *options, verify=context) as server:
        yield server


def test_every_worker_speaks_tls_and_forwards_changes(secured: Server) -> None:
    assert secured.url.startswith("https://127.0.0.1:")
    assert secured.client.post("/v1/search", json={"face": 1}).json()["answers"]
    answer = secured.client.put("/v1/people/1/metadata", json={"team": "red"})
    assert (answer.status_code, answer.json()["metadata"]) == (200, {"team": "red"})
    assert secured.client.put("/v1/people/1/metadata", json={}).status_code == 200


def test_a_client_without_the_authority_refuses_the_service(secured: Server) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{secured.url}/healthz", trust_env=False)


def test_the_client_asks_as_the_library_does(
    secured: Server, authority: trustme.CA, changed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    with connect(secured.url) as remote, Gallery.open(changed) as gallery:
        assert remote.search_by_face(1, k=3) == gallery.search_by_face(1, k=3)


def test_files_that_do_not_serve_are_one_sentence(files: tuple[Path, Path], tmp_path: Path) -> None:
    certificate, key = files
    check_certificate(certificate, key)
    both = tmp_path / "both.pem"
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    check_certificate(both, None)
    other = tmp_path / "other.pem"
    trustme.CA().issue_cert("127.0.0.1").private_key_pem.write_to_path(other)
    wrong = [(tmp_path / "none", key), (certificate, tmp_path / "none"), (tmp_path, key), (key, certificate)]
    for some in [*wrong, (certificate, other), (certificate, None)]:
        with pytest.raises(InputError, match=r"cannot be read|no certificate with its private key"):
            check_certificate(*some)
    with pytest.raises(InputError, match="give its `certfile` too"):
        Settings(tmp_path, keyfile=key)


def test_a_key_with_a_passphrase_is_refused_and_not_asked_for(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(files[1].read_bytes(), None)
    locked = tmp_path / "locked.pem"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(InputError, match="has a passphrase"):
        check_certificate(files[0], locked)
