"""The command `evaluate`: measures the accuracy of a model, or compares two."""

from pathlib import Path
from typing import Annotated

import typer

from retrieval.cli import options
from retrieval.cli.opening import training_module
from retrieval.system.places import Place


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The model's folder; with --compare, A.", show_default=False)],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A folder with one subfolder of photos per identity; with --compare, B.", show_default=False)],
    compared_on: Annotated[Path | None, typer.Argument(metavar="DATA", help="With --compare of two models: the photos to evaluate both on.", show_default=False)] = None,
    protocol: Annotated[str | None, typer.Option(metavar="closed|open|lfw-pairs", help="Identify an enrolled person, identify or reject a stranger, or compare two photos.", show_default="closed; open with --gallery")] = None,
    gallery: Annotated[Place | None, typer.Option(metavar="GALLERY", help="Search DATA's photos in this gallery.", show_default=False, parser=Place.of)] = None,
    pairs: Annotated[Path | None, typer.Option(metavar="FILE", help="For lfw-pairs: pairs and folds, as LFW's pairs.txt.", show_default=False)] = None,
    weights: Annotated[str | None, typer.Option(metavar="imagenet|FILE", help="What training started from: measures the network before fine-tuning too.", show_default=False)] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Lay two folders of --out, or two models, side by side, with paired tests.")] = False,
    out: Annotated[Path | None, options.output("FOLDER", "Write report.html, metrics.json and photos.csv; with --compare, report.html and comparison.json.")] = None,
    check: Annotated[Path | None, typer.Option(metavar="FILE.json", help="With --out: show what `faceprint check --json-file` found in the report.", show_default=False)] = None,
    val_fraction: Annotated[float, options.val_fraction("Share of each identity's photos to search for, where the model's own split does not say.")] = 0.3,
    min_images: Annotated[int, typer.Option(min=2, help="For open: identities with so many photos are enrolled, the others are strangers.")] = 10,
    exclude: options.Exclude = None,
    seed: Annotated[int, options.seed("Of the split and of the intervals.")] = 0,
    workers: options.Workers = None,
    as_json: options.Json = False,
    log_json: Annotated[bool, typer.Option("--log-json", help="Print progress, rejected photos and the results as lines of JSON instead of text.")] = False,
    device: options.Device = "auto",
    precision: options.Precision = "float32",
) -> None:  # fmt: skip
    """Measure how good a model is, each figure with its 95% interval, beside baselines on the same photos."""
    options.require(compare or compared_on is None, "A third folder goes with --compare; name MODEL and DATA")
    printing = training_module("commands.evaluate")
    chosen = printing.EvaluationOptions(
        protocol=protocol,
        gallery=gallery,
        pairs=pairs,
        weights=weights,
        fraction=val_fraction,
        min_images=min_images,
        seed=seed,
        workers=workers,
        device=device,
        precision=precision,
        exclude=tuple(exclude or ()),
    )
    if compare:
        printing.compare(model, data, compared_on, options=chosen, out=out, as_json=as_json)
    else:
        printing.evaluate(
            model, data, options=chosen, out=out, as_json=as_json, check=check, log_json=log_json
        )
