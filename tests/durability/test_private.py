"""A gallery's files are its owner's, lie where it lies, and are gone when they were never finished."""

import os
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from retrieval.bulk.embed import embed_photos
from retrieval.cli.app import app
from retrieval.errors import FaceprintError, GalleryDamaged, GalleryError
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import Trouble, verify
from retrieval.gallery.repair import repair
from retrieval.models.bundle import ModelBundle
from retrieval.sources.photos import scan
from retrieval.system.files import is_free
from tests.faults import FaultServer, Kind, needs_shim
from tests.operations import add, coded, contents, tiny_model, write_photos

PRECIOUS = b"precious"


@coded
def lay(root: Path) -> None:
    with Gallery.create(root / "gallery", tiny_model(root / "model")) as gallery:
        add(gallery, range(6))
        gallery.optimize(anew=True)
        gallery.backup(root / "backup")


@pytest.fixture(scope="module")
def laid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery with codes, and a backup of it, that are copied for each test."""
    root = tmp_path_factory.mktemp("laid")
    lay(root)
    return root


@pytest.fixture
def root(laid: Path, tmp_path: Path) -> Path:
    shutil.copytree(laid, tmp_path / "root")
    return tmp_path / "root"


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer(["tests.durability.test_private"]) as ready:
        yield ready


# Links


@coded
def enroll(root: Path) -> None:
    with Gallery.open(root / "gallery") as gallery:
        add(gallery, range(6, 9))


@coded
def forget(root: Path) -> None:
    with Gallery.open(root / "gallery") as gallery:
        gallery.forget("Kim")


@coded
def compact(root: Path) -> None:
    with Gallery.open(root / "gallery") as gallery:
        gallery.optimize(anew=True)
        gallery.compact()


def check_it(root: Path) -> None:
    verify(root / "gallery")


def mend(root: Path) -> None:
    repair(root / "gallery")


@coded
def back_up(root: Path) -> None:
    with Gallery.open(root / "gallery") as gallery:
        add(gallery, range(6, 9))
        gallery.backup(root / "backup")


PLACES = [
    "gallery/writer.lock",
    "gallery/gallery.db-wal",
    "gallery/gallery.db-shm",
    "gallery/gallery.db-journal",
    "gallery/gallery.sums",
    "gallery/.gallery.sums.part",
    "gallery/gallery-0001.db",
    "gallery/model-9",
    "gallery/.model-9-12345678",
    "gallery/model/.bundle.json.part",
    "gallery/vectors/00000002.part",
    "gallery/vectors/00000002.faiss",
    "gallery/vectors/.00000002-1.codes.part",
    "gallery/vectors/00000002-1.codes",
    "gallery/vectors/.00000002.basis.part",
    "backup/writer.lock",
    "backup/.gallery.part",
    "backup/.gallery.part-journal",
    "backup/.backup.json.part",
    "backup/gallery-0.db",
    "backup/vectors/a.part",
    "backup/models/a",
]


@pytest.mark.parametrize("work", [enroll, forget, compact, check_it, mend, back_up])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_that_a_link_leads_to_is_written_or_deleted(
    kind: str, work: Callable[[Path], None], root: Path
) -> None:
    """A link under every name that is written to or tidied away, one after the other."""
    for place in PLACES:
        case = root / place.replace("/", "-")
        for name in ("gallery", "backup"):
            shutil.copytree(root / name, case / name)
        victim = case / "victim"
        if kind == "file":
            victim.write_bytes(PRECIOUS)
        else:
            victim.mkdir()
            for name in (".bundle.json.part", "bundle.json", "00000001.faiss"):
                (victim / name).write_bytes(PRECIOUS)
        (case / place).unlink(missing_ok=True)
        (case / place).symlink_to(victim)
        with suppress(FaceprintError):  # refused in a sentence
            work(case)
        found = [victim] if kind == "file" else sorted(victim.iterdir())
        assert [path.read_bytes() for path in found] == [PRECIOUS] * (1 if kind == "file" else 3), place


@pytest.mark.parametrize("name", ["gallery.db", "model"])
def test_a_gallery_whose_parts_lie_elsewhere_is_read_and_not_written_to(name: str, root: Path) -> None:
    (root / "gallery" / name).rename(root / "elsewhere")
    (root / "gallery" / name).symlink_to(root / "elsewhere")
    with pytest.raises(GalleryError, match=rf"{name} is a symbolic link, and a gallery that is written to"):
        enroll(root)
    with Gallery.open(root / "gallery", read_only=True) as gallery:
        assert gallery.info().faces == 6


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_a_link_in_the_place_of_a_file_of_sqlite_is_named(suffix: str, read_only: bool, root: Path) -> None:
    (root / "victim").write_bytes(b"")
    (root / "gallery" / f"gallery.db{suffix}").symlink_to(root / "victim")
    with pytest.raises(GalleryError, match=rf"/gallery.db{suffix} is a symbolic link, .* put what it leads"):
        Gallery.open(root / "gallery", read_only=read_only)
    with pytest.raises(GalleryError, match=rf"/gallery.db{suffix} is a symbolic link"):
        verify(root / "gallery")
    assert (root / "victim").read_bytes() == b""


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE generation SET folder = '../victim'",
        "UPDATE generation SET folder = 'model/../../victim'",
        "UPDATE generation SET folder = '..'",
        "UPDATE generation SET folder = 'model-1' || char(10)",
        "UPDATE generation SET card_sha256 = '../../victim'",
        "UPDATE segment SET sha256 = '../../victim'",
        """UPDATE gallery SET unfinished = '{"erase": "", "labels": {"../victim": {"0": ["x", true]}}}'""",
    ],
)
def test_a_name_that_a_database_gives_leads_nowhere_else(change: str, root: Path) -> None:
    shutil.copytree(root / "gallery" / "model", root / "victim")
    (root / "victim" / ".x.part").write_bytes(PRECIOUS)
    before = {path.name: path.read_bytes() for path in (root / "victim").iterdir()}
    with closing(sqlite3.connect(root / "gallery" / "gallery.db")) as driver, driver:
        driver.execute(change)
    for work in (enroll, forget, compact, back_up):
        with pytest.raises(GalleryDamaged, match=r"names a file .* as faceprint never does"):
            work(root)
    assert not verify(root / "gallery").whole
    assert {path.name: path.read_bytes() for path in (root / "victim").iterdir()} == before
    assert sorted(path.name for path in root.iterdir()) == ["backup", "gallery", "model", "victim"]


# Who may read


@pytest.fixture
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    """The mode of a folder and of all that is in it, by path."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return {path.relative_to(folder).as_posix(): stat.S_IMODE(path.lstat().st_mode) for path in paths}


