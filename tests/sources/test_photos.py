"""Where photographs are, who is on them, and in which order they come."""

import inspect
import io
import os
import socket
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retrieval.errors import DataError, InputError, Reason, UnreadableImage
from retrieval.sources.photos import Photo, count, from_report, of, read_content, scan
from retrieval.system.paths import absolute
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
        (os.path.relpath(photo.path or "", sources[0]), photo.identity, photo.problem)
        for photo in scan(sources)
    ]


def test_folders_are_identities_however_deep_and_loose_files_have_none(tmp_path: Path) -> None:
    fill(tmp_path, "Ann/1.jpg", "Ann/trips/2019/2.jpg", "Ann/trips/3.jpg", "loose.jpg", "Zoë/notes.txt")
    assert list(scan([tmp_path])) == [
        Photo(str(tmp_path / "Ann" / "1.jpg"), "Ann"),
        Photo(str(tmp_path / "Ann" / "trips" / "2019" / "2.jpg"), "Ann"),
        Photo(str(tmp_path / "Ann" / "trips" / "3.jpg"), "Ann"),
        Photo(str(tmp_path / "Zoë" / "notes.txt"), "Zoë"),
        Photo(str(tmp_path / "loose.jpg"), None),
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
    one, two = Photo(str(tmp_path / "one/A/1.jpg"), "A"), Photo(str(tmp_path / "two/B/2.jpg"), "B")
    assert list(scan([tmp_path / "two", tmp_path / "one", tmp_path / "two"])) == [two, one, two]


def test_a_single_file_has_no_identity_whatever_its_folder_is_called(tmp_path: Path) -> None:
    fill(tmp_path, "Ann/1.jpg")
    assert list(scan([tmp_path / "Ann" / "1.jpg"])) == [Photo(str(tmp_path / "Ann" / "1.jpg"), None)]


def test_paths_are_absolute_and_links_in_them_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "real/Ann/1.jpg")
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    wanted = [Photo(str(tmp_path / "link" / "Ann" / "1.jpg"), "Ann")]
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
    assert [(os.fsencode(photo.path or ""), photo.identity, photo.problem) for photo in scan([tmp_path])] == [
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
            Photo(
                str(root.joinpath(*parts)),
                unicodedata.normalize("NFC", parts[0]) if len(parts) > 1 else None,
            )
            for parts in files
            if not {".x", "Thumbs.db"} & set(parts)
        ]
        assert list(scan([root])) == expected
        assert count([root]) == len(expected)


# Other sources


