"""The pages of people: a wall of all, and one for each, where they are renamed, merged and forgotten."""

import json
from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from retrieval.database.reader import Reader
from retrieval.database.records import Face, Merge, Person, Receipt
from retrieval.errors import InputError, NotFound
from retrieval.gallery import merges
from retrieval.gallery.gallery import Gallery
from retrieval.pages.html import readable
from retrieval.service import cursors
from retrieval.service.page.rendering import check_form, is_partial, page, see
from retrieval.service.refusals import Code, Refusal
from retrieval.service.routes.common import ServiceOf, change, in_writer, needs
from retrieval.service.routes.people import PersonId
from retrieval.service.tokens import Scope
from retrieval.system.paths import composed, is_utf8

# People on a part of the wall, photos on a part of a person's page, and names that a field proposes.
_PEOPLE: Final = 60
_FACES: Final = 60
_PROPOSED: Final = 20

router = APIRouter(include_in_schema=False, dependencies=[Depends(needs(Scope.READ))])
writing = APIRouter(
    include_in_schema=False, route_class=in_writer(Scope.WRITE), dependencies=[Depends(check_form)]
)
forgetting = APIRouter(
    include_in_schema=False, route_class=in_writer(Scope.ADMIN), dependencies=[Depends(check_form)]
)

Cursor = Annotated[str | None, Query(max_length=2048)]


@router.get("/people")
async def show_people(
    request: Request, service: ServiceOf, name: str = "", cursor: Cursor = None, part: bool = False
) -> Response:
    """All people by name, or those with a text in their names."""
    wanted = composed(name.strip())
    found = await run_in_threadpool(_wall, service.gallery, wanted, cursor)
    return page(request, "people_wall" if part and is_partial(request) else "people", name=wanted, **found)


@router.get("/people/names")
async def propose_names(request: Request, service: ServiceOf, identity: str = "") -> Response:
    """Names that have a text in them, for the field in which one is typed."""
    wanted = composed(identity.strip())
    people = await run_in_threadpool(_with_text, service.gallery, wanted, _PROPOSED) if wanted else []
    return page(request, "names", people=people)


@router.get("/people/unnamed")
async def show_unnamed(request: Request, service: ServiceOf, cursor: Cursor = None) -> Response:
    """The faces without a name."""
    found = await run_in_threadpool(_unnamed, service.gallery, cursor)
    return page(request, "photos_part" if is_partial(request) else "unnamed", person=None, **found)


@router.get("/people/{person}")
async def show_person(
    request: Request, service: ServiceOf, person: PersonId, cursor: Cursor = None, merged: int | None = None
) -> Response:
    """A person with their photos; `merged` is the id of a merge that was made just now."""
    found = await run_in_threadpool(_of_person, service.gallery, person, cursor)
    return page(request, "photos_part" if is_partial(request) else "person", merged=merged, **found)


@router.get("/people/{person}/merge")
async def ask_to_merge(
    request: Request, service: ServiceOf, person: PersonId, identity: str = ""
) -> Response:
    """What becomes of two people who are merged."""
    one, other = await run_in_threadpool(_two_people, service.gallery, person, identity)
    return page(request, "merge", person=one, into=other)


@router.get("/people/{person}/forget", dependencies=[Depends(needs(Scope.ADMIN))])
async def ask_to_forget(request: Request, service: ServiceOf, person: PersonId) -> Response:
    """What is lost with a person."""
    return page(request, "forget", wrong=False, **await run_in_threadpool(_facts, service.gallery, person))


@router.get("/receipts/{receipt}")
async def show_receipt(request: Request, service: ServiceOf, receipt: str) -> Response:
    """The proof of an erasure."""
    found = await run_in_threadpool(_receipt, service.gallery, receipt)
    return page(request, "receipt", receipt=found, remains=service.gallery.vault.remains)


@router.get("/receipts/{receipt}/file")
async def save_receipt(service: ServiceOf, receipt: str) -> Response:
    """The proof of an erasure as a file, as `faceprint forget --receipt` writes it."""
    found = await run_in_threadpool(_receipt, service.gallery, receipt)
    headers = {"content-disposition": f'attachment; filename="receipt-{found.id}.json"'}
    told = service.gallery.vault.told(found)
    return Response(json.dumps(told) + "\n", media_type="application/json", headers=headers)


