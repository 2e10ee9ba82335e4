"""Sources other than folders, from end to end: enrolled, known again, missed, embedded again."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from retrieval.bulk.ingest import ingest, ingest_photos
from retrieval.database.records import Face
from retrieval.embedding.outcome import Outcome, Status
from retrieval.errors import InputError, Reason
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from retrieval.search.nearest import vector_of
from retrieval.sources.photos import Photo, from_report, of
from tests.cli.test_app import Faceprint, faceprint

__all__ = ["faceprint"]  # pytest finds the fixture by its name

SUFFIXES = ["tar", "tar.gz", "zip"]


def pack(path: Path, folder: Path, *, leave_out: Iterable[str] = ()) -> Path:
    """An archive of the photos of identity folders, names below the folder."""
    files = [file for file in sorted(folder.glob("*/*.jpg")) if file.name not in leave_out]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, file.relative_to(folder))
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for file in files:
            tar.add(file, file.relative_to(folder))
    return path


def faces_of(gallery: Gallery) -> list[Face]:
    with gallery.vault.store.read() as reader:
        return list(reader.faces(range(1, reader.gallery().next_face_id)).values())


# Enrolling


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_archive_of_a_folder_gives_the_faces_of_the_folder(
    suffix: str, gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    """A second run knows them all, and the folder itself then only adds paths."""
    path = pack(tmp_path / f"people.{suffix}", faces)
    assert ingest(gallery, [path], batch_size=7).enrolled == 36
    assert {(face.path, face.identity) for face in faces_of(gallery)} == {
        (f"{path}/{photo.relative_to(faces)}", photo.parent.name) for photo in faces.glob("*/*.jpg")
    }
    assert ingest(gallery, [path]).known == 36
    assert ingest(gallery, [faces]).duplicate == 36


def test_bad_members_are_lines_and_the_others_are_faces(
    gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    photo = sorted(faces.glob("*/*.jpg"))[0]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [("A/empty.jpg", b""), ("A/text.jpg", b"text"), ("A/1.jpg", photo.read_bytes())]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("A/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "1.jpg"
        tar.addfile(link)
    cut = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(cut[: cut.rindex(b"A/link.jpg") + 512])
    outcomes: list[Outcome] = []
    report = ingest(gallery, [tmp_path / "a.tar"], on_outcome=outcomes.append)
    assert [(os.path.basename(one.path or ""), one.reason) for one in outcomes] == [
        ("empty.jpg", Reason.EMPTY_FILE),
        ("text.jpg", Reason.NOT_AN_IMAGE),
        ("1.jpg", None),
        ("link.jpg", Reason.NOT_A_FILE),
        ("a.tar", Reason.DAMAGED),
    ]
    assert (report.found, report.enrolled, report.rejected) == (5, 1, 4)


def test_a_shard_gives_identities_and_metadata(gallery: Gallery, faces: Path, tmp_path: Path) -> None:
    photos = sorted(faces.glob("*/*.jpg"))[:3]
    with tarfile.open(tmp_path / "000.tar", "w") as tar:
        for number, photo in enumerate(photos):
            said = json.dumps({"identity": f"P{number}", "year": 2020 + number}).encode()
            for suffix, data in (("jpg", photo.read_bytes()), ("json", said)):
                info = tarfile.TarInfo(f"{number:06}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    report = ingest(gallery, [tmp_path / "000.tar"])
    assert (report.found, report.enrolled) == (3, 3)
    assert [(face.identity, face.metadata) for face in faces_of(gallery)] == [
        ("P0", {"year": 2020}),
        ("P1", {"year": 2021}),
        ("P2", {"year": 2022}),
    ]


def test_a_list_gives_identities_and_metadata_and_fills_in_those_of_known_faces(
    gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    first, second = sorted(faces.glob("*/*.jpg"))[:2]
    gallery.enroll([(first, "Kim")])
    gallery.annotate(faces={1: {"year": 1}})
    (tmp_path / "l.csv").write_text(f"path,identity,year,camera\n{first},Kim,2,n\n{second},Kim,3,\n")
    report = ingest(gallery, [tmp_path / "l.csv"])
    assert (report.known, report.enrolled) == (1, 1)
    assert [face.metadata for face in faces_of(gallery)] == [{"year": 1, "camera": "n"}, {"year": 3}]


def test_more_metadata_than_a_face_may_have_are_a_line_and_no_abort(
    gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    first, second = sorted(faces.glob("*/*.jpg"))[:2]
    gallery.enroll([(first, "Kim")])
    gallery.annotate(faces={1: {"a": "x" * 40_000}})
    (tmp_path / "l.csv").write_text(f"path,identity,b\n{first},Kim,{'y' * 40_000}\n{second},Kim,1\n")
    outcomes: list[Outcome] = []
    ingest(gallery, [tmp_path / "l.csv"], on_outcome=outcomes.append)
    assert [one.reason for one in outcomes] == [Reason.BAD_METADATA, None]
    assert [sorted(face.metadata) for face in faces_of(gallery)] == [["a"], ["b"]]


def test_addresses_are_read_enrolled_and_forgotten_like_paths(gallery: Gallery, faces: Path) -> None:
    memory, photos = fsspec.filesystem("memory"), sorted(faces.glob("*/*.jpg"))[:2]
    for number, photo in enumerate(photos):
        memory.pipe(f"/people/Ann/{number}.jpg", photo.read_bytes())
    urls = [f"memory://people/Ann/{number}.jpg" for number in range(3)]
    outcomes: list[Outcome] = []
    report = ingest(gallery, urls, on_outcome=outcomes.append)
    assert (report.enrolled, report.worth_retrying) == (2, 1)
    assert [(one.path, one.reason) for one in outcomes] == [
        (urls[0], None),
        (urls[1], None),
        (urls[2], Reason.MISSING),
    ]
    assert ingest(gallery, urls[:2]).known == 2
    assert gallery.annotate(paths={urls[0]: {"a": 1}}).faces == 1
    gallery.forget(path=urls[0])
    assert [face.path for face in faces_of(gallery)] == [urls[1]]


def test_what_a_program_has_is_enrolled_in_bulk(gallery: Gallery, faces: Path) -> None:
    photos = sorted(faces.glob("*/*.jpg"))
    with Image.open(photos[2]) as image:
        image.load()
    array = np.asarray(image).copy()
    array[0, 0] ^= 1
    offered = [
        (photos[0], "Ann"),
        (photos[1].read_bytes(), "Ann"),
        (image, "Bo"),
        (array, None),
        (b"no", "Bo"),
    ]
    report = ingest_photos(gallery, of(offered), batch_size=2)
    assert (report.found, report.enrolled, report.reasons) == (5, 4, {Reason.NOT_AN_IMAGE: 1})
    assert [(face.identity, face.path) for face in faces_of(gallery)] == [
        ("Ann", str(photos[0])),
        ("Ann", None),
        ("Bo", None),
        (None, None),
    ]


def test_enroll_takes_photos_as_well_as_pairs(gallery: Gallery, faces: Path) -> None:
    first, second = sorted(faces.glob("*/*.jpg"))[:2]
    found = [
        Photo("/a.zip/1.jpg", "Ann", metadata={"a": 1}, content=first.read_bytes()),
        Photo("/a.zip/2.jpg", "Ann", Reason.NOT_A_FILE, detail="it is a link"),
        (second, "Ann"),
        Photo(None, "Ann"),
    ]
    outcomes = gallery.enroll(found)
    assert [(one.path, one.status, one.reason) for one in outcomes] == [
        ("/a.zip/1.jpg", Status.ENROLLED, None),
        ("/a.zip/2.jpg", Status.REJECTED, Reason.NOT_A_FILE),
        (str(second), Status.ENROLLED, None),
        (None, Status.REJECTED, Reason.MISSING),
    ]
    assert [face.metadata for face in faces_of(gallery)] == [{"a": 1}, {}]


def test_bytes_may_be_known_by_a_place_and_only_by_an_absolute_one(gallery: Gallery, faces: Path) -> None:
    content = sorted(faces.glob("*/*.jpg"))[0].read_bytes()
    with pytest.raises(InputError, match=r"^The path 'a\.jpg' cannot be stored: it must be absolute\.$"):
        gallery.prepare(content, None, path="a.jpg")
    with pytest.raises(InputError, match="JSON does not know"):
        gallery.prepare(content, None, metadata={"a": {1, 2}})
    prepared = gallery.prepare(content, "Ann", path="https://host/a.jpg", metadata={"a": 1})
    gallery.enroll_prepared([prepared])
    (face,) = faces_of(gallery)
    assert (face.path, face.metadata) == ("https://host/a.jpg", {"a": 1})


def test_a_member_that_was_forgotten_between_reading_and_adding_is_enrolled(
    gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    photo = sorted(faces.glob("*/*.jpg"))[0]
    gallery.enroll([(photo, None)])
    prepared = gallery.prepare(photo.read_bytes(), "Kim", path="/gone.tar/1.jpg", metadata={"a": 1})
    gallery.forget(face_id=1)
    assert gallery.enroll_prepared([prepared]) == [Outcome("/gone.tar/1.jpg", "Kim", Status.ENROLLED, 2)]
    assert [face.metadata for face in faces_of(gallery)] == [{"a": 1}]


# Missing, lost, tried again


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_only_members_that_an_archive_does_not_have_are_missing(
    suffix: str, gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    """Whether the archive is the source or lies in one; a damaged one shows nothing."""
    (tmp_path / "in").mkdir()
    path, gone = tmp_path / "in" / f"a.{suffix}", sorted(faces.glob("*/*.jpg"))[5].name
    ingest(gallery, [pack(path, faces)])
    whole = path.read_bytes()
    for source in (path, tmp_path / "in"):
        path.write_bytes(whole)
        assert gallery.missing_files([source]).paths == ()
        pack(path, faces, leave_out=[gone])
        assert [os.path.basename(name) for name in gallery.missing_files([source]).paths] == [gone]
        path.write_bytes(path.read_bytes()[: len(whole) // 2])
        assert gallery.missing_files([source]).paths == ()
    path.unlink()
    shutil.copy(sorted(faces.glob("*/*.jpg"))[0], tmp_path / "in")
    assert len(gallery.missing_files([tmp_path / "in"]).paths) == 36


def test_a_file_in_place_of_a_folder_is_no_archive_and_the_photos_are_gone(
    gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    photo = sorted(faces.glob("*/*.jpg"))[0]
    (tmp_path / "in" / "Ann").mkdir(parents=True)
    shutil.copy(photo, tmp_path / "in" / "Ann" / "1.jpg")
    ingest(gallery, [tmp_path / "in"])
    shutil.rmtree(tmp_path / "in" / "Ann")
    (tmp_path / "in" / "Ann").write_bytes(b"")
    assert len(gallery.missing_files([tmp_path / "in"]).paths) == 1


def test_sources_that_do_not_show_what_is_gone_are_refused(
    gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    ingest(gallery, [faces])
    (tmp_path / "l.txt").write_text(f"{sorted(faces.glob('*/*.jpg'))[0]}\n")
    os.mkfifo(tmp_path / "p.tar")
    for source in ("-", str(tmp_path / "l.txt"), "memory://x/1.jpg", str(tmp_path / "p.tar")):
        with pytest.raises(InputError, match="What is gone cannot be told from"):
            gallery.remove_missing([faces, source])
    assert gallery.info().faces == 36


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_lost_vectors_come_back_from_archives_and_addresses(
    suffix: str, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    path = pack(tmp_path / f"a.{suffix}", faces, leave_out=[])
    photo = sorted(faces.glob("*/*.jpg"))[0]
    fsspec.filesystem("memory").pipe("/lost/1.jpg", photo.read_bytes() + b"\0")
    with Gallery.create(tmp_path / "g", bundle) as gallery:
        ingest(gallery, [path, "memory://lost/1.jpg"])
        before = [vector_of(gallery.vault, number) for number in (1, 36, 37)]
        for segment in (tmp_path / "g" / "vectors").glob("*.faiss"):
            segment.unlink()
    with Gallery.open(tmp_path / "g") as gallery:
        mended = gallery.repair(fetch=True)
        assert mended.embedded == 37
    with Gallery.open(tmp_path / "g") as gallery:
        for number, vector in zip((1, 36, 37), before, strict=True):
            np.testing.assert_allclose(vector_of(gallery.vault, number), vector, rtol=1e-4, atol=1e-4)
        assert gallery.search(photo, 1).matches[0].distance < 1e-3


def test_a_report_leads_to_members_again_and_says_of_the_rest_why_not(
    gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    path = pack(tmp_path / "a.zip", faces)
    member = f"{path}/{sorted(faces.glob('*/*.jpg'))[3].relative_to(faces)}"
    lines = [
        (member, "io-error", None),
        (str(path), "damaged", "the archive is damaged"),
        (str(path), "not-an-image", "it is a zip archive"),
        ("/x/1.jpg", "bad-metadata", "the metadata of row 2 of l.csv are not JSON"),
        (None, "bad-row", "row 3 of l.csv has no path"),
        ("memory://gone/1.jpg", "unreachable", "no"),
    ]
    report = tmp_path / "report.jsonl"
    keys = ("path", "reason", "detail")
    said = [{**dict(zip(keys, line, strict=True)), "identity": "P", "status": "rejected"} for line in lines]
    report.write_text("".join(json.dumps(line) + "\n" for line in said))
    outcomes = gallery.enroll(from_report(report))
    assert [(one.path, one.status, one.reason) for one in outcomes] == [
        (member, Status.ENROLLED, None),
        (str(path), Status.REJECTED, Reason.DAMAGED),
        (str(path), Status.REJECTED, Reason.NOT_AN_IMAGE),
        ("/x/1.jpg", Status.REJECTED, Reason.BAD_METADATA),
        ("memory://gone/1.jpg", Status.REJECTED, Reason.MISSING),
    ]
    assert outcomes[1].detail == "the archive is damaged; name the archive itself as a source again"


# The command


def test_the_command_takes_paths_from_a_pipe_that_goes_on(
    bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    """The first batch is durable while the writer still holds the pipe open."""
    command = [sys.executable, "-m", "retrieval.cli.app", "ingest", str(tmp_path / "g"), "-"]
    photos = sorted(faces.glob("*/*.jpg"))
    with subprocess.Popen(
        [*command, "--model", str(bundle.folder), "--batch-size", "4", "--workers", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("".join(f"{photo}\n" for photo in photos[:30]))
        process.stdin.flush()
        while not _has_faces(tmp_path / "g", 4):
            assert process.poll() is None, "it ended while the pipe was open"
            time.sleep(0.1)
        process.stdin.write(f"{photos[30]}\n{photos[30]}x\n")
        process.stdin.close()
        out = process.stdout.read()
    assert "found 32 = enrolled 31 + already known 0 + duplicate 0 + rejected 1" in out
    assert process.returncode == 1  # a missing file may be there another time
    with Gallery.open(tmp_path / "g") as reader:
        assert {face.identity for face in faces_of(reader)} == {photo.parent.name for photo in photos[:31]}


def _has_faces(folder: Path, number: int) -> bool:
    if not folder.is_dir():
        return False
    with Gallery.open(folder, read_only=True) as reader:
        return reader.info().faces >= number


def test_the_command_takes_an_archive_whose_size_nobody_knows(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    path = pack(tmp_path / "a.tar.gz", faces)
    status, out, _ = faceprint("ingest", tmp_path / "g", path, "--model", bundle.folder)
    assert (status, "found 36 = enrolled 36" in out) == (0, True)
    status, out, _ = faceprint("ingest", tmp_path / "g", path, "--sync")
    assert (status, "0 files gone from the sources" in out) == (0, True)
    (answer,) = json.loads(faceprint("search", tmp_path / "g", next(faces.glob("*/*.jpg")), "--json")[1])
    assert answer["matches"][0]["path"].startswith(f"{path}/")


@pytest.mark.parametrize("name", ["empty.tar", "empty.zip", "empty.txt"])
def test_a_source_that_gives_nothing_is_a_mistake_and_makes_no_gallery(
    name: str, faceprint: Faceprint, bundle: ModelBundle, tmp_path: Path
) -> None:
    path = tmp_path / name
    if name == "empty.tar":
        tarfile.open(path, "w").close()
    elif name == "empty.zip":
        zipfile.ZipFile(path, "w").close()
    else:
        path.touch()
    status, _, err = faceprint("ingest", tmp_path / "g", path, "--model", bundle.folder)
    assert (status, err) == (2, f"faceprint: There are no photos in {path}; check the path.\n")
    assert not (tmp_path / "g").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-", "--sync"], "What is gone cannot be told from -"),
        (["x.csv"], "There is no file or folder"),
        (["-", "--identity-from", "top"], "so not from 'top'"),
        (
            ["--retry", "r.jsonl", "--identity-from", "none"],
            "--identity-from is of use only with SOURCE; add",
        ),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    arguments: list[str], words: str, faceprint: Faceprint, bundle: ModelBundle, tmp_path: Path
) -> None:
    status, _, err = faceprint("ingest", tmp_path / "g", *arguments, "--model", bundle.folder)
    assert status == 2
    assert err.startswith("faceprint: ")
    assert words in err
    assert err.count("\n") == 1
