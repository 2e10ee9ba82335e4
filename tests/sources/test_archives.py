"""Archives: every file of them is accounted for, and none of them does harm."""

import bz2
import gzip
import io
import lzma
import os
import stat
import tarfile
import tempfile
import threading
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from retrieval.errors import Reason, UnreadableImage
from retrieval.sources import archives
from retrieval.sources.archives import Member, Shelf
from retrieval.system.archive_paths import inside, kind, split, stem

Files = list[tuple[str, bytes]]

FILES: Files = [("Zoë/2.jpg", b"two"), ("Ann/1.jpg", b"one" * 1000), ("loose.jpg", b"three")]


def tar_of(files: Files, mode: str = "w") -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files:
            add(tar, name, content)
    return held.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", **attributes: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for attribute, value in attributes.items():
        setattr(info, attribute, value)
    tar.addfile(info, io.BytesIO(content))


def zip_of(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", method) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return held.getvalue()


def members(data: bytes, name: str = "a.tar") -> list[Member]:
    return list(archives.members(name, lambda: io.BytesIO(data)))


def whole(files: Files) -> list[Member]:
    return [Member(name, content) for name, content in files]


# What is one


@pytest.mark.parametrize(
    ("name", "is_a", "called"),
    [
        ("/x/photos.tar", "tar", "photos"),
        ("photos.TAR.GZ", "tar", "photos"),
        ("a.b.tgz", "tar", "a.b"),
        ("a.tar.bz2", "tar", "a"),
        ("a.txz", "tar", "a"),
        ("https://host/a.tar.xz", "tar", "a"),
        ("people.Zip", "zip", "people"),
        ("photo.gz", None, "photo.gz"),
        ("tar", None, "tar"),
        ("zip", None, "zip"),
    ],
)
def test_the_name_says_what_is_an_archive(name: str, is_a: str | None, called: str) -> None:
    assert (kind(name), stem(name)) == (is_a, called)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("a/b.jpg", "a/b.jpg"),
        ("./a/./b.jpg", "a/b.jpg"),
        ("/etc/passwd", "etc/passwd"),
        ("../../etc/passwd", "etc/passwd"),
        ("a/../../b", "b"),
        ("//x", "x"),
        (".", ""),
        ("", ""),
    ],
)
def test_a_member_never_lies_above_its_archive(name: str, path: str) -> None:
    assert inside(name) == path


# tar


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_gives_its_files_in_its_order_however_it_is_compressed(mode: str) -> None:
    assert members(tar_of(FILES, mode), "misnamed.tar") == whole(FILES)


def test_a_tar_is_read_from_a_pipe_member_by_member(tmp_path: Path) -> None:
    """The first comes out before the second has been written."""
    os.mkfifo(tmp_path / "p.tar")
    data = tar_of([("1.jpg", b"1" * 20_000), ("2.jpg", b"2" * 20_000)])
    gate = threading.Event()

    def write() -> None:
        with open(tmp_path / "p.tar", "wb", buffering=0) as pipe:
            pipe.write(data[:30_720])
            gate.wait(60)
            pipe.write(data[30_720:])

    writer = threading.Thread(target=write)
    writer.start()
    found = archives.members("p.tar", partial((tmp_path / "p.tar").open, "rb"))
    assert next(found).name == "1.jpg"
    gate.set()
    assert [member.name for member in found] == ["2.jpg"]
    writer.join()


def test_tars_put_one_behind_the_other_are_read_to_the_end() -> None:
    """So are compressed ones, whose streams are then several too."""
    more = [("Bea/9.jpg", b"nine")]
    assert members(tar_of(FILES) + tar_of(more)) == whole(FILES + more)
    assert members(gzip.compress(tar_of(FILES)) + gzip.compress(tar_of(more))) == whole(FILES + more)


def test_litter_and_folders_are_passed_over() -> None:
    names = ["Ann/._1.jpg", ".hidden/1.jpg", "__MACOSX/Ann/1.jpg", "Ann/Thumbs.db", "./Ann/1.jpg"]
    assert members(tar_of([(name, b"x") for name in names])) == [Member("Ann/1.jpg", b"x")]
    assert members(zip_of([("Ann/", b""), *((name, b"x") for name in names)]), "a.zip") == [
        Member("Ann/1.jpg", b"x")
    ]


