"""The routes of people: list, show, annotate, rename, merge and forget."""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Path, Query, Request
from starlette.concurrency import run_in_threadpool

from retrieval.database.records import Person
from retrieval.errors import NotFound
from retrieval.gallery import merges
from retrieval.gallery.gallery import Gallery
from retrieval.service import cursors
from retrieval.service.routes.common import REFUSALS, ServiceOf, change, in_writer, needs
from retrieval.service.schemas import (
    MAX_ID,
    Merged,
    Merging,
    PeopleOptions,
    PeoplePage,
    PersonDetails,
    Receipt,
    Renaming,
)
from retrieval.service.tokens import Scope
from retrieval.system.paths import is_utf8

PersonId = Annotated[int, Path(ge=1, le=MAX_ID, description="The id of a person.")]

router = APIRouter(prefix="/v1/people", tags=["people"], responses=REFUSALS)
writing = APIRouter(
    prefix="/v1/people", tags=["people"], responses=REFUSALS, route_class=in_writer(Scope.WRITE)
)
forgetting = APIRouter(
    prefix="/v1/people", tags=["people"], responses=REFUSALS, route_class=in_writer(Scope.ADMIN)
)


@router.get("", response_model=PeoplePage, dependencies=[Depends(needs(Scope.READ))])
async def list_people(service: ServiceOf, options: Annotated[PeopleOptions, Query()]) -> dict[str, Any]:
    """People by name, in pages."""
    return await run_in_threadpool(_page, service.gallery, options)


@router.get("/{person}", response_model=PersonDetails, dependencies=[Depends(needs(Scope.READ))])
async def show_person(service: ServiceOf, person: PersonId) -> dict[str, Any]:
    """A person, with former names and metadata."""
    return await run_in_threadpool(details, service.gallery, person)


@writing.put("/{person}/metadata", response_model=PersonDetails)
async def annotate_person(
    request: Request, person: PersonId, metadata: Annotated[dict[str, Any], Body()]
) -> dict[str, Any]:
    """Replaces the metadata of a person; an empty object removes them."""

    def annotate(gallery: Gallery) -> dict[str, Any]:
        gallery.annotate(identities={person: metadata})
        return details(gallery, person)

    return await change(request, annotate)


@writing.post("/{person}/rename", response_model=PersonDetails)
async def rename_person(request: Request, person: PersonId, to: Renaming) -> dict[str, Any]:
    """Gives a person another name. The old one goes on to mean them, unless `keep_alias` is false."""

    def rename(gallery: Gallery) -> dict[str, Any]:
        gallery.rename_identity(person, to.identity, keep_alias=to.keep_alias)
        return details(gallery, person)

    return await change(request, rename)


@writing.post("/{person}/merge", response_model=Merged)
async def merge_people(request: Request, person: PersonId, target: Merging) -> dict[str, Any]:
    """Makes two people one: all faces of the first belong to the second, who is returned."""

    def merge(gallery: Gallery) -> dict[str, Any]:
        done = merges.merge(gallery.vault, person, target.into)
        return {**details(gallery, target.into), "merge": done.id}

    return await change(request, merge)


@forgetting.delete("/{person}", response_model=Receipt, response_model_exclude_none=True)
async def forget_person(request: Request, person: PersonId) -> dict[str, Any]:
    """Erases a person with all faces, as `faceprint forget` does, and returns the receipt; no undo."""

    def forget(gallery: Gallery) -> dict[str, Any]:
        return gallery.vault.told(gallery.forget(person))

    return await change(request, forget)


def _page(gallery: Gallery, page: PeopleOptions) -> dict[str, Any]:
    name = page.name
    with gallery.vault.store.read() as reader:
        if name is not None:
            known = reader.identities_named([name] if is_utf8(name) else [])
            found = list(reader.people_by_id(number for number, _ in known.values()).values())
            return {"people": [_shown(one) for one in found], "next": None}
        after = cursors.decoded(page.cursor, "")
        found = reader.people(after=after, limit=page.limit + 1)
    shown, following = cursors.paged(found, page.limit, lambda person: person.name)
    return {"people": list(map(_shown, shown)), "next": following}


def details(gallery: Gallery, number: int) -> dict[str, Any]:
    """Returns a person as values for JSON, with former names; NotFound where there is none."""
    with gallery.vault.store.read() as reader:
        person = reader.people_by_id([number]).get(number)
        if person is None:
            raise NotFound(f"There is no person {number} in {gallery.name}.")
        former = reader.names_of([person.id]) - {person.name}
    return {**_shown(person), "former_names": sorted(former)}


def _shown(person: Person) -> dict[str, Any]:
    return {
        "id": person.id,
        "identity": person.name,
        "faces": person.faces,
        "face_id": person.face_id,
        "metadata": person.metadata,
    }
