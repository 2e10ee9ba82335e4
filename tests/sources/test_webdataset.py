"""Shards: what lies beside a photo in an archive says who is on it, and nothing else is taken for that."""

import json

import pytest

from retrieval.errors import Reason
from retrieval.sources.archives import Member
from retrieval.sources.webdataset import Sample, samples


def told(*files: tuple[str, bytes | str]) -> list[Sample]:
    members = [
        Member(name, content if isinstance(content, bytes) else content.encode()) for name, content in files
    ]
    return list(samples(members, lambda name: name.rpartition("/")[0] or None))


def brief(found: list[Sample]) -> list[tuple[str, str | None, dict[str, object]]]:
    return [(one.member.name, one.identity, one.metadata) for one in found]


def test_files_beside_a_photo_say_who_and_what_in_any_order() -> None:
    said = json.dumps({"identity": "Zoe\u0308", "year": 2020})
    for names in (["a.cls", "a.jpg", "a.json"], ["a.jpg", "a.json", "a.cls"], ["a.json", "a.cls", "a.jpg"]):
        texts = {"a.cls": "7\n", "a.jpg": "photo", "a.json": said}
        found = told(*((name, texts[name]) for name in names), ("b.png", "p"), ("b.cls", "8"))
        assert brief(found) == [("a.jpg", "Zoë", {"year": 2020}), ("b.png", "8", {})]


@pytest.mark.parametrize(
    ("beside", "identity", "metadata"),
    [
        ({"json": '{"identity": 7}', "cls": "8"}, "7", {}),
        ({"json": '{"a": 1}', "cls": "8"}, "8", {"a": 1}),
        ({"json": '{"a": 1}'}, "folder", {"a": 1}),
        ({"txt": "a day at the sea"}, "folder", {"text": "a day at the sea"}),
        ({"txt": "a day", "json": '{"text": "mine", "identity": "Ann"}'}, "Ann", {"text": "mine"}),
        ({"json": ""}, "folder", {}),
        ({"cls": ""}, "folder", {}),
    ],
)
def test_the_most_explicit_one_is_believed(
    beside: dict[str, str], identity: str, metadata: dict[str, object]
) -> None:
    found = told(("folder/1.jpg", "p"), *((f"folder/1.{suffix}", text) for suffix, text in beside.items()))
    assert brief(found) == [("folder/1.jpg", identity, metadata)]


def test_a_text_is_the_identity_where_nothing_else_is() -> None:
    assert brief(told(("1.jpg", "p"), ("1.txt", "Ann"))) == [("1.jpg", "Ann", {})]


def test_several_photos_of_one_key_share_what_is_said() -> None:
    assert brief(told(("1.jpg", "p"), ("1.png", "q"), ("1.cls", "Ann"))) == [
        ("1.jpg", "Ann", {}),
        ("1.png", "Ann", {}),
    ]


def test_without_a_photo_beside_them_they_are_files_like_others() -> None:
    files = [("Ann/1.jpg", "p"), ("Ann/notes.txt", "n"), ("Bea/1.txt", "n"), ("Bea/x.json", "{}")]
    assert [(name, identity) for name, identity, _ in brief(told(*files))] == [
        ("Ann/1.jpg", "Ann"),
        ("Ann/notes.txt", "Ann"),
        ("Bea/1.txt", "Bea"),
        ("Bea/x.json", "Bea"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("1.json", b"{", "the metadata of 1.json are not JSON"),
        ("1.json", b"[]", "the metadata of 1.json are a value of the type list"),
        ("1.json", b'{"identity": [1]}', "the identity in 1.json is not a text"),
        ("1.json", b'{"a": NaN}', "the number nan"),
        ("1.cls", b"\xff", "the file 1.cls beside it is not a text in UTF-8"),
        ("1.txt", b"x" * (2**20 + 1), "the file 1.txt beside it cannot be read"),
    ],
)
def test_what_cannot_be_understood_is_the_problem_of_its_photo_alone(
    name: str, content: bytes, words: str
) -> None:
    bad, good = told(("1.jpg", "p"), (name, content), ("2.jpg", "q"))
    assert bad.member.problem is Reason.BAD_METADATA
    assert words in (bad.member.detail or "")
    assert good.member == Member("2.jpg", b"q")