@writing.post("/people/{person}/rename")
async def rename(request: Request, person: PersonId) -> Response:
    """Gives a person another name."""
    form = await request.form()
    name, keeps = composed(str(form.get("identity", "")).strip()), "keep_alias" in form

    def work(gallery: Gallery) -> None:
        gallery.rename_identity(person, name, keep_alias=keeps)

    await change(request, work)
    return see(f"/people/{person}")


@writing.post("/people/{person}/merge")
async def merge(request: Request, person: PersonId) -> Response:
    """Makes two people one."""
    name = str((await request.form()).get("identity", ""))

    def work(gallery: Gallery) -> Merge:
        one, other = _two_people(gallery, person, name)
        return merges.merge(gallery.vault, one.id, other.id)

    made = await change(request, work)
    return see(f"/people/{made.into_id}?merged={made.id}")


@writing.post("/people/assign")
async def assign(request: Request) -> Response:
    """Gives the chosen faces to another person, to a new one, or to no person."""
    form = await request.form()
    faces = [int(text) for text in map(str, form.getlist("face")) if text.isascii() and text.isdigit()]
    name = None if form.get("to") == "nobody" else composed(str(form.get("identity", "")).strip())
    if not faces:
        raise InputError("No photo is chosen; choose some, and say whose they are.")
    if name == "":
        raise InputError("There is no name; type one, or choose that the photos are nobody's.")

    def work(gallery: Gallery) -> int | None:
        if form.get("to") == "new":
            _require_unused(gallery, str(name))
        gallery.assign_identity(faces, name)
        with gallery.vault.store.read() as reader:
            return reader.identities_of_faces(faces[:1]).get(faces[0])

    person = await change(request, work)
    return see("/people/unnamed" if person is None else f"/people/{person}")


@forgetting.post("/people/{person}/forget")
async def forget(request: Request, service: ServiceOf, person: PersonId) -> Response:
    """Erases a person, after their name was typed."""
    typed = composed(str((await request.form()).get("identity", "")).strip())
    facts = await run_in_threadpool(_facts, service.gallery, person)
    if typed not in _typed_forms(facts["person"].name):
        return page(request, "forget", status=HTTPStatus.UNPROCESSABLE_ENTITY, wrong=True, **facts)

    def work(gallery: Gallery) -> str:
        with gallery.vault.store.read() as reader:
            current = _person(gallery, reader, person).name
        if typed not in _typed_forms(current):
            raise _renamed_meanwhile()
        return gallery.forget(person).id

    return see(f"/receipts/{await change(request, work)}")


def _typed_forms(name: str) -> set[str]:
    """Returns what may be typed for a name: the name, or what the page shows of it, with boxes."""
    return {composed(form.strip()) for form in (name, readable(name))}


def _person(gallery: Gallery, reader: Reader, number: int) -> Person:
    """Returns a person.

    Raises:
        NotFound: there is no such person.
    """
    found = reader.people_by_id([number]).get(number)
    if found is None:
        raise NotFound(
            f"There is no person {number} in {gallery.name}; perhaps they were merged or forgotten."
        )
    return found


def _wall(gallery: Gallery, name: str, cursor: str | None) -> dict[str, Any]:
    """Returns a part of the wall: people, where it goes on, and whether there are other faces."""
    if name:
        people = _with_text(gallery, name, _PEOPLE)
        return {"people": people, "following": None, "unnamed": False, "stored": len(people)}
    after = cursors.decoded(cursor, "")
    with gallery.vault.store.read() as reader:
        found = reader.people(after=after, limit=_PEOPLE + 1)
        shown = found[:_PEOPLE]
        return {
            "people": _with_pictures(reader, shown),
            "following": cursors.encoded(shown[-1].name) if len(found) > _PEOPLE else None,
            "unnamed": bool(reader.unnamed_face_ids(limit=1)),
            "stored": gallery.vault.state(reader).faces,
        }


