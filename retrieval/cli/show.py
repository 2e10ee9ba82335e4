"""The commands that print the facts of a model or a gallery: `model` and `info`."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from retrieval.cli import options
from retrieval.cli.opening import open_gallery, training_module
from retrieval.console import terminal

if TYPE_CHECKING:
    from retrieval.gallery.info import GalleryInfo
    from retrieval.models.bundle import ModelBundle


def model(
    model: options.Model,
    layer_table: Annotated[
        bool, typer.Option("--layer-table", help="Print the table of layers too (needs torch).")
    ] = False,
) -> None:
    """Show a model's card: labels, preprocessing, recipe, figures, fingerprint.

    `faceprint model import` makes a model of an ONNX file.
    """
    from retrieval.models.bundle import ModelBundle

    bundle = ModelBundle.load(model)
    if layer_table:
        bundle.require_trained("shown as a table of layers")
    _print_card(bundle)
    if layer_table:
        training_module("commands.train").print_layers(bundle)


def _print_card(bundle: "ModelBundle") -> None:
    figures = {
        key.replace("_", " "): f"{value:.4f}" if isinstance(value, float) and value <= 1 else value
        for key, value in bundle.figures.items()
    }
    faces = bundle.preprocessing.faces
    recipe = {key.replace("_", " "): value for key, value in bundle.recipe.items()}
    terminal.print_facts(
        f"Model {bundle.folder}",
        {
            "architecture": bundle.architecture,
            "labels": _labels(bundle),
            "preprocessing": f"{bundle.preprocessing}, RGB uint8",
            "embedding": f"{_embedding(bundle)}, {bundle.dimension} float32 numbers",
            **({} if bundle.imported else {"split": _split(bundle)}),
            "created": f"{bundle.created_at} with "
            + ", ".join(f"{k} {v}" for k, v in bundle.versions.items()),
            "fingerprint": bundle.fingerprint,
            **(
                {} if faces is None else {"face detector": f"SHA-256 {faces.detector}, score {faces.score:g}"}
            ),
            **({"model card": bundle.description_path.name} if bundle.description_path.is_file() else {}),
        },
    )
    if not bundle.imported:
        terminal.print_facts("Figures", figures)
    terminal.print_facts("Imported from" if bundle.imported else "Recipe", recipe)


def _labels(bundle: "ModelBundle") -> str:
    if bundle.imported:
        return "none: an imported model has no classifier"
    shown, more = ", ".join(bundle.labels[:8]), len(bundle.labels) - 8
    return f"{len(bundle.labels):,}: {shown}" + (f", and {more} more" if more > 0 else "")


def _embedding(bundle: "ModelBundle") -> str:
    if bundle.imported:
        return f"output {bundle.recipe['output']}, {bundle.embedding.length} length"
    return str(bundle.embedding)


def _split(bundle: "ModelBundle") -> str:
    train, held_out = (len(bundle.split.get(part, [])) for part in ("train", "validation"))
    return f"{train:,} photos to learn from, {held_out:,} held out"


def info(gallery: options.Gallery, as_json: options.Json = False) -> None:
    """Show what a gallery holds."""
    with open_gallery(gallery, "info") as opened:
        facts = opened.info()
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(facts), ensure_ascii=False, indent=1))
        return
    terminal.print_facts(
        f"Gallery {facts.folder}",
        {
            "faces": f"{facts.faces:,} of {facts.identities:,} identities"
            + (f", {facts.faces_without_identity:,} without one" if facts.faces_without_identity else ""),
            "most photos": ", ".join(f"{name} {number:,}" for name, number in facts.largest[:5])
            or "none yet",
            "on disk": f"{terminal.size(facts.vector_bytes)} of vectors in "
            f"{facts.vectors or terminal.counted(facts.segments, 'file')}, "
            f"{terminal.size(facts.database_bytes)} of metadata",
            "search": _how_searched(facts),
            "decisions": _how_decided(facts),
            "embedding": f"{facts.dimension} float32 numbers, exact Euclidean distance",
            "classifier": f"{facts.classifier_labels:,} identities, {facts.input_size} x {facts.input_size} pixels"
            if facts.classifier_labels
            else f"none; {facts.input_size} x {facts.input_size} pixels",
            "model": facts.fingerprint,
            "created": facts.created_at,
            **({"copy of": _how_old(facts.follows)} if facts.follows else {}),
            **({"twins": [in_one_line(names) for names in facts.twins[:TWINS_SHOWN]]} if facts.twins else {}),
        },
    )


def _how_old(follows: Mapping[str, Any]) -> str:
    """Returns what a copy follows, and its age, in words."""
    limit = follows["max_age"]
    allowed = "" if limit is None else f"; searches are refused from {limit:,.0f} s on"
    return (
        f"{follows['address']}, state {follows['number']:,}, by {follows['publisher']}; "
        f"{follows['age_seconds']:,.0f} s old{allowed}"
    )


def _how_searched(facts: "GalleryInfo") -> str:
    """Returns how the gallery is searched, in words."""
    if facts.vectors is not None:
        return "Milvus compares every vector in float32; the nearest are proven in float64"
    if facts.coordinates is None:
        return "reads every vector; `faceprint compact` learns codes from 4,096 faces on"
    if not facts.coordinates:
        return "reads every vector: codes of these would not rule enough out"
    share = facts.coded_faces / facts.faces if facts.faces else 0.0
    return (
        f"by codes of {facts.coordinates} bytes, learned from the gallery, for {share:.1%} of the faces "
        f"({terminal.size(facts.codes_bytes)}); exact, as reading every vector is"
    )


def _how_decided(facts: "GalleryInfo") -> str:
    """Returns the threshold of decisions and the error rates to expect, in words."""
    from retrieval.database.records import Calibration
    from retrieval.search.calibration import foretold

    if facts.calibration is None:
        return "none: there is no threshold yet; find one with `faceprint calibrate`"
    found = Calibration.of(facts.calibration)
    point = found.point()
    if point is None:
        return "none"
    return f"UNKNOWN beyond {point.threshold:.3f}, for an FPIR of {point.fpir:g}; {foretold(point)}"


# Groups of names that are printed at most; each group may be one person.
TWINS_SHOWN: Final = 5


def in_one_line(twins: Sequence[str]) -> str:
    """Returns names that may be one person's as one line; names with unusual spaces are quoted."""
    shown = [repr(name) if name != " ".join(name.split()) else name for name in twins]
    return f"{', '.join(shown[:-1])} and {shown[-1]} are {len(twins)} identities"
