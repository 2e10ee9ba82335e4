"""The same changes make the same rows in PostgreSQL as in SQLite, and each question gets the same answer."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from retrieval.database.filters import Condition, Where
from retrieval.database.reader import Reader
from retrieval.database.records import (
    AuditEntry,
    BasisRow,
    Calibration,
    CodesRow,
    DoubtKey,
    DoubtState,
    FaceRegion,
    Generation,
    Merge,
    MergedLabel,
    NewFace,
    OperatingPoint,
    Receipt,
    Segment,
    StoredDoubt,
)
from retrieval.database.store import Store
from retrieval.database.tables import face_table, identity_table, metadata
from retrieval.database.writer import Writer
from retrieval.images.detection import DetectedFace
from retrieval.rates import Rate
from retrieval.system.files import Stamp

NAMES = ["Kim", "kim", "Ángel", "Zoë", "b c", "小明", "Ada", "_", "Äda", "9"]
TIME = "2026-01-02T03:04:05+00:00"

# What the clock says, and what is random.
CLOCKED = {"uuid", "created_at", "enrolled_at", "ended_at", "decided_at"}


def sha256(value: object) -> str:
    return hashlib.sha256(str(value).encode()).hexdigest()


def some(rng: random.Random, values: list[int], most: int = 3) -> list[int]:
    return rng.sample(values, min(len(values), rng.randint(1, most)))


def add(writer: Writer, rng: random.Random) -> None:
    first = writer.gallery().next_face_id
    faces, photos, files = [], {}, []
    for number in range(first, first + rng.randint(1, 6)):
        side = float(rng.randint(20, 90))
        points = tuple((rng.random() * side, rng.random() * side) for _ in range(5))
        region = FaceRegion(DetectedFace((0.5, 1.0, side, side), points, rng.random()), rng.random())
        said: dict[str, Any] = (
            {"n": rng.choice([1, 2.5, "x", None, [1], {"é": 2**60}])} if rng.random() < 0.7 else {}
        )
        given = region if rng.random() < 0.5 else None
        path = rng.choice(
            [f"/p/{number}.jpg", f"https://host{number % 3}.example/{number}.jpg", f"/P/é/{number}"]
        )
        faces.append(NewFace(rng.choice([*NAMES, None]), path, sha256(number), said, region=given))
        files.append((path, number))
    writer.add_faces(first, faces, photos)
    stamps = {path: Stamp(2**40 + n, -(2**60) - n, 2**62 + n) for path, n in files if rng.random() < 0.5}
    writer.add_files(files, stamps)
    writer.add_hosts({f"host{n}.example" for n in range(3) if any(f"host{n}." in path for path, _ in files)})


def remove(writer: Writer, rng: random.Random) -> None:
    writer.remove_faces(some(rng, list(writer.face_ids()), 4))


def name(writer: Writer, rng: random.Random) -> None:
    for number in some(rng, list(writer.face_ids())):
        writer.name_face(number, rng.choice([*NAMES, None]))
    writer.remove_orphaned_identities()


def annotate(writer: Writer, rng: random.Random) -> None:
    said = rng.choice([None, {"a": {"b": [1, 2]}}, {"z": 0.1, "a": "ü"}])
    writer.set_metadata(face_table, dict.fromkeys(some(rng, list(writer.face_ids())), said))
    people = [person.id for person in writer.people(limit=99)]
    writer.set_metadata(identity_table, dict.fromkeys(some(rng, people) if people else [], said))


def rename(writer: Writer, rng: random.Random) -> None:
    people = writer.people(limit=99)
    if people:
        person = rng.choice(people)
        writer.rename_identity(person.id, f"{person.name}'")
        writer.add_alias(f"former {person.name}", person.id)


def merge(writer: Writer, rng: random.Random) -> None:
    people = writer.people(limit=99)
    if len(people) < 2:
        return
    one, other = rng.sample(people, 2)
    number = writer.add_audit(AuditEntry(TIME, TIME, "me", "library", "merge", one.faces, {}))
    faces = writer.face_ids_of_identities([one.id])
    former = tuple(sorted(writer.names_of([one.id]) - {one.name}))
    record = Merge(
        number, TIME, one.id, other.id, one.name, one.faces, other.name, former, one.metadata, ("a",)
    )
    writer.add_merge(record, faces, [MergedLabel("f" * 64, number, (("train", "x/1.jpg"),))])
    writer.merge_identities(one.id, other.id)
    writer.add_alias(one.name, other.id)


def undo(writer: Writer, rng: random.Random) -> None:
    for record in writer.merges(limit=1):
        remains = writer.remains(record)
        if remains is not None and remains.face_ids and writer.identity_id(record.name) is None:
            writer.split_identity(record, remains)
        else:
            writer.erase_merged(record)


def doubt(writer: Writer, rng: random.Random) -> None:
    owned = writer.identity_of_every_face().tolist()
    if not owned:
        return
    face, identity = rng.choice(owned)
    key = DoubtKey("others-photo", (face,), (identity,))
    writer.add_doubt(StoredDoubt(key, DoubtState.OPEN, ((face,), (owned[0][0],)), 1, 0.25, {"d": 0.5}))
    writer.set_doubt(str(key), rng.choice(list(DoubtState)))
    if rng.random() < 0.2:
        writer.forget_last_audit()


def segments(writer: Writer, rng: random.Random) -> None:
    number = writer.gallery().next_segment_id
    old = [segment.id for segment in writer.segments(1)]
    writer.replace_segments(some(rng, old) if old else [], [Segment(number, 3, 2**40, sha256(number), 1)])
    basis = writer.gallery().next_basis_id
    writer.add_basis(BasisRow(basis, 1, 3, rng.randint(0, 8), 2**33, sha256(basis), TIME, {"x": 0.5}))
    writer.set_codes(CodesRow(number, basis, 2**33, sha256(number), rng.random()))
    if rng.random() < 0.3:
        writer.remove_bases([basis])


def generations(writer: Writer, rng: random.Random) -> None:
    number = writer.gallery().next_generation_id
    writer.add_generation(Generation(number, sha256(number), 8, f"model-{number}", "", TIME))
    writer.set_suspects(number, [(1, 3), (2, 5), (9, 9)])
    writer.set_checked_before(number, rng.choice([None, 4]))
    rate = Rate(0.5, 0.1, 0.9, 2)
    point = OperatingPoint(0.01, 1.25, rate, rate)
    writer.set_calibration(
        Calibration(number, sha256(number), TIME, "gallery", 3, 2, 3, 0, 0, 0.01, (point,))
    )
    if rng.random() < 0.5:
        writer.remove_generation(number)


def log(writer: Writer, rng: random.Random) -> None:
    number = writer.add_audit(AuditEntry(TIME, TIME, "me", "library", "enroll", 1, {"b": 1, "a": [2]}))
    writer.extend_audit(number, 4)
    receipt = sha256(rng.random())[:36]
    gone = tuple(rng.sample(range(99), 3))
    for _ in range(2):
        writer.add_receipt(Receipt(receipt, "g", TIME, "me", "face", 3, gone, (7,)))


def files(writer: Writer, rng: random.Random) -> None:
    known = [path for path, _, _ in sorted(writer.all_files())]
    if known:
        writer.set_stamps({rng.choice(known): Stamp(1, 2, 3)})
        writer.remove_files([rng.choice(known)])


CHANGES = (add, add, remove, name, annotate, rename, merge, undo, doubt, segments, generations, log, files)


def rows(reader: Reader) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table, without what the clock says."""
    return {
        table.name: [
            {key: value for key, value in row.items() if key not in CLOCKED}
            for part in reader.rows(table)
            for row in part
        ]
        for table in metadata.sorted_tables
    }