def expected(folder: Path, folders: int, files: int) -> dict[str, int]:
    return {name: folders if (folder / name).is_dir() else files for name in modes(folder)}


def check_modes(root: Path, *, shared: bool) -> None:
    for path in root.glob("made*"):
        folders, files = (0o2750, 0o640) if shared and path.name == "made" else (0o700, 0o600)
        assert modes(path) == expected(path, folders, files), path.name


@pytest.mark.usefixtures("_no_umask")
@pytest.mark.parametrize("shared", [False, True])
def test_galleries_backups_exports_and_models_are_private_unless_they_are_shared(
    shared: bool, tmp_path: Path
) -> None:
    make_everything(tmp_path, shared=shared)
    check_modes(tmp_path, shared=shared)
    assert verify(tmp_path / "made").notes == ()


def make_everything(root: Path, *, shared: bool) -> None:
    """Every kind of file that a gallery, a backup, an export and a model have."""
    model = tiny_model(root / "made-model")

    @coded
    def work(root: Path) -> None:
        with Gallery.create(root / "made", model, shared=shared) as gallery:
            add(gallery, range(6))
            gallery.optimize(anew=True)
            gallery.calibrate(0.5)
            gallery.forget("Kim")
            gallery.backup(root / "made-backup")
            gallery.export(root / "made-export")
            add(gallery, range(6, 9))
            assert (root / "made" / "gallery.db-wal").exists()
            check_modes(root, shared=shared)
        Gallery.restore(root / "made-backup", root / "made-again")
        model.save(root / "made-copy")

    work(root)


