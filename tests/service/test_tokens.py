"""Tokens: who may ask, from the command line to the request."""

import json
import os
import socket
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from retrieval import Gallery
from retrieval.errors import GalleryError, InputError, NotFound
from retrieval.service import tokens
from retrieval.service.tokens import Scope, TokenRegistry
from retrieval.storage.layout import TOKENS
from tests.cli.test_app import Faceprint, faceprint
from tests.service.server import Server
from tests.service.test_gate import refused

__all__ = ["faceprint"]  # pytest finds the fixture by its name

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def test_the_folder_has_the_hash_of_a_token_for_its_owner_alone(own_gallery: Path) -> None:
    secret, made = tokens.create(own_gallery, "door-1", Scope.READ)
    path = own_gallery / TOKENS
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert secret not in path.read_text()
    assert len(secret) >= 43
    assert tokens.read(own_gallery) == [made]
    assert TokenRegistry(own_gallery).find(secret) == made
    assert TokenRegistry(own_gallery).find(secret[:-1]) is None
    assert TokenRegistry(own_gallery).find(made.sha256) is None


def test_a_token_is_valid_until_it_expires_or_is_revoked(own_gallery: Path) -> None:
    _, made = tokens.create(own_gallery, "door-1", Scope.READ, expires="90d", now=NOW)
    assert made.expires_at == "2026-08-30T00:00:00+00:00"
    assert made.state(NOW + timedelta(days=89)) == "valid"
    assert made.state(NOW + timedelta(days=90)) == "expired"
    assert tokens.revoke(own_gallery, "door-1").state(NOW) == "revoked"
    with pytest.raises(NotFound):
        tokens.revoke(own_gallery, "door-1")


def test_an_expired_token_and_a_revoked_one_are_not_found_and_their_names_are_free(own_gallery: Path) -> None:
    old, _ = tokens.create(
        own_gallery, "door", Scope.READ, expires="1d", now=datetime(2020, 1, 1, tzinfo=UTC)
    )
    lost, _ = tokens.create(own_gallery, "door", Scope.READ)
    tokens.revoke(own_gallery, "door")
    new, made = tokens.create(own_gallery, "door", Scope.READ)
    registry = TokenRegistry(own_gallery)
    assert [registry.find(secret) for secret in (old, lost, new)] == [None, None, made]


@pytest.mark.parametrize(
    ("name", "expires", "words"),
    [
        ("", None, "`name`"),
        ("a b", None, "`name`"),
        ("../x", None, "`name`"),
        ("x" * 65, None, "`name`"),
        ("x", "soon", "90d"),
        ("x", "2020-01-01", "is over"),
        ("x", "0d", "is over"),
        ("x", "99999d", "90d"),
    ],
)
def test_wrong_names_and_times_are_refused(
    name: str, expires: str | None, words: str, own_gallery: Path
) -> None:
    with pytest.raises(InputError, match=words):
        tokens.create(own_gallery, name, Scope.READ, expires=expires)
    assert not (own_gallery / TOKENS).exists()


def test_a_damaged_file_of_tokens_is_an_error_that_says_what_to_do(own_gallery: Path) -> None:
    tokens.create(own_gallery, "a", Scope.READ)
    path = own_gallery / TOKENS
    for text in ("", "[]", '{"format": 1, "tokens": [{"id": 1}]}', path.read_text()[:-20]):
        path.write_text(text)
        with pytest.raises(GalleryError, match="create new tokens"):
            TokenRegistry(own_gallery)
    path.write_text('{"format": 2, "tokens": []}')
    with pytest.raises(GalleryError, match="newer version"):
        tokens.read(own_gallery)
    path.unlink()
    path.symlink_to("elsewhere")
    with pytest.raises(GalleryError, match="symbolic link"):
        tokens.read(own_gallery)


def test_scopes_include_the_lesser_ones() -> None:
    assert [[one.includes(other) for other in Scope] for one in Scope] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_tokens_are_in_no_backup_and_survive_a_restore(own_gallery: Path, tmp_path: Path) -> None:
    secret, made = tokens.create(own_gallery, "a", Scope.READ)
    with Gallery.open(own_gallery) as gallery:
        gallery.backup(tmp_path / "backup")
    assert not [path for path in (tmp_path / "backup").rglob("*") if "token" in path.name]
    Gallery.restore(tmp_path / "backup", own_gallery)
    assert TokenRegistry(own_gallery).find(secret) == made
    Gallery.restore(tmp_path / "backup", tmp_path / "new.gallery")
    assert tokens.read(tmp_path / "new.gallery") == []
    with Gallery.open(own_gallery) as gallery:
        assert not gallery.verify().findings