def _with_text(gallery: Gallery, text: str, most: int) -> list[tuple[Person, bool]]:
    """Returns people with a text in their current names, or with exactly that former one, by name."""
    folded = text.casefold()
    with gallery.vault.store.read() as reader:
        names = sorted(one for one in reader.identity_names() if folded in one.casefold())[:most]
        known = reader.identities_named([*names, text] if is_utf8(text) else names)
        people = reader.people_by_id(number for number, _ in known.values())
        return _with_pictures(reader, sorted(people.values(), key=lambda person: person.name))


def _with_pictures(reader: Reader, people: Sequence[Person]) -> list[tuple[Person, bool]]:
    """Returns people, each with whether their first face has a path, so that it can be shown."""
    faces = reader.faces(one.face_id for one in people if one.face_id is not None)
    return [(one, one.face_id in faces and bool(faces[one.face_id].paths)) for one in people]


def _of_person(gallery: Gallery, number: int, cursor: str | None) -> dict[str, Any]:
    last = cursors.decoded(cursor, 0)
    with gallery.vault.store.read() as reader:
        person = _person(gallery, reader, number)
        former = sorted(reader.names_of([number]) - {person.name})
        ids = [one for one in reader.face_ids_of(person.name) if one > last]
        made = reader.merges_into(number)
        return {"person": person, "former": former, "merges": made, **_photos(reader, ids)}


def _unnamed(gallery: Gallery, cursor: str | None) -> dict[str, Any]:
    last = cursors.decoded(cursor, 0)
    with gallery.vault.store.read() as reader:
        return _photos(reader, reader.unnamed_face_ids(after=last, limit=_FACES + 1))


def _photos(reader: Reader, ids: Sequence[int]) -> dict[str, Any]:
    faces: list[Face] = list(reader.faces(ids[:_FACES]).values())
    following = cursors.encoded(ids[_FACES - 1]) if len(ids) > _FACES else None
    return {"faces": faces, "following": following}


def _facts(gallery: Gallery, number: int) -> dict[str, Any]:
    """Returns what is lost with a person, and what is not."""
    with gallery.vault.store.read() as reader:
        person = _person(gallery, reader, number)
        former = sorted(reader.names_of([number]) - {person.name})
        has_backups = reader.last_logged("backup") is not None
    labels = gallery.bundle.labels
    return {
        "person": person,
        "former": former,
        "is_label": not {person.name, *former}.isdisjoint(labels),
        "has_backups": has_backups,
        "remains": gallery.vault.remains,
    }


def _receipt(gallery: Gallery, number: str) -> Receipt:
    """Returns a receipt.

    Raises:
        NotFound: there is no such receipt.
    """
    found = next((one for one in gallery.receipts() if one.id == number), None)
    if found is None:
        raise NotFound(f"There is no receipt {number[:80]!a} in {gallery.name}.")
    return found


def _require_unused(gallery: Gallery, name: str) -> None:
    """Checks that a name is of no person yet, so that faces with it become a new one.

    Raises:
        InputError: it is the name, or a former name, of a person.
    """
    with gallery.vault.store.read() as reader:
        known = reader.identities_named([name] if is_utf8(name) else [])
        person = next(iter(reader.people_by_id(number for number, _ in known.values()).values()), None)
    if person is not None:
        also = "" if person.name == name else f", formerly {name}"
        raise InputError(
            f"There is a person {person.name} already{also}; type another name for the new person, or give "
            "the photos to that one."
        )


def _two_people(gallery: Gallery, number: int, name: str) -> tuple[Person, Person]:
    """Returns a person, and another one by name.

    Raises:
        NotFound: there is no such person.
        InputError: both are the same.
    """
    name = composed(name.strip())
    if not name:
        raise InputError("There is no name; type that of the person to merge into.")
    gallery.require_identities([name])
    with gallery.vault.store.read() as reader:
        one = _person(gallery, reader, number)
        other = _person(gallery, reader, reader.identities_named([name])[name][0])
    if one.id == other.id:
        raise InputError(f"{name} is this person already; choose another one to merge into.")
    return one, other


def _renamed_meanwhile() -> Refusal:
    return Refusal(
        HTTPStatus.CONFLICT,
        Code.IDENTITY_CONFLICT,
        "This person got another name meanwhile; nothing was erased. Look at the page again.",
    )
