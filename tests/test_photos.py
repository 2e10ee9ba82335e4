"""Where photographs are, who is on them, and in which order they come."""

import inspect
import os
import sys
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.errors import DataError, Reason
from retrieval.photos import Photo, count, scan
from tests.broken import without_rights


def fill(root: Path, *names: str) -> Path:
    """Makes an empty file at each of these paths below `root`."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def found(*sources: Path) -> list[tuple[str, str | None, Reason | None]]:
    """What a scan finds: paths below the first source, identities and problems."""
    return [
        (os.path.relpath(photo.path, sources[0]), photo.identity, photo.problem) for photo in scan(sources)
    ]


def test_folders_are_identities_however_deep_and_loose_files_have_none(tmp_path: Path) -> None:
    fill(tmp_path, "Ann/1.jpg", "Ann/trips/2019/2.jpg", "Ann/trips/3.jpg", "loose.jpg", "Zoë/notes.txt")
    assert list(scan([tmp_path])) == [
        Photo(tmp_path / "Ann" / "1.jpg", "Ann"),
        Photo(tmp_path / "Ann" / "trips" / "2019" / "2.jpg", "Ann"),
        Photo(tmp_path / "Ann" / "trips" / "3.jpg", "Ann"),
        Photo(tmp_path / "Zoë" / "notes.txt", "Zoë"),
        Photo(tmp_path / "loose.jpg", None),
    ]


def test_names_come_in_code_point_order_with_files_and_folders_among_each_other(tmp_path: Path) -> None:
    fill(tmp_path, "b.jpg", "B.jpg", "a/10.jpg", "a/9.jpg", "é.jpg", "c/1.jpg", "a.jpg")
    assert [name for name, *_ in found(tmp_path)] == [
        "B.jpg",
        "a/10.jpg",
        "a/9.jpg",
        "a.jpg",
        "b.jpg",
        "c/1.jpg",
        "é.jpg",
    ]


def test_sources_come_in_the_order_given_and_as_often_as_given(tmp_path: Path) -> None:
    fill(tmp_path, "two/B/2.jpg", "one/A/1.jpg")
    one, two = Photo(tmp_path / "one/A/1.jpg", "A"), Photo(tmp_path / "two/B/2.jpg", "B")
    assert list(scan([tmp_path / "two", tmp_path / "one", tmp_path / "two"])) == [two, one, two]


def test_a_single_file_has_no_identity_whatever_its_folder_is_called(tmp_path: Path) -> None:
    fill(tmp_path, "Ann/1.jpg")
    assert list(scan([tmp_path / "Ann" / "1.jpg"])) == [Photo(tmp_path / "Ann" / "1.jpg", None)]


def test_paths_are_absolute_and_links_in_them_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "real/Ann/1.jpg")
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    wanted = [Photo(tmp_path / "link" / "Ann" / "1.jpg", "Ann")]
    assert list(scan(["link"])) == list(scan([Path("real/../link")])) == wanted


@pytest.mark.parametrize(
    "name",
    [".hidden.jpg", ".DS_Store", "Thumbs.db", "thumbs.db", "THUMBS.DB", "desktop.ini", "Desktop.ini"],
)
def test_dotfiles_and_the_litter_of_operating_systems_are_passed_over(name: str, tmp_path: Path) -> None:
    fill(tmp_path, name, f"Ann/{name}", "Ann/1.jpg")
    assert found(tmp_path) == [("Ann/1.jpg", "Ann", None)]


@pytest.mark.parametrize("name", [".git", "__MACOSX", ".Trash"])
def test_hidden_folders_and_the_folder_of_a_mac_archive_are_passed_over(name: str, tmp_path: Path) -> None:
    fill(tmp_path, f"{name}/Ann/1.jpg", f"Ann/{name}/2.jpg", "Ann/3.jpg")
    assert found(tmp_path) == [("Ann/3.jpg", "Ann", None)]


def test_a_hidden_folder_that_is_asked_for_by_name_is_scanned(tmp_path: Path) -> None:
    fill(tmp_path, ".private/Ann/1.jpg")
    assert found(tmp_path / ".private") == [("Ann/1.jpg", "Ann", None)]


def test_no_photos_are_found_in_an_empty_folder_or_in_no_source(tmp_path: Path) -> None:
    (tmp_path / "Ann").mkdir()
    assert list(scan([tmp_path])) == []
    assert list(scan([])) == []


# Links


@pytest.mark.parametrize("target", ["..", ".", "../Ann", "../../root"])
def test_a_link_to_a_folder_above_is_one_link_loop_and_an_end(target: str, tmp_path: Path) -> None:
    root = fill(tmp_path / "root", "Ann/1.jpg", "Bea/2.jpg")
    (root / "Ann" / "again").symlink_to(target)
    assert found(root) == [
        ("Ann/1.jpg", "Ann", None),
        ("Ann/again", "Ann", Reason.LINK_LOOP),
        ("Bea/2.jpg", "Bea", None),
    ]


def test_a_linked_folder_is_followed_and_names_its_identity(tmp_path: Path) -> None:
    """Even to where another source reaches: only a folder above itself makes a loop."""
    root = fill(tmp_path / "root", "Ann/1.jpg")
    fill(tmp_path / "elsewhere", "deep/2.jpg")
    (root / "Bea").symlink_to(tmp_path / "elsewhere")
    (root / "Cleo").symlink_to("Ann")
    assert found(root) == [
        ("Ann/1.jpg", "Ann", None),
        ("Bea/deep/2.jpg", "Bea", None),
        ("Cleo/1.jpg", "Cleo", None),
    ]


@pytest.mark.parametrize("target", ["nowhere.jpg", "itself.jpg"])
def test_a_link_to_nothing_or_to_itself_is_a_photo_that_its_reader_will_reject(
    target: str, tmp_path: Path
) -> None:
    fill(tmp_path, "Ann/1.jpg")
    (tmp_path / "Ann" / "itself.jpg").symlink_to(target)
    assert found(tmp_path) == [("Ann/1.jpg", "Ann", None), ("Ann/itself.jpg", "Ann", None)]


def test_folders_may_lie_deeper_than_calls_may(tmp_path: Path) -> None:
    deep = "a/" * 150 + "1.jpg"
    fill(tmp_path, deep)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 100)
    try:
        names = found(tmp_path)
    finally:
        sys.setrecursionlimit(limit)
    assert names == [(deep, "a", None)]


# Names


def test_identities_are_composed_and_paths_stay_as_the_disk_spells_them(tmp_path: Path) -> None:
    decomposed, composed = unicodedata.normalize("NFD", "Zoë"), unicodedata.normalize("NFC", "Zoë")
    assert decomposed != composed
    fill(tmp_path, f"{decomposed}/1.jpg", f"{composed}/2.jpg")
    assert found(tmp_path) == [
        (f"{decomposed}/1.jpg", composed, None),
        (f"{composed}/2.jpg", composed, None),
    ]


def test_a_file_or_folder_whose_name_is_not_utf8_is_a_problem_of_each_file_in_it(tmp_path: Path) -> None:
    """The identity is spelled so that any report can hold it."""
    root = os.fsencode(tmp_path)
    os.mkdir(os.path.join(root, b"Ren\xe9"))
    os.mkdir(os.path.join(root, b"Ann"))
    for name in (b"Ren\xe9/1.jpg", b"Ann/\xff.jpg", b"Ann/fine.jpg"):
        os.close(os.open(os.path.join(root, name), os.O_CREAT))
    assert [(os.fsencode(photo.path), photo.identity, photo.problem) for photo in scan([tmp_path])] == [
        (root + b"/Ann/fine.jpg", "Ann", None),
        (root + b"/Ann/\xff.jpg", "Ann", Reason.NAME_NOT_UTF8),
        (root + b"/Ren\xe9/1.jpg", r"Ren\xe9", Reason.NAME_NOT_UTF8),
    ]


# What cannot be had


@pytest.mark.parametrize("name", ["missing", "there.jpg/inside", "n" * 300, "loop"])
def test_a_source_that_does_not_exist_is_refused_before_the_first_photo(name: str, tmp_path: Path) -> None:
    fill(tmp_path, "there.jpg")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DataError) as caught:
        scan([tmp_path / "there.jpg", tmp_path / name])  # not even iterated over
    assert str(caught.value) == f"There is no file or folder {tmp_path / name}; check the path."
    with pytest.raises(DataError):
        count([tmp_path / name])


def test_a_folder_that_may_not_be_listed_is_one_photo_with_that_problem(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folder is its owner's alone
        root = Path(folder)
        root.chmod(0o755)
        fill(root, "Ann/private/1.jpg", "Ann/z.jpg", "Bea/2.jpg")
        with without_rights(root / "Ann" / "private"):
            listed = found(root)
    assert listed == [
        ("Ann/private", "Ann", Reason.NO_PERMISSION),
        ("Ann/z.jpg", "Ann", None),
        ("Bea/2.jpg", "Bea", None),
    ]


def test_a_source_behind_a_barred_folder_is_refused_like_a_missing_one(tmp_path: Path) -> None:
    fill(tmp_path, "private/Ann/1.jpg")
    with without_rights(tmp_path / "private"), pytest.raises(DataError, match="There is no file or folder"):
        scan([tmp_path / "private" / "Ann"])


def test_count_is_the_number_of_photos_with_their_problems(tmp_path: Path) -> None:
    fill(tmp_path, "Ann/1.jpg", "Ann/2.jpg", "loose.jpg", ".hidden")
    (tmp_path / "Ann" / "again").symlink_to("..")
    assert count([tmp_path, tmp_path / "loose.jpg"]) == 5
    assert count([tmp_path, tmp_path / "loose.jpg"]) == len(list(scan([tmp_path, tmp_path / "loose.jpg"])))


# Any tree

NAMES = ["a", "b", "B", "1.jpg", "Zoe\u0308", "Zo\u00eb", ".x", "Thumbs.db", "a b", "ß", "\U0001f600", "-"]


@settings(max_examples=60, deadline=None)
@given(st.sets(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map(tuple), max_size=12))
def test_every_file_that_is_not_passed_over_appears_once_and_in_order(paths: set[tuple[str, ...]]) -> None:
    """The order is that of the paths' parts; the identity is the first of several parts."""
    # A path that is the beginning of another is that one's folder, and no file.
    files = sorted(p for p in paths if not any(q[: len(p)] == p and q != p for q in paths))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        fill(root, *("/".join(parts) for parts in files))
        expected = [
            Photo(root.joinpath(*parts), unicodedata.normalize("NFC", parts[0]) if len(parts) > 1 else None)
            for parts in files
            if not {".x", "Thumbs.db"} & set(parts)
        ]
        assert list(scan([root])) == expected
        assert count([root]) == len(expected)