def answers(reader: Reader) -> Iterator[Any]:
    """What a reader answers, without what the clock says."""
    ids = list(reader.face_ids())
    people = reader.people(limit=999)
    yield ids
    yield people
    yield reader.people(after="kim", limit=2)
    yield [
        (face.id, face.identity, face.paths, face.metadata, face.region)
        for face in reader.faces(ids).values()
    ]
    yield reader.identities()
    yield reader.identity_names()
    yield reader.identities_named([*NAMES, *(f"former {name}" for name in NAMES)])
    yield reader.current_names(NAMES)
    yield reader.face_measures().tolist()
    yield reader.identity_of_every_face().tolist()
    yield reader.in_shared_photos(ids)
    yield reader.files_below("/p")
    yield reader.files_below("/P/é")
    yield sorted(reader.all_files())
    yield reader.known_files([path for path, _, _ in reader.all_files()])
    yield reader.hosts()
    yield reader.without_files(ids)
    yield [reader.living(number) for number in range(1, 40)]
    yield [reader.merged_into(number) for number in range(1, 40)]
    yield reader.merges()
    yield [
        (reader.merged_faces(one.id), reader.merged_labels(one.id), reader.remains(one))
        for one in reader.merges()
    ]
    yield [reader.merges_into(person.id) for person in people]
    yield reader.doubt_states()
    yield reader.fallen_doubts()
    found = reader.doubts(sorted(reader.doubt_states()))
    yield {number: (one.state, one.groups, one.stands) for number, one in found.items()}
    yield reader.segments()
    yield reader.bases()
    yield reader.codes()
    yield [(one.id, one.dimension, one.checked_before) for one in reader.generations().values()]
    yield [(reader.suspects(number), reader.suspect_ids(number)) for number in reader.generations()]
    yield [reader.calibration(one) for one in reader.generations().values()]
    yield [(one.id, one.face_ids, one.identity_ids) for one in reader.receipts()]
    yield [(one.action, one.faces, one.detail) for one in reader.newest_audit_entries(9, without=["merge"])]
    yield [*reader.counter_problems(), *reader.row_problems()]
    yield reader.unnamed_face_ids(limit=5)
    for where in (
        Where(identities=("Kim", "former kim")),
        Where(path_prefixes=("/p", "/P/é")),
        Where(faces=(Condition(("n",), ">", 1),)),
        Where(people=(Condition(("a", "b"), "?"),)),
    ):
        yield reader.face_ids_where(where).tolist()


@pytest.mark.parametrize("seed", range(6))
def test_the_same_changes_make_the_same_rows_and_answers(
    seed: int, schema_address: str, tmp_path: Path
) -> None:
    path = tmp_path / "gallery.db"
    with (
        closing(Store.create(path, fingerprint="f" * 64, dimension=8)) as ours,
        closing(Store.create_at(schema_address, fingerprint="f" * 64, dimension=8)) as theirs,
    ):
        plan, done = random.Random(seed), list[str]()
        for _ in range(40):
            change, number = plan.choice(CHANGES) if done else add, plan.random()
            done.append(change.__name__)
            for store in (ours, theirs):
                with store.write() as writer:
                    if change is add or next(writer.face_ids(), None) is not None:
                        change(writer, random.Random(number))
            with ours.read() as one, theirs.read() as other:
                assert rows(one) == rows(other), done
        with ours.read() as one, theirs.read() as other:
            for expected, answer in zip(answers(one), answers(other), strict=True):
                assert expected == answer
            assert [*one.counter_problems(), *one.row_problems()] == []
        assert ours.problems() == theirs.problems() == []