def test_the_commands_create_list_and_revoke(own_gallery: Path, faceprint: Faceprint) -> None:
    status, secret, err = faceprint("token", "create", own_gallery, "--name", "door-1", "--expires", "9000d")
    assert (status, "cannot be shown again" in err) == (0, True)
    assert TokenRegistry(own_gallery).find(secret.strip()) is not None
    status, out, _ = faceprint("token", "list", own_gallery, "--json")
    [row] = json.loads(out)
    assert (status, row["name"], row["scope"], row["state"], row["last_used_at"]) == (
        0,
        "door-1",
        "read",
        "valid",
        None,
    )
    status, _, err = faceprint("token", "create", own_gallery, "--name", "door-1")
    assert (status, "already" in err, "--name" in err) == (2, True, True)
    status, _, err = faceprint("token", "create", own_gallery, "--name", "x", "--scope", "all")
    assert (status, "read, write, admin" in err) == (2, True)
    assert faceprint("token", "revoke", own_gallery, "--name", "door-1")[0] == 0
    status, _, err = faceprint("token", "revoke", own_gallery, "--name", "door-1")
    assert (status, "no token 'door-1'" in err) == (2, True)
    _, out, _ = faceprint("token", "list", own_gallery)
    assert "revoked" in out
    status, _, err = faceprint("token", "list", own_gallery.parent)
    assert (status, "There is no gallery" in err) == (2, True)


def test_from_the_first_token_on_every_request_needs_one(own_gallery: Path, tmp_path: Path) -> None:
    """Also in a server that runs already, and after the last token was revoked."""
    with Server(own_gallery, tmp_path / "log", "--workers", 2, "--access-log") as server:

        def ask(headers: dict[str, str], path: str = "/v1/info") -> httpx.Response:
            # Each on a connection of its own: any of the workers.
            return httpx.get(server.url + path, headers=headers, trust_env=False)

        assert ask({}).status_code == 200
        assert ask(bearer("fpt_wrong")).status_code == 401
        secret, made = tokens.create(own_gallery, "door-1", Scope.READ)
        for _ in range(4):
            refused(ask({}), 401, "unauthorized")
            assert ask(bearer(secret)).status_code == 200
            assert ask({}, "/metrics").status_code == 401
            assert ask({}, "/healthz").status_code == 200
        assert ask({}).headers["www-authenticate"] == "Bearer"
        for wrong in (f"Bearer {secret}x", f"Basic {secret}", secret, f"Bearer {made.sha256}", "Bearer"):
            refused(ask({"authorization": wrong}), 401, "unauthorized")
        assert ask({"authorization": f"bearer {secret}", "host": "any.example"}).status_code == 200
        tokens.revoke(own_gallery, "door-1")
        for _ in range(4):
            refused(ask(bearer(secret)), 401, "unauthorized")
            refused(ask({}), 401, "unauthorized")
        (own_gallery / TOKENS).write_text("damaged")
        refused(ask(bearer(secret)), 500, "internal-error")
        (own_gallery / TOKENS).unlink()
        # Each worker that had seen a token goes on to ask for one.
        refused(ask({}), 401, "unauthorized")
    log = server.log.read_text()
    assert "GET /v1/info 200" in log
    assert "door-1" in log
    assert secret not in log
    assert made.id in tokens.last_uses(own_gallery)


def test_a_wrong_token_is_refused_before_the_body_is_sent(own_gallery: Path, tmp_path: Path) -> None:
    tokens.create(own_gallery, "a", Scope.READ)
    with Server(own_gallery, tmp_path / "log") as server:
        head = (
            "POST /v1/search HTTP/1.1\r\nhost: a\r\nauthorization: Bearer fpt_wrong\r\n"
            "content-type: image/jpeg\r\ncontent-length: 1000\r\nexpect: 100-continue\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head.encode())
            answer = connection.recv(65_536)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"connection: close" in answer


def test_other_machines_are_answered_only_with_tokens(
    own_gallery: Path, tmp_path: Path, faceprint: Faceprint
) -> None:
    serve = ("serve", own_gallery, "--port", 0, "--host", "0.0.0.0")
    status, _, err = faceprint(*serve)
    assert (status, "faceprint token create" in err, "leave --host out" in err) == (2, True, True)
    secret, _ = tokens.create(own_gallery, "a", Scope.READ)
    with Server(own_gallery, tmp_path / "log", "--host", "0.0.0.0") as server:
        url = f"http://127.0.0.1:{server.port}/v1/info"
        assert httpx.get(url, trust_env=False).status_code == 401
        assert httpx.get(url, headers=bearer(secret), trust_env=False).status_code == 200
    tokens.revoke(own_gallery, "a")
    status, _, err = faceprint(*serve)
    assert (status, "no valid token" in err) == (2, True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_of_tokens_that_cannot_be_read_stops_the_server(
    own_gallery: Path, faceprint: Faceprint
) -> None:
    tokens.create(own_gallery, "a", Scope.READ)
    (own_gallery / TOKENS).chmod(0)
    status, _, err = faceprint("serve", own_gallery, "--port", 0)
    assert (status, "tokens.json" in err) == (1, True)
