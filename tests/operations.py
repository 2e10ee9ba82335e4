"""All operations that change a gallery, on small galleries, for tests that interrupt them at any call.

Each operation works on a folder that `lay` made, and leaves the same gallery when it is repeated.
`all_states` lists the galleries that an interrupted operation may leave.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import socket
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import TypeAlias
from unittest.mock import patch

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from retrieval import errors
from retrieval.bulk.ingest import ingest
from retrieval.database.metadata import to_json
from retrieval.database.records import Face, FaceRegion, NewFace
from retrieval.errors import FaceprintError, InputError
from retrieval.gallery.face_writer import FaceWriter
from retrieval.gallery.gallery import Gallery
from retrieval.gallery.integrity import Trouble, verify
from retrieval.gallery.repair import repair
from retrieval.images.detection import DetectedFace
from retrieval.images.preprocessing import Preprocessing
from retrieval.index import quantization
from retrieval.models.bundle import FORGOTTEN, ModelBundle
from retrieval.quality import doubts
from retrieval.sources.photos import Photo
from retrieval.storage import codes
from retrieval.storage.vault import Vault
from retrieval.system.files import is_free

# The faces of a gallery: (SHA-256 and place in the photo, identity, paths, metadata of face and identity as
# JSON) -> bytes of the vector. The calibration is one more entry, under CALIBRATION.
Contents: TypeAlias = dict[tuple[str, str | None, tuple[str, ...], str], bytes]
CALIBRATION = "calibration"

DIMENSION = 8
SIZE = 8
PEOPLE = ("Adi", "Kim", "Zephyr Kant")
GONE = "Zephyr Kant"
MERGED = "Kimberley Rosenthal"  # Kim, before the merge into Adi in one of the galleries
BADGE = "badge 4711 of somebody"  # in the metadata of the identity that is forgotten, and of one of its faces

# Findings that an interrupted write may leave, and that the next write removes.
HARMLESS = {Trouble.LEFTOVER, Trouble.UNFINISHED}


# The model, photos and faces


def coded(work: Callable[[Path], None]) -> Callable[[Path], None]:
    """Makes segments get codes while `work` runs, even in small galleries."""

    @functools.wraps(work)
    def with_codes(root: Path) -> None:
        with (
            patch.object(quantization, "CHOICES", (DIMENSION,)),
            patch.object(quantization, "_ROW_COMPARISON", 0.0),
            patch.object(codes, "CODES_FROM", 2),
        ):
            work(root)

    return with_codes


def tiny_model(folder: Path, *, seed: int = 0) -> ModelBundle:
    """Makes a bundle of a network with two layers, for onnxruntime, in 20 KB."""
    rng = np.random.default_rng(seed)
    weights = {
        "embed": rng.standard_normal((SIZE * SIZE * 3, DIMENSION)).astype(np.float32),
        "classify": rng.standard_normal((DIMENSION, len(PEOPLE))).astype(np.float32),
    }
    nodes = [
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["numbers", "embed"], ["embedding"]),
        helper.make_node("MatMul", ["embedding", "classify"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["n", SIZE, SIZE, 3])],
        [
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", DIMENSION]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", len(PEOPLE)]),
        ],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(made)
    return ModelBundle.create(
        folder,
        tensors=weights,
        graph=made.SerializeToString(),
        architecture="tiny",
        labels=PEOPLE,
        preprocessing=Preprocessing(size=SIZE, crop=1.0),
        dimension=DIMENSION,
        recipe={},
        split={"train": [f"{GONE}/{GONE}_1.png"]},
        figures={},
        versions={},
        created_at="2026-01-01T00:00:00+00:00",
    )


def photo(number: int) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    return Image.fromarray(noise)


def write_photos(folder: Path, numbers: range, *, start: int = 0) -> None:
    """Writes photos with the given numbers; the three people take turns."""
    for number in numbers:
        name = PEOPLE[number % len(PEOPLE)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        photo(start + number).save(folder / name / f"{name}_{number}.png")


def vector_of(sha256: str) -> NDArray[np.float32]:
    """Returns a vector that is a function of the hash, as an embedding is of a photo."""
    return np.random.default_rng(int(sha256, 16)).standard_normal(DIMENSION).astype(np.float32)


def face(number: int, *, path: str | None = None) -> NewFace:
    digest = hashlib.sha256(f"face {number}".encode()).hexdigest()
    return NewFace(PEOPLE[number % len(PEOPLE)], path or f"/photos/{number}.png", digest)


def add(gallery: Gallery, numbers: range) -> None:
    faces = [face(number) for number in numbers]
    gallery.enroll_vectors(faces, np.stack([vector_of(one.sha256) for one in faces]))


def group(number: int, faces: int, *, path: str | None = None) -> list[NewFace]:
    """The faces of a photo of several people, of whom the first is known."""
    one = face(number, path=path)
    points = ((2.0, 2.0), (4.0, 2.0), (3.0, 3.0), (2.0, 4.0), (4.0, 4.0))
    regions = [
        FaceRegion(DetectedFace((8.0 * place, 0.25 * number, 6.0, 6.0), points, 0.9), 12.5)
        for place in range(faces)
    ]
    return [
        replace_fields(one, identity=None if place else one.identity, region=region)
        for place, region in enumerate(regions)
    ]


def group_vectors(faces: list[NewFace]) -> NDArray[np.float32]:
    """Returns vectors that are functions of the photo and of the place in it."""
    return np.stack([vector_of(hashlib.sha256(_name(one).encode()).hexdigest()) for one in faces])


def _name(one: NewFace | Face) -> str:
    return one.sha256 if one.region is None else f"{one.sha256} {one.region.box}"


def add_group(gallery: Gallery, faces: list[NewFace]) -> None:
    gallery.enroll_vectors(faces, group_vectors(faces))


def contents(folder: Path) -> Contents:
    """Returns the faces of a gallery with their vectors; checks that each row has exactly one vector."""
    vault = Vault.open(folder, read_only=True)
    try:
        with vault.store.read() as reader:
            state = vault.state(reader)
            vectors = {
                int(number): vector.tobytes()
                for block in state.vectors.blocks()
                for number, vector in zip(block.ids, block.matrix, strict=True)
            }
            faces = [one for part in reader.all_faces() for one in part]
            people = reader.identity_metadata({one.identity for one in faces if one.identity is not None})
        assert sorted(vectors) == sorted(one.id for one in faces)
        said = {one.id: to_json([one.metadata, people.get(one.identity or "", {})]) for one in faces}
        found: Contents = {
            (_name(one), one.identity, tuple(sorted(one.paths)), said[one.id]): vectors[one.id]
            for one in faces
        }
        if state.calibration is not None:
            fields = {**state.calibration.fields(), "found_at": "", "generation": 0}
            found[(CALIBRATION, None, (), "")] = to_json(fields).encode()
        return found
    finally:
        vault.close()


# The operations: the argument is the folder that `lay` filled


@coded
def create(root: Path) -> None:
    if is_free(root / "new.gallery"):
        Gallery.create(root / "new.gallery", ModelBundle.load(root / "model")).close()


@coded
def merge_segments(root: Path) -> None:
    """Enrolls one more photo; three segments become one."""
    with Gallery.open(root / "people.gallery") as gallery:
        add(gallery, range(7, 8))


@coded
def enroll_three_batches(root: Path) -> None:
    with Gallery.open(root / "people.gallery") as gallery:
        for first in (7, 10, 13):
            add(gallery, range(first, first + 3))


@coded
def ingest_photos(root: Path) -> None:
    """Ingests image files with a network: new ones, a changed one, a renamed one and a broken one."""
    with Gallery.open(root / "photo.gallery") as gallery:
        report = ingest(gallery, [_photos(root, "changed")], batch_size=2, workers=1)
    assert report.found == report.enrolled + report.known + report.duplicate + report.rejected
    assert report.rejected == 1


@coded
def replace(root: Path) -> None:
    """Enrolls other bytes under two known paths."""
    with Gallery.open(root / "people.gallery") as gallery:
        faces = [face(20, path="/photos/0.png"), face(21, path="/photos/5.png")]
        gallery.enroll_vectors(faces, np.stack([vector_of(one.sha256) for one in faces]))


@coded
def forget(root: Path) -> None:
    with Gallery.open(root / "people.gallery") as gallery:
        if gallery.receipts():
            gallery.compact()  # the erasure is done or deferred; any write completes it
        else:
            gallery.forget(GONE)


@coded
def forget_a_face(root: Path) -> None:
    with Gallery.open(root / "people.gallery") as gallery:
        if gallery.receipts():
            gallery.compact()
        else:
            gallery.forget(face_id=3)


@coded
def forget_merged(root: Path) -> None:
    """Forgets a person that another one was merged into, with what would undo the merge."""
    with Gallery.open(root / "merged.gallery") as gallery:
        if gallery.receipts():
            gallery.compact()
        else:
            gallery.forget("Adi")


@coded
def enroll_groups(root: Path) -> None:
    """Enrolls photos of several people: a new one, one under a second path, and other bytes under a path."""
    with Gallery.open(root / "group.gallery") as gallery:
        faces = [*group(32, 3), *group(31, 2, path="/photos/copy.png"), *group(33, 2, path="/photos/30.png")]
        add_group(gallery, faces)


@coded
def forget_one_of_a_group(root: Path) -> None:
    with Gallery.open(root / "group.gallery") as gallery:
        if gallery.receipts():
            gallery.compact()
        else:
            gallery.forget(face_id=4)


@coded
def compact(root: Path) -> None:
    with Gallery.open(root / "people.gallery") as gallery:
        gallery.compact()


@coded
def rename(root: Path) -> None:
    with Gallery.open(root / "people.gallery") as gallery:
        if any(name == "Kim" for name, _ in gallery.info().largest):
            gallery.rename_identity("Kim", "Kimberly")


@coded
def merge_people(root: Path) -> None:
    with Gallery.open(root / "people.gallery") as gallery:
        if any(name == "Kim" for name, _ in gallery.info().largest):
            gallery.merge_identities("Kim", "Adi")


@coded
def undo_merge(root: Path) -> None:
    with Gallery.open(root / "merged.gallery") as gallery:
        if gallery.merges():
            gallery.undo_merge()


@coded
def dismiss_doubt(root: Path) -> None:
    with Gallery.open(root / "people.gallery") as gallery:
        doubts.dismiss(gallery, ["hub.f1.p1"])


@coded
def annotate(root: Path) -> None:
    """Adds, replaces and removes metadata of faces and of people."""
    with Gallery.open(root / "people.gallery") as gallery:
        gallery.annotate(
            faces={1: {"year": 2020, "pad": "x" * 5000}, 3: None},
            paths={"/photos/4.png": {"year": 2021}},
            identities={"Kim": {"country": "FR"}, GONE: {"country": None}},
        )


@coded
def calibrate(root: Path) -> None:
    """Replaces the calibrated threshold, then rewrites it with all data by a compaction."""
    with Gallery.open(root / "people.gallery") as gallery:
        gallery.calibrate(0.3)
        gallery.compact()


@coded
def sync(root: Path) -> None:
    """Removes faces of missing photos: two files are deleted, and the folder of one person is renamed."""
    with Gallery.open(root / "synced.gallery") as gallery:
        gallery.remove_missing([_photos(root, "thinned")])


@coded
def relabel(root: Path) -> None:
    """Relabels one of two photos of a person to a new identity, and all photos of another to a known one."""
    said = {"Adi_0.png": "Nina", f"{GONE}_2.png": "Kim", f"{GONE}_5.png": "Kim"}
    paths = [path for path in sorted(_photos(root, "kept").rglob("*.png")) if path.name in said]
    with Gallery.open(root / "kept.gallery") as gallery:
        gallery.relabel(Photo(str(path), said[path.name]) for path in paths)


@coded
def relocate(root: Path) -> None:
    with Gallery.open(root / "people.gallery") as gallery, contextlib.suppress(InputError):
        gallery.relocate("/photos", "/pictures")  # a repetition raises: no path is left to relocate


@coded
def reembed(root: Path) -> None:
    with Gallery.open(root / "kept.gallery") as gallery:
        other = ModelBundle.load(root / "other-model")
        if gallery.bundle.fingerprint != other.fingerprint:
            assert gallery.reembed(other).switched


@coded
def drop_generation(root: Path) -> None:
    with Gallery.open(root / "switched.gallery") as gallery:
        if gallery.info().other_fingerprint is not None:
            gallery.drop_other_model()


@coded
def back_up(root: Path) -> None:
    with Gallery.open(root / "people.gallery") as gallery:
        gallery.backup(root / "backup")


@coded
def restore(root: Path) -> None:
    """Restores in place; since the backup, faces were added and a person was forgotten."""
    Gallery.restore(root / "backup", root / "later.gallery")


@coded
def restore_anew(root: Path) -> None:
    if is_free(root / "new.gallery"):
        Gallery.restore(root / "backup", root / "new.gallery")


@coded
def upgrade(root: Path) -> None:
    """Migrates a gallery of the first version."""
    Gallery.open(root / "old.gallery").close()


@coded
def first_write(root: Path) -> None:
    """Writes to a gallery of the first version, which gives its folder of vectors an id."""
    with Gallery.open(root / "old.gallery") as gallery:
        add(gallery, range(7, 8))


@coded
def mend(root: Path) -> None:
    """Repairs a gallery with a damaged segment; the photos still exist."""
    repair(root / "damaged.gallery")


@coded
def export(root: Path) -> None:
    with Gallery.open(root / "people.gallery") as gallery:
        if is_free(root / "exported"):
            gallery.export(root / "exported")


@dataclass(frozen=True)
class Operation:
    """An operation that changes a gallery.

    Attributes:
        work: runs the operation; a repetition completes the remaining work, if any.
        gallery: name of the folder of the gallery.
        stages: whether it commits in several batches, with a valid state after each.
        erased: bytes that must not occur in the gallery afterwards.
    """

    work: Callable[[Path], None]
    gallery: str = "people.gallery"
    stages: bool = False
    erased: tuple[bytes, ...] = ()


_TRACES = (
    GONE.encode(),
    f"the {BADGE}".encode(),
    f'"{BADGE}'.encode(),
    vector_of(face(2).sha256).tobytes(),
    b"/photos/2.png",
    face(2).sha256.encode(),
)

_TRACES_OF_A_MERGE = (MERGED.encode(), b"hub.f1.p1", vector_of(face(1).sha256).tobytes())

_MIDDLE = group(30, 3)[1]

_TRACES_OF_ONE = (_MIDDLE.region.box.encode() if _MIDDLE.region else b"", group_vectors([_MIDDLE]).tobytes())

OPERATIONS = {
    operation.work.__name__: operation
    for operation in (
        Operation(create, "new.gallery"),
        Operation(merge_segments),
        Operation(enroll_three_batches, stages=True),
        Operation(ingest_photos, "photo.gallery", stages=True),
        Operation(replace),
        Operation(forget, erased=_TRACES),
        Operation(forget_a_face, erased=_TRACES[2:]),
        Operation(forget_merged, "merged.gallery", erased=_TRACES_OF_A_MERGE),
        Operation(enroll_groups, "group.gallery"),
        Operation(forget_one_of_a_group, "group.gallery", erased=_TRACES_OF_ONE),
        Operation(compact),
        Operation(rename),
        Operation(merge_people),
        Operation(undo_merge, "merged.gallery"),
        Operation(dismiss_doubt),
        Operation(annotate),
        Operation(calibrate),
        Operation(sync, "synced.gallery"),
        Operation(relabel, "kept.gallery"),
        Operation(relocate),
        Operation(reembed, "kept.gallery"),
        Operation(drop_generation, "switched.gallery"),
        Operation(back_up),
        Operation(restore, "later.gallery"),
        Operation(restore_anew, "new.gallery"),
        Operation(upgrade, "old.gallery"),
        Operation(first_write, "old.gallery"),
        Operation(mend, "damaged.gallery"),
        Operation(export),
    )
}


@coded
def lay(root: Path) -> None:
    """Makes the initial states of all operations in one folder, with photos that are never copied."""
    model = tiny_model(root / "model")
    tiny_model(root / "other-model", seed=1)
    people = root / "people.gallery"
    with Gallery.create(people, model) as gallery:
        for first, count in ((0, 4), (4, 2), (6, 1)):
            add(gallery, range(first, first + count))
        gallery.annotate(
            faces={3: {"badge": BADGE}}, identities={"Kim": {"badge": 1}, GONE: {"badge": f"the {BADGE}"}}
        )
        assert gallery.optimize(anew=True).encoded == 2
        gallery.calibrate(0.5)
        gallery.backup(root / "backup")
    shutil.copytree(people, root / "later.gallery")
    with Gallery.open(root / "later.gallery") as gallery:
        gallery.forget(GONE)
        add(gallery, range(9, 11))
        gallery.calibrate(0.4)
    shutil.copytree(people, root / "merged.gallery")
    with Gallery.open(root / "merged.gallery") as gallery:
        gallery.rename_identity("Kim", MERGED)
        gallery.annotate(identities={MERGED: {"badge": f"badge of {MERGED}"}})
        gallery.merge_identities(MERGED, "Adi")
        doubts.dismiss(gallery, ["hub.f1.p1"])
    with Gallery.create(root / "group.gallery", model) as gallery:
        add(gallery, range(2))
        add_group(gallery, [*group(30, 3), *group(31, 2)])
    (root / "fixed").symlink_to(root)
    _lay_photos(root, model)
    _lay_old(root, model)


def _photos(root: Path, name: str) -> Path:
    """Returns a folder of photos in the folder that `lay` filled: galleries store absolute paths."""
    return (root / "fixed").resolve() / name


def _lay_photos(root: Path, model: ModelBundle) -> None:
    for name, gallery in (("changed", "photo"), ("thinned", "synced"), ("kept", "kept")):
        write_photos(root / name, range(6))
        with Gallery.create(root / f"{gallery}.gallery", model) as opened:
            ingest(opened, [root / name], batch_size=4, workers=1)
            opened.calibrate(0.5)
    shutil.copytree(root / "kept.gallery", root / "switched.gallery")
    with Gallery.open(root / "switched.gallery") as opened:
        opened.reembed(ModelBundle.load(root / "other-model"))
    shutil.copytree(root / "kept.gallery", root / "damaged.gallery")
    segment = sorted((root / "damaged.gallery" / "vectors").iterdir())[0]
    data = bytearray(segment.read_bytes())
    data[60] ^= 1
    segment.write_bytes(data)
    for number in (2, 4):
        (root / "thinned" / PEOPLE[number % 3] / f"{PEOPLE[number % 3]}_{number}.png").unlink()
    (root / "thinned" / "Adi").rename(root / "thinned" / "Adina")
    changed = root / "changed"
    write_photos(changed, range(6, 9))
    photo(100).save(changed / "Adi" / "Adi_0.png")
    (changed / "Kim" / "Kim_1.png").rename(changed / "Kim" / "renamed.png")
    (changed / "Kim" / "broken.png").write_bytes(b"not a picture at all")
    # Old modification times: the stat of a file, also of a known one, is stored only if the file was not
    # written recently.
    for path in changed.glob("*/*"):
        os.utime(path, (1e9, 1e9))


def _lay_old(root: Path, model: ModelBundle) -> None:
    """Makes a gallery in the format of the first version."""
    folder = root / "old.gallery"
    shutil.copytree(root / "people.gallery", folder)
    for extra in ("gallery.db", "gallery.sums", "vectors/gallery.id"):
        (folder / extra).unlink()
    now = "2026-01-01T00:00:00+00:00"
    with sqlite3.connect(root / "people.gallery" / "gallery.db") as today:
        faces = today.execute(
            "SELECT f.id, f.identity_id, p.path, o.sha256 FROM face f JOIN photo o ON o.id = f.photo_id "
            "JOIN file p ON p.photo_id = o.id"
        ).fetchall()
        people = today.execute("SELECT id, name FROM identity").fetchall()
        segments = today.execute("SELECT id, rows, bytes, sha256 FROM segment").fetchall()
    today.close()
    from alembic import command
    from alembic.config import Config
    from sqlalchemy import URL, create_engine

    from retrieval.database.migrations import migrations_folder

    config = Config()
    config.set_main_option("script_location", str(migrations_folder()))
    engine = create_engine(URL.create("sqlite", database=str(folder / "gallery.db")))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.exec_driver_sql(
            "INSERT INTO gallery VALUES (1, 'uuid', ?, ?, ?, 100, 100)", (now, model.fingerprint, DIMENSION)
        )
        connection.exec_driver_sql("INSERT INTO identity VALUES (?, ?)", [tuple(row) for row in people])
        connection.exec_driver_sql("INSERT INTO face VALUES (?, ?, ?, ?, ?)", [(*row, now) for row in faces])
        connection.exec_driver_sql(
            "INSERT INTO segment VALUES (?, ?, ?, ?)", [tuple(row) for row in segments]
        )
    engine.dispose()


# What must hold after a fault


def left(root: Path, name: str) -> tuple[Contents | None, bool]:
    """Returns the contents of a gallery, or None without one, and whether `verify` has no findings at all.

    Raises:
        AssertionError: a finding is not in HARMLESS.
    """
    folder = root / OPERATIONS[name].gallery
    if is_free(folder):
        return None, True
    findings = verify(folder).findings
    wrong = [f"{f.trouble} {f.file}: {f.detail}" for f in findings if f.trouble not in HARMLESS]
    assert wrong == [], wrong
    return contents(folder), not findings


def check(root: Path, name: str, state: str, error: str, states: list[Contents | None]) -> None:
    """Checks I1 to I3 and I6 after a fault: the state is valid, and a repetition ends as without the fault.

    Raises:
        AssertionError: an invariant does not hold.
    """
    operation = OPERATIONS[name]
    before, after = states[0], states[-1]
    if state == "error":
        kind = getattr(errors, error, None)
        assert kind is not None, f"{error} reached the caller"
        assert issubclass(kind, FaceprintError), f"{error} reached the caller"
    damaged = operation.work is mend
    if not damaged:
        found, _ = left(root, name)
        assert found in states, f"neither before nor after: {summary(found)}"
        if state == "done":
            assert found == after, f"done, and not done: {summary(found)}"
    operation.work(root)
    found, tidy = left(root, name)
    assert found == after, f"done again, and not as if undisturbed: {summary(found)}"
    folder = root / operation.gallery
    # If the repetition had nothing to write, leftovers are still there.
    if not tidy:
        assert (final := repair(folder).after).whole, final.findings
    _check_others(root, operation, before)
    erased(folder, operation)


def _check_others(root: Path, operation: Operation, before: Contents | None) -> None:
    if operation.work is back_up:
        Gallery.restore(root / "backup", root / "again.gallery")
        assert contents(root / "again.gallery") == before
    if operation.work is export:
        manifest = json.loads((root / "exported" / "manifest.json").read_text())
        assert manifest["faces"] == sum(key[0] != CALIBRATION for key in before or ())


def erased(folder: Path, operation: Operation) -> None:
    """Checks I5: no file contains bytes of the forgotten data."""
    if operation.erased:
        data = b"\0".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
        assert [trace in data for trace in operation.erased] == [False] * len(operation.erased)
        with Gallery.open(folder) as gallery:
            assert (GONE in gallery.bundle.labels) == (operation.work is not forget)
            assert (FORGOTTEN in gallery.bundle.labels) == (operation.work in (forget, forget_merged))


def summary(found: Contents | None) -> str:
    if found is None:
        return "no gallery"
    return ", ".join(f"{identity} {paths}" for _, identity, paths, _ in sorted(found, key=str))


def all_states(root: Path, name: str) -> list[Contents | None]:
    """Runs an operation; returns the galleries that it may leave: before, between batches, and after."""
    operation = OPERATIONS[name]
    folder = root / operation.gallery
    states: list[Contents | None] = []

    def look() -> None:
        found = None if is_free(folder) else contents(folder)
        if found not in states:
            states.append(found)

    if operation.work is first_write:
        upgrade(root)  # `contents` opens the gallery for reading only, which needs the current version
    if operation.work is not upgrade and operation.work is not mend:
        look()
    if operation.stages:
        original = FaceWriter.add

        def watched(self: FaceWriter, *arguments: object, **options: object) -> object:
            outcomes = original(self, *arguments, **options)  # type: ignore[arg-type]
            look()
            return outcomes

        FaceWriter.add = watched  # type: ignore[method-assign, assignment]
        try:
            operation.work(root)
        finally:
            FaceWriter.add = original  # type: ignore[method-assign]
    else:
        operation.work(root)
    look()
    return states


def copy_initial(laid: Path, name: str, root: Path) -> None:
    """Copies the initial state of an operation into an empty folder."""
    operation = OPERATIONS[name]
    needed = {operation.gallery}
    if operation.work is create:
        needed.add("model")
    if operation.work is reembed:
        needed.add("other-model")
    if operation.work in (back_up, restore, restore_anew):
        needed.add("backup")
    for part in needed:
        if (laid / part).exists():
            shutil.copytree(laid / part, root / part)
    (root / "fixed").symlink_to(laid)


# Replacements for a file


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    # The path of a socket is limited to about 100 bytes, which a test's folder may exceed.
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(f"/proc/self/fd/{descriptor}/{path.name}")
    finally:
        os.close(descriptor)


# Objects other than files, by name, with the function that makes one at a free path.
OTHER_THAN_FILES: dict[str, Callable[[Path], None]] = {
    "a pipe": _pipe,
    "a socket": _socket,
    "a folder": lambda path: path.mkdir(),
}