@pytest.mark.usefixtures("_no_umask")
def test_what_is_named_for_output_replaces_a_link_and_is_its_owners(root: Path) -> None:
    """Also where somebody has foreseen the temporary name."""
    write_photos(root / "photos", range(3))
    (root / "photos" / "broken.png").write_bytes(b"no picture")
    (root / "victim").write_bytes(PRECIOUS)
    (root / "out").mkdir(mode=0o755)
    gallery, photos, model = str(root / "gallery"), str(root / "photos"), str(root / "model")
    commands = {
        "report.jsonl": ["ingest", gallery, photos, "--report"],
        "summary.json": ["ingest", gallery, photos, "--summary"],
        "receipt.json": ["forget", gallery, "--identity", "Kim", "--receipt"],
        "answer.png": ["search", gallery, str(root / "photos" / "Adi" / "Adi_0.png"), "--plot"],
        "vectors.npy": ["embed", model, photos, "--out"],
        "vectors.parquet": ["embed", model, photos, "--out"],
    }
    for name, command in commands.items():
        if name != "receipt.json":  # which is never replaced
            (root / "out" / name).symlink_to(root / "victim")
        (root / "out" / f".{name}.part").symlink_to(root / "victim")
        done = CliRunner().invoke(app, [*command, str(root / "out" / name)])
        assert done.exit_code == 0, (name, done.output)
    assert (root / "victim").read_bytes() == PRECIOUS
    assert modes(root / "out") == {".": 0o755, **dict.fromkeys(("vectors.csv", *commands), 0o600)}


def test_ingest_shares_a_new_gallery_with_the_group_and_an_old_one_not_by_itself(root: Path) -> None:
    write_photos(root / "photos", range(3))
    command = ["ingest", str(root / "new"), str(root / "photos"), "--model", str(root / "model"), "--share"]
    assert isinstance(CliRunner().invoke(app, [*command, "everybody"]).exception, FaceprintError)
    assert not (root / "new").exists()
    assert CliRunner().invoke(app, [*command, "group"]).exit_code == 0
    assert modes(root / "new") == expected(root / "new", 0o2750, 0o640)
    again = CliRunner().invoke(app, [*command, "group"]).exception
    assert str(again) == (
        f"{root / 'new'} is there already; open it to its group with `chmod -R g+rX {root / 'new'}` and "
        f"`chmod g+s {root / 'new'}`."
    )


@pytest.mark.usefixtures("_no_umask")
def test_an_older_gallery_keeps_its_readers_and_verify_names_them(root: Path) -> None:
    folder = root / "gallery"
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    enroll(root)
    assert modes(folder) == expected(folder, 0o755, 0o644)
    alone = f"`chmod -R go-rwx {folder}` makes it yours alone"
    assert verify(folder).notes == (f"{folder} can be read by every user who can reach it; {alone}.",)
    folder.chmod(0o750)
    (note,) = verify(folder).notes
    assert note.startswith(f"{folder} can be read by the group ")
    assert note.endswith(f"; {alone}, `chmod g+s {folder}` marks it as shared.")
    for mode in (0o2750, 0o700):
        folder.chmod(mode)
        assert verify(folder).notes == ()
    assert verify(folder).whole


# What a killed process leaves


def create(root: Path) -> None:
    if is_free(root / "new"):
        Gallery.create(root / "new", ModelBundle.load(root / "model")).close()


def restore(root: Path) -> None:
    if is_free(root / "new"):
        Gallery.restore(root / "backup", root / "new")


def export(root: Path) -> None:
    if is_free(root / "new"):
        with Gallery.open(root / "gallery") as gallery:
            gallery.export(root / "new")


