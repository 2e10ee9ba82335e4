"""Names of people: names that nobody has, names that are alike, names that cannot be stored."""

import json
import multiprocessing
import pickle
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval import ingest
from retrieval.bulk.ingest import ingest_photos
from retrieval.database.identity_names import MAX_BYTES, folded, nearest, problem, twins
from retrieval.database.records import NewFace
from retrieval.errors import FaceprintError, InputError, Reason
from retrieval.gallery.gallery import Gallery
from retrieval.models.bundle import ModelBundle
from retrieval.models.embedder import Embedder
from retrieval.sources.photos import of, scan
from tests.cli.test_app import Faceprint, enrolled, faceprint

__all__ = ["enrolled", "faceprint"]

# Names that nobody has


@pytest.mark.parametrize(
    "arguments",
    [("--identity", "Ady"), ("--where", "identity=Ady"), ("--identity", "Adi", "--identity", "Ady")],
)
def test_searching_for_a_name_that_nobody_has_is_an_input_error_with_the_nearest_names(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    photos = sorted(faces.glob("*/*"))
    with Gallery.create(tmp_path / "g", bundle) as gallery:
        gallery.enroll([(photos[0], "Adi"), (photos[1], "Bo"), (photos[2], "Adina")])
    status, out, err = faceprint("search", tmp_path / "g", "--face", 1, *arguments)
    assert (status, out) == (2, "")
    assert err == f"faceprint: There is no identity Ady in {tmp_path / 'g'}; the nearest name is Adi.\n"
    status, _, err = faceprint("forget", tmp_path / "g", "--identity", "adina ")
    assert (status, err.endswith("; the nearest names are Adina, Adi.\n")) == (2, True)


def test_a_former_name_is_somebodys_and_may_be_searched_for(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    with Gallery.create(tmp_path / "g", bundle) as gallery:
        gallery.enroll([(photo, "Adi") for photo in sorted(faces.glob("*/*"))[:2]])
        gallery.rename_identity("Adi", "Ada")
    status, out, _ = faceprint("search", tmp_path / "g", "--face", 1, "--identity", "Adi", "--json")
    assert (status, [match["identity"] for match in json.loads(out)[0]["matches"]]) == (0, ["Ada"])


def test_the_nearest_names_are_found_whatever_their_case_and_accents() -> None:
    assert nearest("zoe\u0308", ["Zo\u00eb", "Bo", "ZOE"]) == ["Zo\u00eb", "ZOE"]
    assert nearest("somebody", ["Bo"]) == nearest("", []) == []


# Names that are alike


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Alex", "alex"),
        ("Zo\u00eb", "Zoe\u0308"),
        ("Ann Lee", "Ann  Lee"),
        ("Bo", "Bo "),
        ("Kim", "\uff2bim"),
        ("Stra\u00dfe", "STRASSE"),
        ("A", "A\u200b"),
    ],
)
def test_names_that_differ_in_what_a_typist_may_vary_are_twins(one: str, other: str) -> None:
    assert twins([one, "Nobody", other]) == twins([one, other], [one]) == (tuple(sorted((one, other))),)
    assert twins([one, other], ["Nobody"]) == twins([one, "Nobody"]) == ()


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=6))
def test_what_is_left_of_a_name_stays_and_is_that_of_its_variants(name: str) -> None:
    left = folded(name)
    assert folded(left) == folded(f" {name} ") == folded(unicodedata.normalize("NFD", name)) == left


def test_an_ingest_notes_the_twins_of_those_whom_it_enrolled_and_info_all(
    faceprint: Faceprint, bundle: ModelBundle, faces: Path, tmp_path: Path
) -> None:
    photos = sorted(faces.glob("*/*"))
    for name, photo in zip(["one/Alex", "one/Bo", "two/alex", "three/Cleo"], photos, strict=False):
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(photo, tmp_path / name)
    note = "note: Alex and alex are 2 identities; `faceprint merge-identities` joins two."
    printed = []
    for root in ("one", "two", "three"):
        arguments = ("ingest", tmp_path / "g", tmp_path / root, "--model", bundle.folder)
        printed.append(faceprint(*arguments, "--summary", tmp_path / "s.json")[1].splitlines())
        if root == "two":
            assert json.loads((tmp_path / "s.json").read_text())["twins"] == [["Alex", "alex"]]
    assert [note in lines for lines in printed] == [False, True, False]
    assert json.loads(faceprint("info", tmp_path / "g", "--json")[1])["twins"] == [["Alex", "alex"]]
    assert "Alex and alex are 2 identities" in faceprint("info", tmp_path / "g")[1]


# A gallery that is closed, or sent to another process


CALLS: list[Callable[[Gallery], object]] = [
    lambda g: g.search(np.zeros((40, 40, 3), np.uint8)),
    lambda g: g.search_by_vector(np.zeros(g.bundle.dimension)),
    lambda g: g.search_by_face(1),
    lambda g: g.search_people_by_face(1),
    lambda g: g.enroll([(np.zeros((40, 40, 3), np.uint8), "Ada")]),
    lambda g: g.forget("Ada"),
    lambda g: g.rename_identity("Ada", "Bo"),
    lambda g: g.info(),
    lambda g: g.verify(),
    lambda g: g.repair(),
    lambda g: g.compact(),
    lambda g: g.optimize(),
    lambda g: g.backup(g.folder.parent / "backup"),
    lambda g: g.audit_log(),
    lambda g: g.receipts(),
    lambda g: g.calibration(),
    lambda g: g.missing_files([]),
    lambda g: g.embedder,
    lambda g: pickle.dumps(g),
]


