"""Decisions about doubts: dismissals stay, confirmations act, and both are taken back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from retrieval.cli.app import app
from retrieval.database.records import DoubtKey, DoubtState
from retrieval.database.tables import doubt_face_table, doubt_identity_table, doubt_table
from retrieval.errors import InputError, NotFound
from retrieval.gallery.gallery import Gallery
from retrieval.quality.audit import audit
from retrieval.quality.audit_report import Audited, Doubt, Kind
from retrieval.quality.doubts import confirm, dismiss, doubt_of, doubts, keep, reopen, undismiss
from tests.gallery.test_identities import everybody, files_with
from tests.quality.test_audit import Drawn, of

SEVERAL = 3


@pytest.fixture
def doubtful(gallery: Gallery) -> Gallery:
    """A photo of P17 among those of P03; P05 under the second name Double; a photo twice, of two people."""
    drawn = Drawn()
    drawn.add("P03", drawn.near("P17", 1))
    drawn.add("Double", drawn.near("P05", 4))
    drawn.add("P08", drawn.vectors[9 * 6 : 9 * 6 + 1])
    return drawn.into(gallery)


def rows(gallery: Gallery) -> int:
    with gallery.vault.store.read() as reader:
        tables = (doubt_table, doubt_face_table, doubt_identity_table)
        return sum(len(part) for table in tables for part in reader.rows(table))


# The people of each planted doubt.
PLANTED = {
    Kind.ANOTHERS_PHOTO: {"P03", "P17"},
    Kind.TWO_LIKE_ONE: {"P05", "Double"},
    Kind.SAME_PHOTO_TWO_NAMES: {"P08", "P09"},
}


def one_of(kind: Kind, found: Audited) -> Doubt:
    """The planted doubt of a kind."""
    [doubt] = [one for one in of(kind, found) if set(one.identities) == PLANTED[kind]]
    return doubt


def states(gallery: Gallery) -> dict[str, DoubtState]:
    return {doubt.id: doubt.state for doubt in doubts(gallery, limit=1000).doubts}


def test_a_dismissed_doubt_stays_dismissed_until_other_faces_or_people_are_involved(
    doubtful: Gallery,
) -> None:
    first = audit(doubtful)
    wrong, double = one_of(Kind.ANOTHERS_PHOTO, first), one_of(Kind.TWO_LIKE_ONE, first)
    assert dismiss(doubtful, [wrong.id, double.id]) == 2
    assert dismiss(doubtful, [wrong.id]) == 0
    doubtful.rename_identity("P03", "Kim")
    second = audit(doubtful)
    assert {one.id for one in second.dismissed} == {wrong.id, double.id}
    assert not {wrong.id, double.id} & {one.id for one in second.doubts}
    assert [one.id for one in second.with_dismissed().doubts] == [one.id for one in first.doubts]
    [face] = wrong.key.face_ids
    doubtful.assign_identity([face], "P11")
    third = audit(doubtful)
    assert [one.key.face_ids for one in of(Kind.ANOTHERS_PHOTO, third)].count((face,)) == 1
    assert [one.id for one in third.dismissed] == [double.id]
    assert undismiss(doubtful, [double.id]) == 1
    assert audit(doubtful).dismissed == ()


def test_the_doubts_of_the_last_audit_are_read_page_by_page_with_open_ones_first(doubtful: Gallery) -> None:
    assert doubts(doubtful).audited_at is None
    found = audit(doubtful)
    assert keep(doubtful, found) == len(found.doubts) >= SEVERAL
    everything = doubts(doubtful, limit=1000)
    assert everything.doubts == found.doubts
    assert (everything.last, everything.audited_at is None) == ("", False)
    first = found.doubts[0].id
    dismiss(doubtful, [first])
    order = [one.id for one in doubts(doubtful, limit=1000).doubts]
    assert order == [*(one.id for one in found.doubts[1:]), first]
    seen, after = [], ""
    while True:
        page = doubts(doubtful, after=after, limit=2)
        seen += [one.id for one in page.doubts]
        if not page.last:
            break
        after = page.last
    assert seen == order
    assert [one.id for one in doubts(doubtful, state=DoubtState.DISMISSED).doubts] == [first]
    keep(doubtful, audit(doubtful))
    assert states(doubtful)[first] is DoubtState.DISMISSED


def test_a_confirmed_photo_is_given_to_the_other_person_and_back(doubtful: Gallery) -> None:
    found = audit(doubtful)
    keep(doubtful, found)
    wrong = one_of(Kind.ANOTHERS_PHOTO, found)
    [face] = wrong.key.face_ids
    assert (wrong.act.does, wrong.act.face_ids) == ("assign", (face,))
    assert confirm(doubtful, wrong.id).state is DoubtState.CONFIRMED
    assert everybody(doubtful)[face].identity == "P17"
    with pytest.raises(InputError, match="is confirmed already; reopen it first"):
        confirm(doubtful, wrong.id)
    with pytest.raises(InputError, match="is confirmed already"):
        dismiss(doubtful, [wrong.id])
    reopen(doubtful, wrong.id)
    assert everybody(doubtful)[face].identity == "P03"
    assert doubt_of(doubtful, wrong.id) == wrong
    confirm(doubtful, wrong.id)
    doubtful.assign_identity([face], "P20")
    with pytest.raises(InputError, match="were given to others since"):
        reopen(doubtful, wrong.id)


def test_two_confirmed_people_are_merged_and_made_two_again(doubtful: Gallery) -> None:
    found = audit(doubtful)
    keep(doubtful, found)
    double = one_of(Kind.TWO_LIKE_ONE, found)
    before = everybody(doubtful)
    assert confirm(doubtful, double.id).state is DoubtState.CONFIRMED
    assert {face.identity for face in everybody(doubtful).values()} >= {"P05"}
    assert "Double" not in {face.identity for face in everybody(doubtful).values()}
    reopen(doubtful, double.id)
    assert everybody(doubtful) == before
    confirm(doubtful, double.id)
    doubtful.undo_merge()
    assert doubt_of(doubtful, double.id).state is DoubtState.OPEN
    assert everybody(doubtful) == before


def test_a_doubt_without_one_clear_act_is_only_recorded(doubtful: Gallery) -> None:
    found = audit(doubtful)
    keep(doubtful, found)
    twice = one_of(Kind.SAME_PHOTO_TWO_NAMES, found)
    before = everybody(doubtful)
    assert (twice.act, confirm(doubtful, twice.id).state) == (None, DoubtState.CONFIRMED)
    assert everybody(doubtful) == before
    keep(doubtful, audit(doubtful))
    assert states(doubtful)[twice.id] is DoubtState.CONFIRMED
    reopen(doubtful, twice.id)
    assert states(doubtful)[twice.id] is DoubtState.OPEN
    with pytest.raises(InputError, match="is open"):
        reopen(doubtful, twice.id)


def test_an_open_doubt_that_is_no_longer_so_is_not_listed_and_not_confirmed(doubtful: Gallery) -> None:
    found = audit(doubtful)
    keep(doubtful, found)
    wrong = one_of(Kind.ANOTHERS_PHOTO, found)
    doubtful.assign_identity(wrong.key.face_ids, "P30")
    assert wrong.id not in states(doubtful)
    with pytest.raises(InputError, match="no longer so; audit the gallery again"):
        confirm(doubtful, wrong.id)
    doubtful.assign_identity(wrong.key.face_ids, "P03")
    assert states(doubtful)[wrong.id] is DoubtState.OPEN
    doubtful.assign_identity(wrong.key.face_ids, "P30")
    keep(doubtful, found)
    assert wrong.id not in states(doubtful)


@pytest.mark.parametrize("kept", [False, True])
def test_forgetting_erases_every_doubt_about_the_forgotten(kept: bool, doubtful: Gallery) -> None:
    """Whatever was decided; also a person's id, which would say that there was one."""
    found = audit(doubtful)
    if kept:
        keep(doubtful, found)
    wrong, double = one_of(Kind.ANOTHERS_PHOTO, found), one_of(Kind.TWO_LIKE_ONE, found)
    twice = one_of(Kind.SAME_PHOTO_TWO_NAMES, found)
    dismiss(doubtful, [wrong.id, twice.id])
    if kept:
        confirm(doubtful, double.id)
    assert files_with(doubtful.folder, wrong.id) != []
    doubtful.forget(face_id=wrong.key.face_ids[0])
    for name in ["P05"] if kept else ["P05", "Double"]:
        doubtful.forget(name)
    doubtful.forget(twice.identities[0])
    for one in (wrong, double, twice):
        assert one.id not in states(doubtful)
        assert files_with(doubtful.folder, one.id) == []
    with doubtful.vault.store.read() as reader:
        stored = [one for part in reader.rows(doubt_identity_table) for one in part]
        people = {one["identity_id"] for one in stored}
        assert people <= reader.names_of_identities(people).keys()
    everything = list(everybody(doubtful))
    for face in everything[:: len(everything) // SEVERAL]:
        doubtful.forget(face_id=face)
    for name in {face.identity for face in everybody(doubtful).values()}:
        doubtful.forget(name)
    assert rows(doubtful) == 0
    assert doubtful.verify().whole


def test_decisions_come_back_with_a_backup_and_those_about_the_forgotten_do_not(
    doubtful: Gallery, tmp_path: Path
) -> None:
    found = audit(doubtful)
    keep(doubtful, found)
    wrong, twice = one_of(Kind.ANOTHERS_PHOTO, found), one_of(Kind.SAME_PHOTO_TWO_NAMES, found)
    dismiss(doubtful, [wrong.id, twice.id])
    doubtful.backup(tmp_path / "backup")
    receipt = doubtful.forget(face_id=wrong.key.face_ids[0])
    undismiss(doubtful, [twice.id])
    doubtful.close()
    Gallery.restore(tmp_path / "backup", doubtful.folder)
    Gallery.restore(tmp_path / "backup", tmp_path / "again.gallery", receipts=[receipt])
    for folder in (doubtful.folder, tmp_path / "again.gallery"):
        with Gallery.open(folder) as gallery:
            assert states(gallery)[twice.id] is DoubtState.DISMISSED
            assert wrong.id not in states(gallery)
            assert gallery.verify().whole
        assert files_with(folder, wrong.id) == []


@pytest.mark.parametrize(
    "number",
    ["", "no-kind.f1", "hub.f0", "hub.p1.f1", "hub.f1 ", "hub", "anothers-photo.f1.p1", "hub.f" + "9" * 99],
)
def test_what_is_no_id_of_a_doubt_is_refused(number: str, doubtful: Gallery) -> None:
    with pytest.raises(InputError, match="is no id of a doubt, such as"):
        dismiss(doubtful, [number])
    for act in (doubt_of, confirm, reopen):
        with pytest.raises(NotFound, match="There is no doubt"):
            act(doubtful, number)


def test_a_doubt_about_unknown_faces_or_people_is_refused(doubtful: Gallery) -> None:
    with pytest.raises(NotFound, match="There is no face 4711 in"):
        dismiss(doubtful, ["hub.f4711.p1"])
    with pytest.raises(NotFound, match="There is no person 4711 in"):
        dismiss(doubtful, ["two-like-one.p1.p4711"])
    keep(doubtful, audit(doubtful))
    first = doubts(doubtful).doubts[0].id
    with pytest.raises(InputError, match="is not dismissed"):
        undismiss(doubtful, [first])


def test_a_key_is_what_its_text_says() -> None:
    key = DoubtKey("anothers-photo", (12,), (3, 5))
    assert (str(key), DoubtKey.of(str(key))) == ("anothers-photo.f12.p3.p5", key)


def test_the_command_leaves_dismissed_doubts_out_and_says_how_many(doubtful: Gallery) -> None:
    def run(*arguments: str) -> str:
        command = [arguments[0], str(doubtful.folder), *arguments[1:]]
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    wrong = one_of(Kind.ANOTHERS_PHOTO, audit(doubtful))
    found: dict[str, Any] = json.loads(run("audit", "--json"))
    assert wrong.id in [one["id"] for one in found["doubts"]]
    assert run("dismiss-doubt", wrong.id) == "1 doubt dismissed\n"
    said = run("audit")
    assert f"Face {wrong.key.face_ids[0]} of P03" not in said
    assert "1 dismissed doubt left out; --all shows them" in said
    found = json.loads(run("audit", "--json"))
    assert [one["id"] for one in found["dismissed"]] == [wrong.id]
    assert f"Face {wrong.key.face_ids[0]} of P03" in run("audit", "--all")
    assert run("dismiss-doubt", "--undo", wrong.id) == "1 doubt no longer dismissed\n"
    assert np.isfinite(found["skewness"])