def save(root: Path) -> None:
    if is_free(root / "new"):
        ModelBundle.load(root / "model").save(root / "new")


def embed(root: Path) -> None:
    embed_photos(ModelBundle.load(root / "model"), scan([root / "photos"]), root / "new.npy", workers=1)


@needs_shim
@pytest.mark.parametrize("work", [create, restore, export, save, embed])
def test_the_next_command_removes_what_a_killed_one_left(
    work: Callable[[Path], None], root: Path, server: FaultServer
) -> None:
    """Killed again and again, at later and later calls, and at last not."""
    write_photos(root / "photos", range(3))
    shutil.copytree(root, root.with_name("before"))
    before = set(os.listdir(root))
    calls = server.run(work, (root.with_name("before"),), root.with_name("before")).count
    seen = set()
    for at in range(2, calls, max(1, calls // 4)):
        server.run(work, (root,), root, at=at, kind=Kind.KILL)
        left = [name for name in os.listdir(root) if name.startswith(".new-")]
        assert len(left) <= 1
        if left and work in (create, restore):
            named_by_verify(root / "new", left[0])
        seen |= set(os.listdir(root)) - before
    assert any(name.startswith(".new") for name in seen)
    work(root)
    assert set(os.listdir(root)) - before == ({"new.npy", "new.csv"} if work is embed else {"new"})


def named_by_verify(folder: Path, left: str) -> None:
    if is_free(folder):
        with pytest.raises(GalleryError, match=rf"also removes what a killed one left \({left}\)"):
            verify(folder)
    else:
        found = [(finding.trouble, finding.file) for finding in verify(folder).findings]
        assert found == [(Trouble.LEFTOVER, f"../{left}")]


def test_verify_names_and_repair_removes_what_was_left_beside_a_gallery(root: Path) -> None:
    left = root / ".gallery-0a1b2c3d"
    (left / "whole").mkdir(parents=True)
    (left / "whole" / "bundle.json").write_bytes(PRECIOUS)
    named_by_verify(root / "gallery", left.name)
    assert repair(root / "gallery").after.whole
    assert not left.exists()


# File systems without locks


def open_it(root: Path) -> None:
    Gallery.open(root / "gallery").close()


def read_it(root: Path) -> None:
    contents(root / "gallery")


def back_up_anew(root: Path) -> None:
    with Gallery.open(root.parent / "gallery") as gallery:
        gallery.backup(root / "new")


@needs_shim
@pytest.mark.parametrize(
    ("work", "name"),
    [
        (create, "new"),
        (restore, "backup"),
        (open_it, "gallery"),
        (read_it, "gallery"),
        (back_up_anew, "backup/new"),
    ],
)
def test_without_locks_one_sentence_says_so_before_anything_is_made(
    work: Callable[[Path], None], name: str, root: Path, server: FaultServer
) -> None:
    before = sorted(root.rglob("*"))
    folder = root / "backup" if work is back_up_anew else root  # the gallery itself lies on another disk
    outcome = server.run(work, (folder,), folder, kind=Kind.NO_LOCKS)
    assert (outcome.error, outcome.message) == (
        "StorageError",
        f"{root / name} lies on a file system that cannot lock files (no locks available); use a local disk.",
    )
    assert [path for path in sorted(root.rglob("*")) if not path.name.startswith("gallery.db-")] == before


def save_and_export(root: Path) -> None:
    ModelBundle.load(root.parent / "model").save(root / "model")
    with Gallery.open(root.parent / "gallery") as gallery:
        gallery.export(root / "export")


@needs_shim
def test_copies_of_models_and_exports_need_no_locks(root: Path, server: FaultServer) -> None:
    (root / "share").mkdir()
    outcome = server.run(save_and_export, (root / "share",), root / "share", kind=Kind.NO_LOCKS)
    assert outcome.state == "done", outcome
    assert sorted(path.name for path in (root / "share").iterdir()) == ["export", "model"]
