"""The arguments and options that several commands share, each defined once."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from retrieval.errors import InputError
from retrieval.system.places import Place

if TYPE_CHECKING:
    from retrieval.images.photo_reader import FaceSelection
    from retrieval.models.bundle import ModelBundle

# Every random generator in use accepts this seed and the next one.
_MAX_SEED: Final = 2**63 - 2

_SOURCES: Final = "Folders with one subfolder per identity, flat folders, files, archives (.tar, .tar.gz, .zip), lists (.txt, .csv, .parquet), addresses; - for paths on standard input."

Gallery = Annotated[Place, typer.Argument(metavar="GALLERY", help="The gallery's folder, or the address of its database.", show_default=False, parser=Place.of)]  # fmt: skip
Vectors = Annotated[str | None, typer.Option("--vectors-at", metavar="milvus://HOST:PORT/COLLECTION", help="Where a new gallery in a database has its vectors.", show_default=False)]  # fmt: skip
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The model's folder.", show_default=False)]

OptionalSources = Annotated[list[str] | None, typer.Argument(metavar="[SOURCE...]", help=_SOURCES, show_default=False)]  # fmt: skip
Sources = Annotated[list[str], typer.Argument(metavar="SOURCE...", help=_SOURCES, show_default=False)]
IdentityFrom = Annotated[str | None, typer.Option(metavar="first|parent|none|COLUMN|REGEX", help="What names the person: the first folder below the source, the folder of the file, nothing, a column of a list, or a regular expression (with a group in parentheses) on the path below the source.", show_default="first; in lists the column identity, else parent")]  # fmt: skip
Exclude = Annotated[list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="Pass over files and folders, as in .gitignore: '*.gif', raw/, /Ada/old; may be repeated.", show_default=False)]  # fmt: skip
Fetch = Annotated[bool, typer.Option("--fetch", help="Read photos at addresses too, from hosts that `ingest` enrolled photos from.")]  # fmt: skip

Detector = Annotated[str | None, typer.Option(metavar="yunet|FILE.onnx", help="Find and align faces with this detector: yunet (OpenCV zoo's, downloaded), or a FILE of its family.", show_default=False)]  # fmt: skip
Margin = Annotated[
    float, typer.Option(help="Context around an aligned face on each side, as a share of its side.")
]

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ... or several: cuda:0,cuda:1")]
Precision = Annotated[str, typer.Option(metavar="float32|bf16|fp16", help="float32, bf16 or fp16; fewer bits are quicker on a GPU and move distances a little.")]  # fmt: skip
BatchSize = Annotated[int | None, typer.Option(min=1, help="Photos that are embedded together.", show_default="64 on a CPU, what a GPU is fastest with")]  # fmt: skip
Workers = Annotated[int | None, typer.Option(min=1, help="How many read photos side by side: threads.", show_default="one per processor")]  # fmt: skip
Decoders = Annotated[int | None, typer.Option(min=0, help="Processes that decode what the threads read; 0: the threads do.", show_default="0 on a CPU, one per core beside a GPU")]  # fmt: skip
Faces = Annotated[str | None, typer.Option("--faces", metavar="largest|one|all|none", help="Which faces of a photo, for a model with a face detector: the largest and most central; the only one, so that photos with several are rejected; all, of photos without a name; or none, which takes the middle square of the picture as it is.", show_default="largest of a photo with a name, all of one without")]  # fmt: skip
MinFace = Annotated[float | None, typer.Option("--min-face", metavar="PIXELS", help="Reject faces with a shorter side below this.", show_default="20")]  # fmt: skip
MinSharpness = Annotated[float | None, typer.Option("--min-sharpness", help="Reject faces that are more blurred than this: the standard deviation of the aligned face's Laplacian.", show_default=False)]  # fmt: skip
MaxYaw = Annotated[float | None, typer.Option("--max-yaw", help="Reject faces that are turned to a side by more than this: 0 is frontal, 1 about a profile.", show_default=False)]  # fmt: skip
PhotoSeconds = Annotated[float, typer.Option(min=0.001, help="Seconds that decoding one photo may take.")]

JsonFile = Annotated[Path | None, typer.Option("--json-file", metavar="FILE.json", help="Write everything that was found as JSON.", show_default=False)]  # fmt: skip
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Print progress, rejected files and the summary as lines of JSON instead of text.")]  # fmt: skip
Summary = Annotated[Path | None, typer.Option(metavar="FILE.json", help="Write counts, stage times, rates and peak memory.", show_default=False)]  # fmt: skip
StrictFiles = Annotated[bool, typer.Option("--strict", help="Exit with 1 when any file was rejected.")]


def val_fraction(held_out: str) -> Any:
    """Returns the option `--val-fraction` of a command that splits photos."""
    return typer.Option("--val-fraction", callback=_share, help=held_out)


def seed(drawn: str) -> Any:
    """Returns the option `--seed` of a command that draws random numbers."""
    return typer.Option(min=0, max=_MAX_SEED, help=drawn)


def report(lines: str) -> Any:
    """Returns the option `--report` of a command that writes a line for each of something."""
    return typer.Option(metavar="FILE.jsonl", help=f"Write a line for each {lines}.", show_default=False)


def output(metavar: str, what: str) -> Any:
    """Returns the option `--out` of a command that makes a file or a folder."""
    return typer.Option(metavar=metavar, help=what, show_default=False)


def face_selection(
    faces: str | None,
    min_face: float | None,
    min_sharpness: float | None = None,
    max_yaw: float | None = None,
) -> "FaceSelection":
    """Returns which faces are read, by the options that were given.

    Raises:
        InputError: there is no such choice, or a limit is negative.
    """
    require(
        faces in (None, "largest", "one", "all", "none"),
        f"--faces is {faces!r}; choose of largest, one, all, none",
    )
    from retrieval.images.photo_reader import FaceSelection

    given: dict[str, Any] = {
        "faces": faces or "auto",
        "min_side": min_face,
        "min_sharpness": min_sharpness,
        "max_yaw": max_yaw,
    }
    return FaceSelection(**{name: value for name, value in given.items() if value is not None})


def require_detector(bundle: "ModelBundle", selection: "FaceSelection") -> None:
    """Checks that a model finds faces, where options say which.

    Raises:
        InputError: it takes pictures as they are.
    """
    from retrieval.images.photo_reader import FaceSelection

    require(
        bundle.preprocessing.faces is not None or selection in (FaceSelection("auto"), FaceSelection("all")),
        f"The model {bundle.folder} has no face detector and takes pictures as they are, so --faces and limits "
        "on faces are of no use; leave them out",
    )


def _share(value: float | None) -> float | None:
    require(value is None or 0 < value < 1, "--val-fraction must lie between 0 and 1")
    return value


def require(holds: bool, sentence: str) -> None:
    """Checks a condition on the arguments of a command.

    Raises:
        InputError: `holds` is false; the text is `sentence`, given without its full stop.
    """
    if not holds:
        raise InputError(f"{sentence}.")