def test_every_call_of_a_closed_gallery_says_that_it_is_closed(bundle: ModelBundle, tmp_path: Path) -> None:
    gallery = Gallery.create(tmp_path / "g", bundle)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    assert gallery.enroll([(noise, "Ada")])[0].face_id == 1
    gallery.close()
    gallery.close()
    for call in CALLS:
        with pytest.raises(InputError, match=r"The gallery .*g is closed; open it again"):
            call(gallery)
    with Gallery.open(tmp_path / "g") as again:
        assert again.info().faces == 1


def _asked(gallery: Gallery) -> tuple[str | None, bool, str]:
    with gallery:
        return gallery.search_by_face(1)[0].face.identity, gallery.vault.read_only, gallery.vault.via


def test_a_pickled_gallery_is_opened_anew_as_it_was_in_another_process(
    bundle: ModelBundle, faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = sorted(faces.glob("*/*"))
    with Gallery.create("g", bundle) as made:
        made.enroll([(photo, "Ada") for photo in photos[:2]])
    with Gallery.open("g", read_only=True, via="night", device="cpu", engine="onnxruntime") as gallery:
        pickled = pickle.dumps(gallery)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert pool.apply(_asked, (gallery,)) == ("Ada", True, "night")
        monkeypatch.chdir("/")
        with pickle.loads(pickled) as again:
            assert (again._model.device, again._model.engine) == ("cpu", "onnxruntime")


def test_a_pickled_embedder_embeds_as_it_did(bundle: ModelBundle) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), np.uint8)
    with Embedder.open(bundle, device="cpu", threads=1) as embedder:
        again = pickle.loads(pickle.dumps(embedder))
        assert np.array_equal(again.embed(pixels).vectors, embedder.embed(pixels).vectors)
        again.close()


# Names that cannot be stored


BAD = [
    "A" * (MAX_BYTES + 1),
    "\u540d" * (MAX_BYTES // 3 + 1),
    "A\0",
    "A\nB",
    "A\x1b[2J",
    "A\x85",
    "\udcff",
    "",
    " ",
    "\u3000\u200b",
]


def test_a_name_may_have_so_many_bytes_and_any_letters_that_do_not_control() -> None:
    assert list(map(problem, ["A" * MAX_BYTES, 'O\'Neil "Bo" \u540d\u200b'])) == [None, None]
    assert None not in map(problem, BAD)
    assert problem("A" * 5_000_000) == "it has more than 1,024 bytes"


@pytest.mark.parametrize("name", BAD)
def test_calls_with_a_name_that_cannot_be_stored_are_refused_with_a_sentence(
    name: str, gallery: Gallery
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    gallery.enroll([(noise, "Ada")])
    vector = np.zeros((1, gallery.bundle.dimension), np.float32)
    for call in (
        lambda: gallery.prepare(noise[::-1].copy(), name),
        lambda: gallery.rename_identity("Ada", name),
        lambda: gallery.enroll_vectors([NewFace(name, None, "0" * 64)], vector),
    ):
        with pytest.raises(InputError, match="cannot be stored: it"):
            call()
    assert gallery.info().identities == 1


def test_photos_of_folders_lists_and_archives_under_such_a_name_are_rejected_one_by_one(
    gallery: Gallery, faces: Path, tmp_path: Path
) -> None:
    photos = sorted(faces.glob("*/*"))[:3]
    for name, photo in zip(["Ada", "B\nb", "C\x1b", "  "], [*photos, photos[0]], strict=True):
        (tmp_path / "photos" / name).mkdir(parents=True)
        shutil.copy(photo, tmp_path / "photos" / name / "1.jpg")
    table = pa.table({"path": [str(photos[0]), str(photos[1])], "identity": ["Ada", "B" * 5_000_000]})
    pq.write_table(table, tmp_path / "list.parquet")
    shutil.make_archive(str(tmp_path / "packed"), "tar", tmp_path / "photos")
    report = ingest(gallery, [tmp_path / "photos", tmp_path / "list.parquet", tmp_path / "packed.tar"])
    assert (report.found, report.rejected, gallery.info().identities) == (10, 7, 1)
    assert report.reasons == {Reason.BAD_IDENTITY: 6, Reason.BAD_ROW: 1}
    problems = [photo.why for photo in scan([tmp_path / "photos"]) if photo.problem]
    said = "the name of its person has a control character, more than 1,024 bytes, or nothing but spaces"
    assert problems == [said] * 3


def test_embeddings_under_such_a_name_are_refused(gallery: Gallery, tmp_path: Path) -> None:
    vectors = np.zeros((1, gallery.bundle.dimension), np.float32).tolist()
    pq.write_table(pa.table({"vector": vectors, "identity": ["A" * 2000]}), tmp_path / "e.parquet")
    from retrieval.bulk.ingest import ingest_embeddings

    with pytest.raises(FaceprintError, match="more than 1,024 bytes"):
        ingest_embeddings(gallery, tmp_path / "e.parquet", trusted=True)
    assert gallery.info().faces == 0


def test_a_gallery_of_an_older_version_with_such_a_name_opens_searches_and_forgets(
    gallery: Gallery, faces: Path
) -> None:
    gallery.enroll([(photo, "Ada") for photo in sorted(faces.glob("*/*"))[:2]])
    name = "A\n" + "a" * 3000
    with gallery.vault.writing() as writer:
        writer.rename_identity(1, name)
    with Gallery.open(gallery.folder) as again:
        assert again.search_by_face(1)[0].face.identity == name
        assert again.verify().whole
        assert again.forget(name).faces == 2


def test_photos_of_a_program_are_refused_as_a_call(gallery: Gallery) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    with pytest.raises(InputError, match="control character"):
        ingest_photos(gallery, of([(noise, "A\n")]))
