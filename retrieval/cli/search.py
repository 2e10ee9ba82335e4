"""The command `search`: queries are images, stored faces or vectors; answers are photos or people."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from retrieval.cli import options
from retrieval.cli.opening import TOKEN_VARIABLE, import_galleries, open_gallery
from retrieval.cli.search_output import (
    draw,
    print_answers,
    print_answers_as_json,
    report_decision_quality,
)
from retrieval.errors import InputError, UnreadableImage
from retrieval.search.answers import Answer, answer_of_found, answers_of_image
from retrieval.system.places import Place

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from retrieval.client import Client
    from retrieval.database.filters import Where
    from retrieval.gallery.gallery import Gallery
    from retrieval.images.photo_reader import FaceSelection
    from retrieval.images.pixels import ImageSource
    from retrieval.search.nearest import Found, PeopleResult, SearchResult
    from retrieval.search.question import PeopleSearchOptions, PhotoSearchOptions, SearchOptions


# Pictures or vectors that one search takes.
_QUERY_BATCH: Final = 256

_DEFAULT_K: Final = 5

# No picture has a longer side; `thumbnail` does not enlarge.
_ANY_SIDE: Final = 2**20


@dataclass(frozen=True, slots=True)
class _Searches:
    """The search functions of an open gallery, for photos or for people, with the options of the command."""

    by_person: bool
    images: "Callable[[Sequence[ImageSource]], Sequence[Sequence[SearchResult] | Sequence[PeopleResult]]]"
    face: "Callable[[int], Found[Any]]"
    vectors: "Callable[[NDArray[Any]], Sequence[Found[Any]]]"


def search(
    gallery: options.Gallery,
    images: Annotated[list[Path] | None, typer.Argument(metavar="[IMAGE...]", help="Pictures to ask about.", show_default=False)] = None,
    k: Annotated[int | None, typer.Option("-k", min=1, help="How many closest photos, or people.", show_default="5; all with --within")] = None,
    within: Annotated[float | None, typer.Option(metavar="DISTANCE", help="All photos that are no farther than this.", show_default=False)] = None,
    by_person: Annotated[bool, typer.Option("--by-person", help="The closest people instead of photos.")] = False,
    rule: Annotated[str, typer.Option(metavar="nearest|mean|centroid", help="With --by-person, how far a person is: by the nearest photo, the mean of the nearest few, or the centroid of all.")] = "nearest",
    mean_of: Annotated[int, typer.Option(min=1, help="With --rule mean: of how many nearest photos.")] = 3,
    photos: Annotated[int, typer.Option(min=0, help="With --by-person: photos shown of each person.")] = 3,
    face: Annotated[list[int] | None, typer.Option("--face", metavar="ID", help="More like this stored face, itself left out; may be repeated.", show_default=False)] = None,
    paths: Annotated[Path | None, typer.Option(metavar="FILE.txt", help="Ask about the pictures of a list, a path a line; - is standard input.", show_default=False)] = None,
    vectors: Annotated[Path | None, typer.Option(metavar="FILE.npy", help="Ask about embeddings that exist already, (n, d).", show_default=False)] = None,
    identity: Annotated[list[str] | None, typer.Option("--identity", metavar="NAME", help="Only photos of this person; may be repeated.", show_default=False)] = None,
    where: Annotated[list[str] | None, typer.Option("--where", metavar="CONDITION", help="Only photos of which this holds: year>=2020, camera=north, person.country=FR, path=FOLDER, enrolled>=2026-01-01; may be repeated.", show_default=False)] = None,
    exclude_self: Annotated[bool, typer.Option("--exclude-self", help="Leave out the stored photo that has the very bytes of the picture.")] = False,
    fpir: Annotated[float | None, typer.Option(metavar="RATE", help="Decide by the threshold for this share of strangers.", show_default="as calibrated")] = None,
    max_distance: Annotated[float | None, typer.Option("--max-distance", metavar="DISTANCE", help="Decide by this distance instead: who is farther is UNKNOWN. Other than --within it hides no photo.", show_default=False)] = None,
    faces: Annotated[str | None, typer.Option("--faces", metavar="all|largest|one|none", help="Which faces of a picture, for a model with a face detector: all, the largest and most central, the only one, or none: the middle square of the picture as it is.", show_default="all")] = None,
    min_face: Annotated[float | None, typer.Option("--min-face", metavar="PIXELS", help="Pass over faces with a shorter side below this.", show_default="20")] = None,
    crop: Annotated[str | None, typer.Option("--crop", metavar="X,Y,W,H", help="Look only at this part of the pictures: left, top, width and height in pixels, as the pictures are shown.", show_default=False)] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say what answering took.")] = False,
    as_json: options.Json = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw each picture beside its closest photos.", show_default=False)] = None,
    device: options.Device = "auto",
    precision: options.Precision = "float32",
) -> None:  # fmt: skip
    """Find the closest stored photos, or people, to pictures, stored faces or vectors; exactly.

    A model with a face detector answers for each face of a picture, from left to right; any other model for the
    middle square of it: crop it to one face, as the enrolled photos are.

    Distances are Euclidean between embeddings; smaller is closer. For pictures the classifier's
    prediction comes too. Conditions decide which photos are compared at all, so -k photos come back. Once the
    gallery is calibrated (`faceprint calibrate`), a decision comes with each answer: an identity or UNKNOWN.

    GALLERY may be the address of a service (`faceprint serve`), such as http://127.0.0.1:8000; the environment
    variable FACEPRINT_TOKEN has its token.
    """
    asked = [*(images or []), *(_listed(paths) if paths is not None else [])]
    if not (asked or face or vectors):
        raise InputError("Name pictures, or --face ID, --paths FILE.txt or --vectors FILE.npy.")
    part = None if crop is None else _part(crop)
    options.require(
        part is None or not exclude_self, "--exclude-self compares whole pictures; leave it or --crop out"
    )
    import_galleries()
    from retrieval.gallery.gallery import Gallery
    from retrieval.index.knn import Explanation

    explanation = Explanation()
    wanted = _where(identity, where)
    common: SearchOptions = {
        "where": wanted,
        "explanation": explanation,
        "fpir": fpir,
        "max_distance": max_distance,
    }
    people: PeopleSearchOptions = {**common, "rule": rule, "mean_of": mean_of, "photos": photos}
    selection = options.face_selection(faces or "all", min_face)
    with _opened(gallery, device, precision, explain) as opened:
        if isinstance(opened, Gallery):
            options.require_detector(opened.bundle, selection)
            if wanted is not None:
                opened.require_identities(wanted.identities)
        if by_person:
            searches = _for_people(opened, k or _DEFAULT_K, exclude_self, selection, people)
        else:
            number = k or (None if within is not None else _DEFAULT_K)
            searches = _for_photos(opened, number, exclude_self, selection, {**common, "within": within})
        answers = [
            *_of_images(searches, asked, part),
            *_of_faces(searches, face or []),
            *(_of_vectors(searches, vectors, _dimension(opened)) if vectors is not None else []),
        ]
        name = str(gallery) if isinstance(opened, Gallery) else opened.info()["folder"]
    decisions = [answer.decision for answer in answers if answer.error is None]
    report_decision_quality(name, decisions, expected=not as_json)
    (print_answers_as_json if as_json else print_answers)(answers, explanation if explain else None)
    if plot is not None:
        draw(answers, plot)
    unreadable = [str(answer.error) for answer in answers if answer.error is not None]
    if unreadable:
        raise InputError("\nfaceprint: ".join(unreadable))


def _opened(gallery: Place, device: str, precision: str, explain: bool) -> "Gallery | Client":
    """Opens a gallery, or connects to the service of one.

    Raises:
        InputError: an option is of no use with a service.
    """
    url = gallery.service
    if url is None:
        return open_gallery(gallery, "search", device=device, precision=precision)
    for option, useless in [
        ("--explain", explain),
        ("--device", device != "auto"),
        ("--precision", precision != "float32"),
    ]:
        options.require(not useless, f"{option} is of no use with the service {url}; leave it out")
    from retrieval.client import connect

    return connect(url, token=os.environ.get(TOKEN_VARIABLE))


def _dimension(opened: "Gallery | Client") -> int:
    from retrieval.gallery.gallery import Gallery

    return opened.bundle.dimension if isinstance(opened, Gallery) else int(opened.info()["dimension"])


def _for_photos(
    gallery: "Gallery | Client",
    k: int | None,
    exclude_self: bool,
    selection: "FaceSelection",
    options: "PhotoSearchOptions",
) -> _Searches:
    return _Searches(
        by_person=False,
        images=partial(gallery.search_faces, k=k, exclude_self=exclude_self, selection=selection, **options),
        face=partial(gallery.search_by_face, k=k, **options),
        vectors=partial(gallery.search_by_vectors, k=k, **options),
    )


def _for_people(
    gallery: "Gallery | Client",
    k: int,
    exclude_self: bool,
    selection: "FaceSelection",
    options: "PeopleSearchOptions",
) -> _Searches:
    return _Searches(
        by_person=True,
        images=partial(
            gallery.search_people_of_faces,
            k=k,
            exclude_self=exclude_self,
            selection=selection,
            **options,
        ),
        face=partial(gallery.search_people_by_face, k=k, **options),
        vectors=partial(gallery.search_people_by_vectors, k=k, **options),
    )


def _where(identities: list[str] | None, conditions: list[str] | None) -> "Where | None":
    if not (identities or conditions):
        return None
    from retrieval.database.filters import Where

    return Where.parse(conditions or []).among(identities or [])


def _listed(path: Path) -> list[Path]:
    """Returns the paths of a list, one per line.

    Raises:
        InputError: it cannot be read, or has no path.
    """
    import os
    import sys

    from retrieval.system.files import open_file_or_pipe

    try:
        if str(path) == "-" and sys.stdin is None:
            raise InputError("There is no standard input to read paths from; name a list of them.")
        if str(path) == "-":
            text = os.fsdecode(sys.stdin.buffer.read())
        else:
            with open_file_or_pipe(path) as file:
                text = file.read().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"The list {path} cannot be read: {reason.lower()}.") from error
    found = [Path(line) for line in text.splitlines() if line.strip()]
    if not found:
        raise InputError(f"There is no path in {path}.")
    return found


def _part(text: str) -> tuple[int, int, int, int]:
    """Returns the left, top, width and height of --crop.

    Raises:
        InputError: they are not four such numbers.
    """
    numbers = [int(number) if number.strip().isdecimal() else -1 for number in text.split(",")]
    if len(numbers) != 4 or min(numbers) < 0 or min(numbers[2:]) < 1:
        raise InputError(
            f"--crop takes left, top, width and height in pixels, as 100,50,200,200, not {text}."
        )
    left, top, width, height = numbers
    return left, top, width, height


def _cropped(image: Path, part: tuple[int, int, int, int] | None) -> "ImageSource":
    """Returns a part of a picture, or its path without one.

    Raises:
        UnreadableImage: the picture cannot be read.
        InputError: the part is not in it.
    """
    if part is None:
        return image
    from retrieval.images.pixels import thumbnail

    left, top, width, height = part
    whole = thumbnail(image, side=_ANY_SIDE)
    if left + width > whole.width or top + height > whole.height:
        raise InputError(f"{image} has {whole.width} x {whole.height} pixels, so --crop is not inside it.")
    return whole.crop((left, top, left + width, top + height))


def _in_whole(faces: Sequence[Any], part: tuple[int, int, int, int] | None) -> Sequence[Any]:
    """Returns the results for the faces of a part of a picture, with their places in the whole picture."""
    if part is None:
        return faces
    import numpy as np

    moved = np.array([[1.0, 0.0, part[0]], [0.0, 1.0, part[1]]])
    return [one if one.face is None else replace(one, face=one.face.moved(moved)) for one in faces]


def _of_images(
    searches: _Searches, images: Sequence[Path], part: tuple[int, int, int, int] | None
) -> Iterator[Answer]:
    """Yields the answers for pictures, or for a part of each, searched in batches.

    Where a picture of a batch cannot be read, its answer is an error, and the others are searched one by one.
    """
    for start in range(0, len(images), _QUERY_BATCH):
        some = images[start : start + _QUERY_BATCH]
        try:
            found = searches.images([_cropped(image, part) for image in some])
            for image, faces in zip(some, found, strict=True):
                yield from answers_of_image(str(image), image, _in_whole(faces, part))
        except UnreadableImage:
            for image in some:
                try:
                    faces = searches.images([_cropped(image, part)])[0]
                    yield from answers_of_image(str(image), image, _in_whole(faces, part))
                except UnreadableImage as error:
                    yield Answer(str(image), image, error=error)


def _of_faces(searches: _Searches, faces: Sequence[int]) -> Iterator[Answer]:
    for number in faces:
        yield answer_of_found(f"face {number}", searches.face(number), searches.by_person)


def _of_vectors(searches: _Searches, path: Path, dimension: int) -> Iterator[Answer]:
    import numpy as np

    try:
        # Never a pickle: loading one can run any code.
        vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {(error.strerror or 'it is no .npy file').lower()}."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is not a .npy file of numbers.") from error
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype.kind not in "fiu":
        raise InputError(f"{path} must hold numbers of shape (n, {dimension}).")
    for start in range(0, len(vectors), _QUERY_BATCH):
        found = searches.vectors(np.asarray(vectors[start : start + _QUERY_BATCH]))
        for row, one in enumerate(found, start):
            yield answer_of_found(f"{path} row {row}", one, searches.by_person)
