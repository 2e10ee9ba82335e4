"""The command that makes a model of a network in an ONNX file: `model import`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from retrieval.cli import options
from retrieval.console import terminal
from retrieval.errors import InputError


def import_(
    network: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="The network: one image in, an embedding out.", show_default=False)],
    out: Annotated[Path, options.output("MODEL", "The new model's folder.")],
    preset: Annotated[str | None, typer.Option(metavar="arcface|sface|adaface", help="How a project's networks take pictures: InsightFace's recognition models, OpenCV zoo's SFace, AdaFace. Other options override it.", show_default=False)] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Side of the network's input in pixels.", show_default="what FILE.onnx states")] = None,
    colour: Annotated[str | None, typer.Option(metavar="rgb|bgr", help="The order of its channels.", show_default="the preset's")] = None,
    mean: Annotated[str | None, typer.Option(metavar="M|M,M,M", help="Its input is (x - M) / S for x of 0 to 255; one number, or one for each channel.", show_default="the preset's")] = None,
    std: Annotated[str | None, typer.Option(metavar="S|S,S,S", help="See --mean.", show_default="the preset's")] = None,
    layout: Annotated[str | None, typer.Option(metavar="nchw|nhwc", help="Where its channels are.", show_default="what FILE.onnx states")] = None,
    length: Annotated[str | None, typer.Option(metavar="raw|unit", help="raw, or unit: embeddings divided by their Euclidean length.", show_default="unit")] = None,
    output: Annotated[str | None, typer.Option(metavar="NAME", help="The tensor that is the embedding.", show_default="the only output")] = None,
    detector: options.Detector = None,
    margin: options.Margin = 0.0,
    mirrored: Annotated[bool, typer.Option("--mirrored", help="Embed each picture together with its mirror image: fewer errors, twice the time.")] = False,
) -> None:  # fmt: skip
    """Make a model of an embedding network in an ONNX file.

    The network is tried on a few pictures first. Without --detector photos must be cropped and aligned as it
    expects them. The model has no classifier: a search says which photos are closest, and no more.
    """
    from retrieval.models.detectors import open_detector
    from retrieval.models.importing import import_model

    # What stands only in a few words is checked there.
    chosen: dict[str, Any] = {"colour": colour, "layout": layout, "length": length}
    made = import_model(
        network,
        out,
        **chosen,
        preset=preset,
        size=size,
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
        output=output,
        detector=None if detector is None else open_detector(detector),
        margin=margin,
        mirrored=mirrored,
    )
    terminal.console().print(
        terminal.text(
            f"imported {network.name}: {made.dimension:,} numbers for {made.preprocessing}; fingerprint "
            f"{made.fingerprint[:12]}"
        )
    )


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"{option} is {text}; give one number, or three with commas.") from error
