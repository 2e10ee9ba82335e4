"""Output of `search`: prints answers as tables or JSON, and draws them as a picture."""

import io
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from retrieval.cli.output import write_file
from retrieval.console import terminal
from retrieval.search.answers import Answer, answer_json, explained

if TYPE_CHECKING:
    from retrieval.images.panel import PanelRow
    from retrieval.index.knn import Explanation
    from retrieval.search.decisions import Decision
    from retrieval.search.nearest import Match, Prediction


def report_decision_quality(gallery: str, decisions: "Sequence[Decision | None]", *, expected: bool) -> None:
    """Prints one line on standard error about how far the decisions of a search can be trusted, if any is due.

    It says that there are no decisions, since the gallery has no threshold; or that the gallery has grown
    since its threshold was chosen; or, with `expected`, how many wrong identifications to expect.

    Args:
        gallery: its folder or address, for the command that mends it.
        decisions: of all answers. One line stands for all: the threshold is the same.
        expected: whether to print the expected number where nothing is wrong.
    """
    if not decisions:
        return
    first = decisions[0]
    if first is None:
        typer.echo(
            f"no decision: {gallery} has no threshold; find one with `faceprint calibrate {shlex.quote(str(gallery))}`",
            err=True,
        )
    elif first.outgrown:
        typer.echo(
            f"{gallery} has grown since it was calibrated for an FPIR of {first.fpir:g}: expect about "
            f"{first.expected_fpir:.2g}, and run `faceprint calibrate {shlex.quote(str(gallery))}` again",
            err=True,
        )
    elif first.upcoming is not None and expected:
        typer.echo(f"decided for an FPIR of {first.fpir:g}: {first.upcoming.in_words()}", err=True)


def print_answers_as_json(answers: Sequence[Answer], explanation: "Explanation | None") -> None:
    """Prints answers as a JSON list; with an explanation, as an object with both."""
    shown: Any = [answer_json(answer) for answer in answers]
    if explanation is not None:
        shown = {"answers": shown, "explanation": explained(explanation)}
    typer.echo(json.dumps(shown, ensure_ascii=False, indent=1))


def print_answers(answers: Sequence[Answer], explanation: "Explanation | None") -> None:
    """Prints a table for each answer without an error, and the explanation if given."""
    for answer in answers:
        if answer.error is None:
            _print_answer(answer)
    if explanation is not None:
        _print_explanation(explanation)


def _print_explanation(explanation: "Explanation") -> None:
    facts = explained(explanation)
    stages = ", ".join(f"{stage} {time:,.1f}" for stage, time in facts["milliseconds"].items())
    size = terminal.size(facts["bytes read"])
    terminal.print_facts("What it took", facts | {"milliseconds": stages, "bytes read": size})


def _print_answer(answer: Answer) -> None:
    from rich.table import Table

    console = terminal.console()
    console.print(terminal.text(answer.query + _face_in_words(answer), "bold"))
    if answer.prediction is not None:
        prediction = answer.prediction
        console.print(terminal.text(f"classifier: {prediction.identity} ({prediction.probability:.0%})"))
    if answer.decision is not None:
        console.print(terminal.text(f"decision: {_decision_in_words(answer.decision)}"))
    rows = list(_table_rows(answer))
    if not rows:
        console.print("No face is near enough, or none matches the conditions.\n")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("#", justify="right")
    table.add_column("identity")
    table.add_column("distance", justify="right")
    table.add_column("face", justify="right")
    table.add_column("photo", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, soft_wrap=False)
    console.print()


def _face_in_words(answer: Answer) -> str:
    """Returns which face of a picture an answer is about, and its box; "" where it is about all of it."""
    if answer.face is None:
        return ""
    which = f"face {answer.number} of {answer.faces}, " if answer.faces > 1 else "face "
    return f" ({which}{_box_in_words(answer.face.box)})"


def _box_in_words(box: "tuple[float, float, float, float]") -> str:
    """Returns the size and the position of a box, in pixels."""
    left, top, width, height = box
    return f"{width:.0f} x {height:.0f} at {left:.0f}, {top:.0f}"


def _decision_in_words(decision: "Decision") -> str:
    """Returns a decision as text, with its distance, threshold and margin."""
    if decision.distance is None:
        return "UNKNOWN (there is no face to compare with)"
    words = [f"{decision.distance:.3f} away, threshold {decision.threshold:.3f}"]
    if decision.margin is not None:
        words.append(f"{decision.second} is {decision.margin:.3f} farther")
    if decision.classifier_agrees is not None:
        words.append(f"the classifier {'agrees' if decision.classifier_agrees else 'disagrees'}")
    name = "UNKNOWN" if decision.identity is None else decision.identity
    return f"{name} ({'; '.join(words)})"


def _table_rows(answer: Answer) -> Iterator[tuple[Any, ...]]:
    """Yields the rows of the table: photos, or people with their photos below them.

    A row has a cell for each column: rank, identity, distance, face, photo.
    """
    for rank, match in enumerate(answer.matches or (), 1):
        yield str(rank), terminal.text(match.face.identity or "-"), *_match_cells(match)
    for rank, person in enumerate(answer.people or (), 1):
        yield str(rank), terminal.text(person.identity), f"{person.distance:.3f}", "", ""
        for match in person.matches:
            yield "", "", *_match_cells(match)


def _match_cells(match: "Match") -> tuple[Any, ...]:
    """Returns the cells distance, face and photo of a match."""
    face = match.face
    where = "" if face.box is None else f" ({_box_in_words(face.box)})"
    return f"{match.distance:.3f}", str(face.id), terminal.text(terminal.relative_path(face.path) + where)


def draw(answers: Sequence[Answer], path: Path) -> None:
    """Draws each query picture beside its closest photos, as a PNG file; writes no file without query pictures.

    Raises:
        InputError: its path does not lead to a file that can be written.
        RunError: the disk refused.
    """
    from retrieval.images.panel import panel

    rows = [_panel_row(answer) for answer in answers if answer.image is not None and answer.error is None]
    if not rows:
        return
    picture = io.BytesIO()
    panel(rows, heading="Query and closest photos, by Euclidean distance").save(picture, format="PNG")
    write_file(path, picture.getvalue(), what="The picture")
    typer.echo(f"drew {path}", err=True)


def _panel_row(answer: Answer) -> "PanelRow":
    """Returns the query picture of an answer and the photos of its matches, with their captions."""
    from retrieval.images.panel import PanelRow, Tile

    assert answer.image is not None
    query = Tile(
        answer.image,
        answer.image.name,
        _caption(answer.prediction, answer.decision),
        box=None if answer.face is None else answer.face.box,
    )
    matches = answer.matches or [match for person in answer.people or () for match in person.matches]
    return PanelRow(
        query,
        [
            Tile(
                match.face.path or b"",
                match.face.identity or "unknown",
                f"distance {match.distance:.3f}",
                box=match.face.box,
            )
            for match in matches
        ],
    )


def _caption(prediction: "Prediction | None", decision: "Decision | None") -> str:
    """Returns the caption of a query picture; "" without a decision and a prediction."""
    if decision is not None:
        return f"decision: {decision.identity or 'UNKNOWN'}"
    return "" if prediction is None else f"classifier: {prediction.probability:.0%} {prediction.identity}"
