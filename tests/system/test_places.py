"""A place is a folder, a database or a service, and is shown without a password."""

import os
from pathlib import Path

import pytest

from retrieval.system.places import Place


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (
            "postgresql+psycopg://u:secret-word@host:5432/d?schema=g",
            "postgresql+psycopg://u@host:5432/d?schema=g",
        ),
        (
            "postgresql://u@/d?host=%2Ftmp&password=secret-word&schema=g",
            "postgresql://u@/d?host=%2Ftmp&schema=g",
        ),
        ("postgresql://host/d?password=secret-word", "postgresql://host/d"),
        ("postgresql:///d", "postgresql:///d"),
        ("postgresql://u:secret-word@h/d?sslmode=require", "postgresql://u@h/d?sslmode=require"),
        ("postgresql://u:secret%40word:x@h/d", "postgresql://u@h/d"),
        ("postgresql://u:secret@word@h/d", "postgresql://u@h/d"),
        ("postgresql://u:secret/word@h/d?schema=g", "postgresql://u@h/d?schema=g"),
        ("postgresql://u:secret?word@h/d?schema=g", "postgresql://u@h/d?schema=g"),
        ("postgresql://u@h/d?schema=g&PASSWORD=secret-word", "postgresql://u@h/d?schema=g"),
        ("postgresql://u@h/d?sslpassword=secret-word&schema=g", "postgresql://u@h/d?schema=g"),
        ("postgres://u:secret-word@h/d", "postgres://u@h/d"),
        ("PostgreSQL://u:secret-word@h/d", "PostgreSQL://u@h/d"),
        # Refused when they are opened, in place of a new folder with a password in its name.
        ("postgresql+psycopg:/u:secret-word@h/d", "postgresql+psycopg:/u@h/d"),
        ("mysql://u:secret-word@h/d", "mysql://u@h/d"),
    ],
)
def test_an_address_of_a_database_is_kept_whole_and_shown_without_its_password(
    given: str, shown: str
) -> None:
    place = Place.of(given)
    assert (place.database, place.folder, place.service) == (given, None, None)
    assert str(place) == shown
    assert "secret" not in shown
    assert os.fspath(place) == given
    assert Place.of(place) is place


@pytest.mark.parametrize(
    "given", ["my.gallery", "my.gallery/", "/a//b", "postgresql", "postgresql.gallery", "a:b"]
)
def test_anything_else_is_a_folder(given: str) -> None:
    place = Place.of(given)
    assert (place.database, place.service) == (None, None)
    assert str(place) == str(place.folder) == str(Path(given))
    assert Place.of(Path(given)) == place


def test_an_address_of_a_service_is_one_unless_there_is_such_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Place.of("http://127.0.0.1:8000/x").service == "http://127.0.0.1:8000/x"
    (tmp_path / "http:" / "host").mkdir(parents=True)
    assert Place.of("http://host").service is None
    assert Place.of("http://host").folder == Path("http:/host")
    assert str(Place.of("https://u:secret-word@host/")) == "https://u@host/"
