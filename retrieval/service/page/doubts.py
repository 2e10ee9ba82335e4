"""The page of doubts: what the last audit found, one at a time, to be confirmed or dismissed, and undone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from retrieval.database.reader import Reader
from retrieval.database.records import DoubtState, Face, Merge
from retrieval.gallery.gallery import Gallery
from retrieval.quality import doubts
from retrieval.quality.audit_report import HEADINGS, Doubt, Kind, ProposedAct, group_names
from retrieval.service import cursors
from retrieval.service.jobs import JobRunner, JobState
from retrieval.service.page.rendering import check_form, is_partial, page, see
from retrieval.service.routes.common import change, in_writer, service_of
from retrieval.service.routes.doubts import DoubtId
from retrieval.service.routes.jobs import begin_job, runner_of
from retrieval.service.schemas import AuditJob
from retrieval.service.tokens import Scope

# Doubts on a part of a list of those that were decided about.
_DECIDED: Final = 50

# The question of each kind, and its two answers; {0} and {1} are the people that a doubt is about.
_TOO_POOR: Final = ("Yes, too poor", "No, it is good enough")
_QUESTIONS: Final[Mapping[Kind, tuple[str, str, str]]] = {
    Kind.SAME_PHOTO_TWO_NAMES: ("Are these one photo?", "Yes, one photo", "No, two photos"),
    Kind.ANOTHERS_PHOTO: ("Is the first photo of {1}, not of {0}?", "Yes, it is {1}", "No, it is {0}"),
    Kind.TWO_LIKE_ONE: ("Are {0} and {1} one person?", "Yes, one person", "No, two people"),
    Kind.ONE_LIKE_TWO: ("Are there two people under {0}?", "Yes, two people", "No, one person"),
    Kind.SAME_PHOTO: ("Are these one photo?", "Yes, one photo", "No, two photos"),
    Kind.HUB: ("Is the first photo too poor to say who it is?", *_TOO_POOR),
    Kind.SMALL_FACE: ("Is this face too small to say who it is?", *_TOO_POOR),
    Kind.BLURRED_FACE: ("Is this face too blurred to say who it is?", *_TOO_POOR),
    Kind.TURNED_FACE: ("Is this face turned too far to say who it is?", *_TOO_POOR),
}

# The measured distance of each group of faces from the doubted ones.
_APART: Final[Mapping[Kind, tuple[str | None, ...]]] = {
    Kind.SAME_PHOTO_TWO_NAMES: (None, "distance"),
    Kind.ANOTHERS_PHOTO: (None, "own", "other"),
    Kind.TWO_LIKE_ONE: (None, "centroids"),
    Kind.ONE_LIKE_TWO: (None, "gap", "other"),
    Kind.SAME_PHOTO: (None, "distance"),
}

# The process that runs the audits knows how far they are.
router = APIRouter(include_in_schema=False, route_class=in_writer(Scope.READ))
writing = APIRouter(
    include_in_schema=False, route_class=in_writer(Scope.WRITE), dependencies=[Depends(check_form)]
)

Cursor = Annotated[str | None, Query(max_length=2048)]


@dataclass(frozen=True, slots=True)
class Side:
    """Faces of a doubt that are shown together.

    Attributes:
        name: what they are.
        faces: the faces, at least one.
        person: the id of the person of the first one; None for no person.
        apart: how far they are from the doubted faces, as the audit measured it; None where it did not.
    """

    name: str
    faces: tuple[Face, ...]
    person: int | None
    apart: float | None


@dataclass(frozen=True, slots=True)
class ShownDoubt:
    """A doubt as the page shows it.

    Attributes:
        doubt: the doubt.
        heading: its kind in words.
        question, yes, no: what is asked, and the words of the two answers.
        sides: its faces, the doubted ones first.
        outcome: what was decided and done, in a sentence.
        gives, merges: the names of the act that a confirmation does: to whom the faces are given, or which
            person is merged into which one; None without that.
        names: that may occur in these texts.
    """

    doubt: Doubt
    heading: str
    question: str
    yes: str
    no: str
    sides: tuple[Side, ...]
    outcome: str
    gives: str | None
    merges: tuple[str, str] | None
    names: frozenset[str]


@router.get("/doubts")
async def show_doubts(
    request: Request,
    doubt: Annotated[str | None, Query(max_length=200)] = None,
    after: Cursor = None,
    answered: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """The next open doubt, or the given one.

    `after` is where the list goes on, behind the doubts that were skipped; `answered` is the one that was
    answered just now.
    """
    service = service_of(request)
    found = await run_in_threadpool(_next, service.gallery, doubt, after, answered)
    job = _last_audit(runner_of(service))
    return page(request, "doubts_part" if is_partial(request) else "doubts", state="open", job=job, **found)


@router.get("/doubts/{state}")
async def show_decided(
    request: Request,
    state: Literal["dismissed", "confirmed"],
    cursor: Cursor = None,
    answered: Annotated[str | None, Query(max_length=200)] = None,
) -> Response:
    """The doubts that were dismissed, or confirmed."""
    found = await run_in_threadpool(
        _decided, service_of(request).gallery, DoubtState(state), cursor, answered
    )
    return page(request, "decided", state=state, **found)


@writing.post("/doubts/audit")
async def start_audit(request: Request) -> Response:
    """Audits the gallery, unless an audit waits or runs."""
    job = _last_audit(runner_of(service_of(request)))
    if job is None or job["is_end"]:
        await begin_job(request, AuditJob(kind="audit"))
    return see("/doubts")


@writing.post("/doubts/audit/cancel")
async def cancel_audit(request: Request) -> Response:
    """Stops the audit; the doubts of the one before stay."""
    runner = runner_of(service_of(request))
    job = _last_audit(runner)
    if job is not None and not job["is_end"]:
        runner.cancel(job["id"])
    return see("/doubts")


@writing.post("/doubts/{doubt}/confirm")
async def confirm(request: Request, doubt: DoubtId) -> Response:
    """Says that a doubt is true, and does what it proposes."""
    after = await _place(request)
    await change(request, lambda gallery: doubts.confirm(gallery, doubt))
    return see(_queue(after, answered=doubt))


@writing.post("/doubts/{doubt}/dismiss")
async def dismiss(request: Request, doubt: DoubtId) -> Response:
    """Says that a doubt is not true."""
    after = await _place(request)
    await change(request, lambda gallery: doubts.dismiss(gallery, [doubt]))
    return see(_queue(after, answered=doubt))


@writing.post("/doubts/{doubt}/reopen")
async def reopen(request: Request, doubt: DoubtId) -> Response:
    """Takes an answer back, with what it did, and shows the doubt, or the list that it was on."""
    after, back = await _place(request), (await request.form()).get("back")

    def work(gallery: Gallery) -> bool:
        doubts.reopen(gallery, doubt)
        with gallery.vault.store.read() as reader:
            return doubt in reader.doubts([doubt])

    is_kept = await change(request, work)
    if back in ("dismissed", "confirmed"):
        return see(f"/doubts/{back}?{urlencode({'answered': doubt})}")
    known = {"doubt": doubt, "answered": doubt} if is_kept else {}
    return see(_queue(after, **known))


async def _place(request: Request) -> str:
    """Returns where in the list of open doubts a form was sent from; empty for its beginning."""
    return str((await request.form()).get("after", ""))


def _queue(after: str, **known: str) -> str:
    query = urlencode({**known, **({"after": after} if after else {})})
    return "/doubts" + (f"?{query}" if query else "")


def _last_audit(runner: JobRunner) -> dict[str, Any] | None:
    """Returns the newest audit that waits, runs, or ended without a result; None without one."""
    audits = [one for one in runner.all() if one["kind"] == "audit"]
    if not audits or audits[-1]["state"] is JobState.DONE:
        return None
    return {**audits[-1], "is_end": JobState(audits[-1]["state"]).is_end}


def _next(gallery: Gallery, number: str | None, after: str | None, answered: str | None) -> dict[str, Any]:
    """Returns what the page shows: a doubt, how many there are, and where the list goes on."""
    found = doubts.doubts(gallery, state=DoubtState.OPEN, after=cursors.decoded(after, ""), limit=1)
    if not found.doubts and after is not None:  # all behind this place are answered: those that were skipped
        after, found = None, doubts.doubts(gallery, state=DoubtState.OPEN, limit=1)
    shown = found.doubts if number is None else (doubts.doubt_of(gallery, number),)
    following = cursors.encoded(doubts.place_of(gallery, shown[0].id)) if shown else None
    with gallery.vault.store.read() as reader:
        stored = gallery.vault.state(reader).faces
        return {
            "shown": _shown(reader, shown[0]) if shown else None,
            "answered": _answered(gallery, reader, answered),
            "after": after or "",
            "following": following,
            "counts": doubts.counts(gallery),
            "audited_at": found.audited_at,
            "stored": stored,
        }


def _decided(gallery: Gallery, state: DoubtState, cursor: str | None, answered: str | None) -> dict[str, Any]:
    found = doubts.doubts(gallery, state=state, after=cursors.decoded(cursor, ""), limit=_DECIDED)
    with gallery.vault.store.read() as reader:
        return {
            "decided": [_shown(reader, one) for one in found.doubts],
            "answered": _answered(gallery, reader, answered),
            "following": cursors.encoded(found.last) if found.last else None,
            "counts": doubts.counts(gallery),
        }


def _answered(gallery: Gallery, reader: Reader, number: str | None) -> ShownDoubt | None:
    """Returns the doubt that was answered just now; None where it is gone."""
    if number is None or number not in reader.doubts([number]):
        return None
    return _shown(reader, doubts.doubt_of(gallery, number))


def _shown(reader: Reader, one: Doubt) -> ShownDoubt:
    names = reader.names_of_identities(one.key.identity_ids)
    is_whole = len(one.identities) == len(one.key.identity_ids)
    asked = _QUESTIONS[one.kind] if is_whole else (HEADINGS[one.kind], "Yes", "No")
    question, yes, no = (words.format(*one.identities) if is_whole else words for words in asked)
    act, merge = one.act, _merge_of(reader, one)
    return ShownDoubt(
        doubt=one,
        heading=HEADINGS[one.kind],
        question=question,
        yes=yes,
        no=no,
        sides=_sides(reader, one),
        outcome=_outcome(one, names, merge),
        gives=None if act is None or act.identity_id is not None else names.get(act.into_id),
        merges=_merged(act, names),
        names=frozenset((*one.identities, *names.values(), *((merge.name, merge.into) if merge else ()))),
    )


def _merge_of(reader: Reader, one: Doubt) -> Merge | None:
    """Returns the merge that the confirmation of a doubt made; None without one."""
    if one.state is not DoubtState.CONFIRMED:
        return None
    made = reader.doubts([one.id])[one.id].merge_id
    return None if made is None else reader.merges_by_id([made]).get(made)


def _sides(reader: Reader, one: Doubt) -> tuple[Side, ...]:
    owners = reader.identities_of_faces(group[0].id for group in one.groups if group)
    measured: Sequence[str | None] = _APART.get(one.kind, ())
    return tuple(
        Side(
            name,
            group,
            owners.get(group[0].id),
            one.measured.get(measured[place] or "") if place < len(measured) else None,
        )
        for place, (name, group) in enumerate(zip(group_names(one), one.groups, strict=True))
        if group
    )


def _merged(act: ProposedAct | None, names: Mapping[int, str]) -> tuple[str, str] | None:
    """Returns the names of a merge that an act is: of the person who is merged, and of the one who stays."""
    if act is None or act.identity_id is None or not {act.identity_id, act.into_id} <= names.keys():
        return None
    return names[act.identity_id], names[act.into_id]


def _outcome(one: Doubt, names: Mapping[int, str], merge: Merge | None) -> str:
    """Returns what was decided about a doubt, and done, in a sentence."""
    if one.state is DoubtState.OPEN:
        return "The answer was taken back."
    if one.state is DoubtState.DISMISSED:
        return "Dismissed."
    if merge is not None:
        return f"Confirmed: {merge.name} was merged into {merge.into}."
    if one.act is not None and one.act.does == "assign" and one.act.into_id in names:
        return f"Confirmed: the photo was given to {names[one.act.into_id]}."
    return "Confirmed."
