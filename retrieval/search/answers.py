"""Answers: the results of searches as the JSON of the command line and of the service."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval.errors import UnreadableImage

if TYPE_CHECKING:
    from retrieval.database.records import Face
    from retrieval.images.detection import DetectedFace
    from retrieval.index.knn import Explanation
    from retrieval.search.decisions import Decision
    from retrieval.search.nearest import Found, Match, PersonMatch, Prediction


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one query: matches or people, a decision, a prediction for a picture; or an error.

    For a face that was found in a picture, `face` is where, and `number` which one of its `faces`, from the
    left.
    """

    query: str
    image: Path | None
    matches: "Sequence[Match] | None" = None
    people: "Sequence[PersonMatch] | None" = None
    prediction: "Prediction | None" = None
    error: UnreadableImage | None = None
    decision: "Decision | None" = None
    face: "DetectedFace | None" = None
    number: int = 1
    faces: int = 1


def answers_of_image(query: str, image: Path | None, faces: Sequence[Any]) -> Iterator[Answer]:
    """Yields an answer for each face of an image.

    Args:
        query: what the answers call the image.
        image: its path; None without one.
        faces: a SearchResult or a PeopleResult for each face.
    """
    for number, found in enumerate(faces, 1):
        yield Answer(
            query,
            image,
            getattr(found, "matches", None),
            getattr(found, "people", None),
            found.prediction,
            decision=found.decision,
            face=found.face,
            number=number,
            faces=len(faces),
        )


def answer_of_found(query: str, found: "Found[Any]", by_person: bool) -> Answer:
    """Returns the answer to a stored face or an embedding: photos, or people if `by_person`."""
    if by_person:
        return Answer(query, None, people=found, decision=found.decision)
    return Answer(query, None, matches=found, decision=found.decision)


def answer_json(answer: Answer, *, full: bool = False) -> dict[str, Any]:
    """Returns an answer as values for JSON.

    Args:
        answer: the answer.
        full: with everything that the library knows of the faces, without loss: all that an object of the
            library is made of again.
    """
    shown: dict[str, Any] = {"query": answer.query}
    if answer.error is not None:
        return shown | {"error": {"reason": answer.error.reason, "detail": str(answer.error)}}
    if answer.face is not None:
        shown["face"] = {
            "box": rounded(answer.face.box),
            "score": round(answer.face.score, 3),
            "number": answer.number,
            "of": answer.faces,
        }
        if full:
            shown["detected"] = dataclasses.asdict(answer.face)
    if answer.prediction is not None:
        prediction = answer.prediction
        shown["prediction"] = {"identity": prediction.identity, "probability": prediction.probability}
    if answer.decision is not None:
        shown["decision"] = dataclasses.asdict(answer.decision)
    if answer.people is not None:
        shown["people"] = [
            {
                "rank": rank,
                "identity": person.identity,
                "distance": person.distance,
                "matches": _matches_json(person.matches, full=full),
            }
            for rank, person in enumerate(answer.people, 1)
        ]
    else:
        shown["matches"] = _matches_json(answer.matches or (), full=full)
    return shown


def rounded(box: "tuple[float, ...]") -> list[float]:
    """Returns the numbers of a box to a tenth of a pixel."""
    return [round(side, 1) for side in box]


def _matches_json(matches: "Sequence[Match]", *, full: bool) -> list[dict[str, Any]]:
    return [
        {
            "rank": rank,
            "face_id": match.face.id,
            "identity": match.face.identity,
            "path": match.face.path,
            "distance": match.distance,
            **({} if match.face.box is None else {"box": rounded(match.face.box)}),
            **({"metadata": dict(match.face.metadata)} if match.face.metadata else {}),
            **({"stored": _stored_json(match.face)} if full else {}),
        }
        for rank, match in enumerate(matches, 1)
    ]


def _stored_json(face: "Face") -> dict[str, Any]:
    return {
        "paths": face.paths,
        "sha256": face.sha256,
        "enrolled_at": face.enrolled_at,
        "meant": face.meant,
        "region": None if face.region is None else json.loads(face.region.as_json()),
    }


def explained(explanation: "Explanation") -> dict[str, Any]:
    """Returns how the queries were answered: method, counts, bytes and times, by description."""
    queries = max(explanation.queries, 1)
    return {
        "answered by": explanation.method,
        "searches": explanation.queries,
        "photos to compare with": explanation.rows,
        "looked at by code, per search": round(explanation.coded_rows / queries, 1),
        "looked at whole in float32, per search": round(explanation.scanned_rows / queries, 1),
        "not ruled out by their codes, per search": round(explanation.candidates / queries, 1),
        "bytes read": explanation.bytes_read,
        "milliseconds": {stage: round(1e3 * time, 2) for stage, time in explanation.seconds.items()},
    }