def test_links_devices_and_names_that_lead_out_do_no_harm(tmp_path: Path) -> None:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        add(tar, "Ann", type=tarfile.DIRTYPE)
        add(tar, "Ann/link.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "Ann/hard.jpg", type=tarfile.LNKTYPE, linkname="../../etc/passwd")
        add(tar, "Ann/pipe.jpg", type=tarfile.FIFOTYPE)
        add(tar, "Ann/null.jpg", type=tarfile.CHRTYPE)
        add(tar, "../../Bea/up.jpg", b"up")
        add(tar, "/tmp/root.jpg", b"root")
    link = "it is a link inside an archive, and only the file itself is taken"
    special = "it is not a regular file"
    assert members(held.getvalue()) == [
        Member("Ann/link.jpg", None, Reason.NOT_A_FILE, link),
        Member("Ann/hard.jpg", None, Reason.NOT_A_FILE, link),
        Member("Ann/pipe.jpg", None, Reason.NOT_A_FILE, special),
        Member("Ann/null.jpg", None, Reason.NOT_A_FILE, special),
        Member("Bea/up.jpg", b"up"),
        Member("tmp/root.jpg", b"root"),
    ]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_cut_tar_gives_what_lies_before_the_cut_and_one_line_of_damage(data: st.DataObject) -> None:
    """Wherever it is cut, also where tarfile itself would say nothing."""
    complete = tar_of(FILES)
    with tarfile.open(fileobj=io.BytesIO(complete)) as tar:
        ends = [info.offset_data + info.size for info in tar.getmembers()]
    # The end mark is two blocks of zeros; one is enough to know that nothing is missing.
    last = -(-ends[-1] // 512) * 512
    cut = data.draw(st.integers(0, last) | st.sampled_from([-(-end // 512) * 512 for end in [0, *ends]]))
    *before, damage = members(complete[:cut])
    assert before == whole(FILES)[: sum(end <= cut for end in ends)]
    assert (damage.name, damage.content, damage.problem) == ("", None, Reason.DAMAGED)
    assert f"damaged after {len(before)} files" in (damage.detail or "")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([gzip.compress, bz2.compress, lzma.compress]))
def test_a_cut_compressed_tar_ends_with_a_line_of_damage(
    place: int, compress: Callable[[bytes], bytes]
) -> None:
    complete = compress(tar_of(FILES))
    *before, damage = members(complete[: place % len(complete)])
    assert before == whole(FILES)[: len(before)]
    assert damage.problem is Reason.DAMAGED


@settings(max_examples=200, deadline=None)
@example(place=155, flip=1)
@given(st.integers(0, 4095), st.integers(1, 255))
def test_a_flipped_byte_of_a_tar_never_raises_and_never_goes_on_as_if_nothing_were(
    place: int, flip: int
) -> None:
    """Of a header, which has a checksum; contents have none."""
    before = tar_of([(f"{n}.jpg", bytes([n]) * 512) for n in range(1, 5)])
    data = bytearray(before)
    data[place] ^= flip
    found = members(bytes(data))
    in_content = place % 1024 >= 512
    # The checksum itself can be spelled in more than one way: then all is as it was.
    same_checksum = 148 <= place % 1024 < 156 and found == members(before)
    assert in_content or same_checksum or found[-1].problem is Reason.DAMAGED
    assert len(found) == (4 if in_content or same_checksum else place // 1024 + 1)


@pytest.mark.parametrize("data", [b"", b"not a tar at all", b"\x1f\x8bnonsense", bytes(range(256)) * 40])
def test_what_is_no_archive_is_one_line_of_damage(data: bytes) -> None:
    for name in ("a.tar", "a.tar.gz", "a.zip"):
        (line,) = members(data, name)
        assert (line.name, line.problem) == ("", Reason.DAMAGED)


def test_an_archive_that_cannot_be_opened_is_a_line() -> None:
    def barred() -> BinaryIO:
        raise PermissionError(13, "Permission denied")

    def refused() -> BinaryIO:
        raise UnreadableImage(Reason.UNREACHABLE, "its server could not be asked: no")

    assert [one.problem for one in archives.members("a.tar", barred)] == [Reason.NO_PERMISSION]
    assert [one.problem for one in archives.members("a.zip", refused)] == [Reason.UNREACHABLE]


def test_headers_that_claim_hostile_sizes_are_damage() -> None:
    """A long name of gigabytes would otherwise be read into memory, and a negative size leads in circles."""
    for kind_of_header, size in ((tarfile.GNUTYPE_LONGNAME, 2**33), (tarfile.XHDTYPE, 2**33), (b"0", -512)):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind_of_header, size
        data = info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)
        (line,) = members(data)
        assert (line.problem, "hostile size" in (line.detail or "")) == (Reason.DAMAGED, True)
        with tempfile.TemporaryDirectory() as folder, Shelf() as shelf:
            (Path(folder) / "a.tar").write_bytes(data)
            assert shelf.has(f"{folder}/a.tar", "anything")


def test_memory_holds_one_member_and_not_the_archive() -> None:
    files = [(f"{number}.jpg", bytes(2**20)) for number in range(40)]
    data = tar_of(files)
    tracemalloc.start()
    try:
        for member in archives.members("a.tar", lambda: io.BytesIO(data)):
            assert len(member.content or b"") == 2**20
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20 + len(data) // 100
    finally:
        tracemalloc.stop()


# zip


def test_a_zip_gives_its_files_by_name() -> None:
    assert members(zip_of(FILES), "a.zip") == whole(sorted(FILES))


def test_names_of_a_zip_are_utf8_also_where_it_does_not_say_so() -> None:
    data = zip_of([("Zo/1.jpg", b"x")]).replace(b"Zo/1.jpg", b"\xc3\xab/1.jpg")
    assert len(data) == len(zip_of([("\u00eb/1.jpg", b"x")]))
    assert members(data, "a.zip") == [Member("ë/1.jpg", b"x")]
    assert members(data.replace(b"\xc3\xab/", b"\x89\xff/"), "a.zip")[0].content == b"x"


def test_an_encrypted_and_an_unknown_member_are_lines_and_the_others_are_taken() -> None:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name in ("1.jpg", "2.jpg", "3.jpg", "4.jpg", "5.jpg"):
            archive.writestr(name, b"content of " + name.encode())
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/passwd")
    data = bytearray(held.getvalue())

    def entries(magic: bytes, number: int) -> int:
        place = -1
        for _ in range(number):
            place = data.index(magic, place + 1)
        return place

    for magic, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[entries(magic, 2) + flags] |= 1  # encrypted
        data[entries(magic, 3) + flags + 2] = 99  # a method that nobody knows
    data[data.index(b"content of 4")] ^= 1  # another checksum
    found = members(bytes(data), "a.zip")
    assert [(one.name, one.problem) for one in found] == [
        ("1.jpg", None),
        ("2.jpg", Reason.UNSUPPORTED_FORMAT),
        ("3.jpg", Reason.UNSUPPORTED_FORMAT),
        ("4.jpg", Reason.DAMAGED),
        ("5.jpg", None),
        ("link.jpg", Reason.NOT_A_FILE),
    ]
    assert found[1].detail == "it is encrypted; unpack the archive first"


def test_a_bomb_is_refused_by_what_it_claims_and_cut_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 1000)
    honest = zip_of([("bomb.jpg", bytes(10**7)), ("ok.jpg", b"x" * 1000)])
    assert [(one.name, one.problem) for one in members(honest, "a.zip")] == [
        ("bomb.jpg", Reason.TOO_MANY_BYTES),
        ("ok.jpg", None),
    ]
    lying = honest.replace((10**7).to_bytes(4, "little"), (999).to_bytes(4, "little"))
    tracemalloc.start()
    try:
        assert members(lying, "a.zip")[0].problem is Reason.DAMAGED
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert [one.problem for one in members(tar_of([("b.jpg", bytes(1001)), ("o.jpg", b"x")]))] == [
        Reason.TOO_MANY_BYTES,
        None,
    ]


# By path


def test_a_path_leads_into_an_archive_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.zip").touch()
    (tmp_path / "b.zip").mkdir()
    (tmp_path / "c.jpg").touch()
    assert split(f"{tmp_path}/a.zip/Ann/1.jpg") == (f"{tmp_path}/a.zip", "Ann/1.jpg")
    for path in ("b.zip/1.jpg", "c.jpg/1.jpg", "gone.tar/1.jpg", "a.zip"):
        assert split(f"{tmp_path}/{path}") is None


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz", "zip"])
def test_members_are_found_again_by_their_names_in_any_order(suffix: str, tmp_path: Path) -> None:
    files = [*FILES, ("./Bea/../Cleo/4.jpg", b"four"), ("Ann/1.jpg", b"the newer one")]
    path = str(tmp_path / f"a.{suffix}")
    mode = {"tar": "w", "tar.gz": "w:gz", "tar.xz": "w:xz"}.get(suffix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile warns of a name that is there twice
        data = tar_of(files, mode) if mode else zip_of(files)
    Path(path).write_bytes(data)
    with Shelf() as shelf:
        for _ in range(2):
            assert shelf.read(path, "loose.jpg") == b"three"
            assert shelf.read(path, "Ann/1.jpg") == b"the newer one"
            assert shelf.read(path, "Zoë/2.jpg") == b"two"
            assert shelf.read(path, "Cleo/4.jpg") == b"four"
        assert (shelf.has(path, "Zoë/2.jpg"), shelf.has(path, "Zoë/3.jpg")) == (True, False)
        with pytest.raises(UnreadableImage) as caught:
            shelf.read(path, "Zoë/3.jpg")
        assert caught.value.reason is Reason.MISSING


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "zip"])
def test_nothing_is_missing_from_an_archive_that_cannot_be_read_to_its_end(
    suffix: str, tmp_path: Path
) -> None:
    """At every place where it may be cut."""
    data = {"tar": tar_of(FILES), "tar.gz": tar_of(FILES, "w:gz"), "zip": zip_of(FILES)}[suffix]
    path = tmp_path / f"a.{suffix}"
    end = 512 * 12 if suffix == "tar" else len(data)
    for cut in [*range(0, end, 97), *range(0, end, 512)]:
        path.write_bytes(data[:cut])
        with Shelf() as shelf:
            assert shelf.has(str(path), "never.jpg"), cut
    path.write_bytes(data)
    with Shelf() as shelf:
        assert not shelf.has(str(path), "never.jpg")


# Archives that unpack to much more than they are


@pytest.mark.timeout(60)
@pytest.mark.parametrize("packed", [bz2.compress, gzip.compress, lzma.compress])
def test_a_tar_of_nothing_but_zeros_is_damaged_once_16_mib_of_them_are_read(
    packed: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(packed(tar_of([("Ada/1.jpg", b"a photo")]) + bytes(48 * 2**20)))
    (photo, damage) = archives.members(str(path), lambda: archives.on_disk(str(path)))
    assert photo.content == b"a photo"
    assert damage.detail == "the archive is damaged after 1 files: it has more than 16,777,216 zeros in a row"
    with archives.Shelf() as shelf, pytest.raises(UnreadableImage, match="zeros in a row"):
        shelf.read(str(path), "Ada/1.jpg")


@pytest.mark.parametrize("suffix", [".tar.bz2", ".tar.gz", ".zip"])
def test_an_archive_that_unpacks_to_far_more_than_its_bytes_is_damaged(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_UNPACKED_ALLOWANCE_BYTES", 2**20)
    path = tmp_path / f"a{suffix}"
    files = [("Ada/1.jpg", b"a photo"), ("Ada/2.jpg", bytes(2**19)), ("Ada/3.jpg", bytes(32 * 2**20))]
    packed = {
        ".zip": zip_of,
        ".tar.gz": partial(tar_of, mode="w:gz"),
        ".tar.bz2": partial(tar_of, mode="w:bz2"),
    }
    path.write_bytes(packed[suffix](files))
    *photos, damage = archives.members(str(path), lambda: archives.on_disk(str(path)))
    assert [photo.content for photo in photos] == [content for _, content in files[:2]]
    assert damage.problem is Reason.DAMAGED
    assert damage.detail is not None
    assert "it unpacks to more than 200 times its own bytes" in damage.detail