def shard(path: Path, *names: str, content: bytes = b"x") -> Path:
    """A tar or a zip with a file of this content under each name."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, content)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_sources_of_every_kind_come_one_after_the_other(tmp_path: Path) -> None:
    fill(tmp_path, "people/Ann/1.jpg", "single.jpg", "listed/Bea/2.jpg")
    tar = shard(tmp_path / "a.tar", "Cleo/3.jpg", "4.jpg")
    listed = tmp_path / "list.csv"
    listed.write_text("path,age\nlisted/Bea/2.jpg,7\n,8\n")
    fsspec.filesystem("memory").pipe("/x/5.jpg", b"five")
    sources = [tmp_path / "people", tmp_path / "single.jpg", tar, listed, "memory://x/5.jpg"]
    assert list(scan(sources)) == [
        Photo(f"{tmp_path}/people/Ann/1.jpg", "Ann"),
        Photo(f"{tmp_path}/single.jpg", None),
        Photo(f"{tar}/Cleo/3.jpg", "Cleo", content=b"x"),
        Photo(f"{tar}/4.jpg", None, content=b"x"),
        Photo(f"{tmp_path}/listed/Bea/2.jpg", "Bea", metadata={"age": 7}),
        Photo(None, None, Reason.BAD_ROW, detail=f"row 2 of {listed} has no path"),
        Photo("memory://x/5.jpg", None),
    ]


def test_a_list_or_an_archive_found_in_a_folder_is_a_file_like_others(tmp_path: Path) -> None:
    fill(tmp_path, "Ann/list.txt", "Ann/a.zip", "Ann/a.tar")
    assert [name for name, *_ in found(tmp_path)] == ["Ann/a.tar", "Ann/a.zip", "Ann/list.txt"]


@pytest.mark.parametrize(
    ("identity_from", "identities"),
    [
        (None, ["Ann", "Ann", "other", None]),
        ("parent", ["Ann", "trips", "Ann", "people"]),
        ("none", [None, None, None, None]),
    ],
)
@pytest.mark.parametrize("name", ["people.tar", "people.tar.gz", "people.zip"])
def test_a_member_is_whose_its_first_folder_is_or_as_is_said(
    name: str, identity_from: str | None, identities: list[str | None], tmp_path: Path
) -> None:
    """The archive of a folder holds that folder, which is no person if it is called as the archive."""
    names = ["people/Ann/1.jpg", "people/Ann/trips/2.jpg", "other/Ann/3.jpg", "people/z.jpg"]
    path = shard(tmp_path / name, *names)
    listed = {photo.path: photo.identity for photo in scan([path], identity_from=identity_from)}
    assert listed == {f"{path}/{inner}": who for inner, who in zip(names, identities, strict=True)}


def test_the_beginning_of_a_damaged_archive_comes_before_its_damage_and_the_next_source(
    tmp_path: Path,
) -> None:
    path = shard(tmp_path / "a.tar", "Ann/1.jpg", "Ann/2.jpg")
    path.write_bytes(path.read_bytes()[:1536])
    fill(tmp_path, "b.jpg")
    first, damage, second = scan([path, tmp_path / "b.jpg"])
    assert first == Photo(f"{path}/Ann/1.jpg", "Ann", content=b"x")
    assert (damage.path, damage.problem) == (str(path), Reason.DAMAGED)
    assert (damage.detail or "").startswith("the archive is damaged after 1 files: ")
    assert second.path == str(tmp_path / "b.jpg")


def test_a_name_in_an_archive_that_is_not_utf8_is_a_problem(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", "Ann/caf\udce9.jpg")
    (photo,) = scan([path])
    assert (photo.problem, photo.content) == (Reason.NAME_NOT_UTF8, None)


def test_a_special_file_is_no_archive_and_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.zip")
    (tmp_path / "zeros.tar").symlink_to("/dev/zero")
    assert list(scan([tmp_path / "p.zip", tmp_path / "zeros.tar"])) == [
        Photo(f"{tmp_path}/p.zip", None),
        Photo(f"{tmp_path}/zeros.tar", None),
    ]


def test_a_list_that_breaks_off_ends_with_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "l.parquet"
    table = pa.table({"path": [f"{number:0200d}.jpg" for number in range(20_000)]})
    pq.write_table(table, path, row_group_size=5000, compression="none", use_dictionary=False)
    data = bytearray(path.read_bytes())
    place = data.index(b"%0200d" % 15_000)
    data[place - 300_000 : place] = bytes(300_000)
    path.write_bytes(data)
    *before, damage = scan([path])
    assert len(before) >= 4096
    assert (damage.path, damage.problem) == (str(path), Reason.DAMAGED)


def typed(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize(("identity_from", "identity"), [(None, "Ann"), ("parent", "Ann"), ("none", None)])
def test_paths_on_standard_input_begin_here_and_are_whose_their_folder_is(
    identity_from: str | None, identity: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed(monkeypatch, b"people/Ann/1.jpg\n./people/../Ann/2.jpg\nAnn/\xff.jpg\n")
    assert list(scan(["-"], identity_from=identity_from)) == [
        Photo(f"{tmp_path}/people/Ann/1.jpg", identity),
        Photo(f"{tmp_path}/Ann/2.jpg", identity),
        Photo(f"{tmp_path}/Ann/\udcff.jpg", identity, Reason.NAME_NOT_UTF8),
    ]


def test_another_place_for_identities_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the sources has columns, so not from 'top'"):
        scan([tmp_path], identity_from="top")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("memory://x/list.csv", "A list must be on this machine"),
        ("memory://x/", "is no file; name the files in a list"),
        ("gopherx://x/1.jpg", "no way to read gopherx://"),
    ],
)
def test_addresses_that_cannot_be_read_are_refused_before_the_first_photo(source: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        scan([source])


def test_an_address_of_an_archive_is_read_as_one(tmp_path: Path) -> None:
    for name in ("remote.tar", "remote.zip"):
        data = shard(tmp_path / name, "Ann/1.jpg").read_bytes()
        fsspec.filesystem("memory").pipe(f"/x/{name}", data)
        assert list(scan([f"memory://x/{name}"])) == [
            Photo(f"memory://x/{name}/Ann/1.jpg", "Ann", content=b"x")
        ]
    (missing,) = scan(["memory://x/gone.tar"])
    assert (missing.path, missing.problem) == ("memory://x/gone.tar", Reason.MISSING)


def test_an_address_in_a_list_that_nobody_can_read_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("gopherx://host/Ann/1.jpg\nmemory://x/Ann/2.jpg\n")
    first, second = scan([tmp_path / "l.txt"])
    assert (first.identity, first.problem) == ("Ann", Reason.UNSUPPORTED_FORMAT)
    assert second == Photo("memory://x/Ann/2.jpg", "Ann")


def test_a_file_address_is_a_path(tmp_path: Path) -> None:
    fill(tmp_path, "Ann/a b.jpg")
    assert list(scan([f"file://{tmp_path}/Ann/a%20b.jpg"])) == [Photo(f"{tmp_path}/Ann/a b.jpg", None)]


def test_a_count_is_not_known_without_reading_what_can_be_read_once(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("1.jpg\n2.jpg\n")
    os.mkfifo(tmp_path / "p.tar")
    assert count([tmp_path / "l.txt"]) == 2
    assert count(["-"]) is count([tmp_path / "l.txt", tmp_path / "p.tar"]) is None
    with pytest.raises(DataError):
        count(["-", tmp_path / "gone"])


# What a program has


def test_what_a_program_has_becomes_photos_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image, array = Image.new("RGB", (2, 2)), np.zeros((2, 2), np.uint8)
    given_photo = Photo("/x.jpg", "Ann", metadata={"a": 1})
    offered = iter(
        [("1.jpg", "Ann"), Path("2.jpg"), (b"3", None), (image, "Bo"), (array, None), given_photo, 7]
    )
    photos = of(offered)  # type: ignore[arg-type]
    assert [next(photos) for _ in range(4)] == [
        Photo(f"{tmp_path}/1.jpg", "Ann"),
        Photo(f"{tmp_path}/2.jpg", None),
        Photo(None, None, content=b"3"),
        Photo(None, "Bo", content=image),
    ]
    assert next(photos).content is array
    assert next(photos) is given_photo
    with pytest.raises(InputError, match=r"^A value of the type int was offered as a photo"):
        next(photos)


def test_content_is_read_from_files_members_and_addresses(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.zip", "Ann/1.jpg", content=b"member")
    (tmp_path / "1.jpg").write_bytes(b"file")
    fsspec.filesystem("memory").pipe("/x/1.jpg", b"address")
    places = [str(tmp_path / "1.jpg"), f"{path}/Ann/1.jpg", "memory://x/1.jpg"]
    assert [read_content(place) for place in places] == [b"file", b"member", b"address"]
    for place in (f"{tmp_path}/2.jpg", f"{path}/Ann/2.jpg", f"{tmp_path}/1.jpg/2.jpg", "memory://x/2.jpg"):
        with pytest.raises(UnreadableImage) as caught:
            read_content(place)
        assert caught.value.reason is Reason.MISSING


def test_a_hidden_or_special_file_that_is_asked_for_is_not_passed_over(tmp_path: Path) -> None:
    """It is the reader's to reject it, without opening it."""
    os.mkfifo(tmp_path / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{tmp_path}/s.jpg")
        for name in ("pipe.jpg", "s.jpg"):
            (photo,) = scan([tmp_path / name])
            with pytest.raises(UnreadableImage) as caught:
                read_content(photo.path or "")
            assert caught.value.reason is Reason.NOT_A_FILE


@pytest.mark.timeout(20)
def test_rows_that_name_a_pipe_as_an_address_are_rejected_as_the_pipe_is(tmp_path: Path) -> None:
    """Reading one would wait for a writer that never comes."""
    os.mkfifo(tmp_path / "pipe.jpg")
    named = [f"{scheme}{tmp_path}/pipe.jpg" for scheme in ("", "file://", "local://", "LOCAL://")]
    (tmp_path / "list.txt").write_text("\n".join(named))
    assert [photo.path for photo in scan([tmp_path / "list.txt"])] == [f"{tmp_path}/pipe.jpg"] * 4
    for name in named:
        with pytest.raises(UnreadableImage, match="not-a-file"):
            read_content(absolute(name))


@pytest.mark.parametrize("inner", ["local:///pipe", "file:///pipe", "/pipe", "http://x/y"])
@pytest.mark.parametrize("outer", ["zip://a.jpg", "simplecache://x", "filecache://"])
def test_addresses_inside_one_another_are_not_read(outer: str, inner: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(f"{outer}::{inner}\n")
    (photo,) = scan([tmp_path / "list.txt"])
    assert photo.problem is Reason.UNSUPPORTED_FORMAT
    with pytest.raises(UnreadableImage, match="inside another"):
        read_content(f"{outer}::{inner}")
    with pytest.raises(DataError, match="inside another"):
        scan([f"{outer}::{inner}"])


def test_an_address_with_an_ipv6_host_is_none_inside_another(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("http://[::1]:8000/1.jpg\n")
    assert [photo.problem for photo in scan([tmp_path / "list.txt"])] == [None]


def test_a_report_may_come_through_a_pipe_and_not_from_a_device() -> None:
    with pytest.raises(DataError, match="cannot be read: it is a device, not a file"):
        from_report("/dev/zero")
    reading, writing = os.pipe()
    with open(reading, "rb"), open(writing, "wb") as end:
        end.write(b'{"status": "rejected", "path": "/a.jpg", "identity": null, "reason": "empty-file"}\n')
        end.close()
        assert [photo.path for photo in from_report(f"/dev/fd/{reading}")] == ["/a.jpg"]
