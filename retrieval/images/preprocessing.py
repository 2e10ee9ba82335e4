"""`Preprocessing`: what a model states about the pixels that it takes. It is a part of its fingerprint."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from retrieval.errors import InputError
from retrieval.images.picture import Colour

# The name of a set of positions of landmarks; see `alignment.TEMPLATES`.
Template = Literal["arcface"]

# The version of the search for faces (`retrieval.images.detection`) and of their alignment. Raise it with any
# change that moves pixels: vectors of both versions cannot be compared. Version 1 takes longer for close-ups.
FACES_VERSION: Final = 2

# The largest margin around an aligned face, as a share of its side: beyond it most pixels are background.
_MAX_MARGIN: Final = 2.0


@dataclass(frozen=True)
class FaceAlignment:
    """How a model's faces are found in a photo and aligned.

    Attributes:
        detector: SHA-256, in hex, of the face detector's file.
        score: the least score of a face, above 0 and at most 1.
        template: the positions of the five landmarks in an aligned face (`alignment.TEMPLATES`).
        margin: context that is added on each side of the template's square, as a share of its side.
        version: of the search and the alignment.

    Raises:
        InputError: a value is outside its range.
    """

    detector: str
    score: float = 0.7
    template: Template = "arcface"
    margin: float = 0.0
    version: int = FACES_VERSION

    def __post_init__(self) -> None:
        if not 0 < self.score <= 1:
            raise InputError(f"The least score of a face is {self.score}; it must be above 0 and at most 1.")
        if not 0 <= self.margin <= _MAX_MARGIN:
            raise InputError(
                f"The margin around a face is {self.margin}; it must be between 0 and {_MAX_MARGIN:g}."
            )
        if self.template not in get_args(Template):
            raise InputError(
                f"There is no template {self.template}; choose of {', '.join(get_args(Template))}."
            )
        if not 1 <= self.version <= FACES_VERSION:
            raise InputError(
                f"Version {self.version} of the alignment of faces is not known; upgrade faceprint."
            )


@dataclass(frozen=True)
class Preprocessing:
    """The conversion of a picture to the pixels of this model.

    Attributes:
        size: side of the square in pixels.
        crop: share of the shorter side that is kept, centred; used where no faces are searched for.
        colour: the treatment of colour profiles. Older models, without this field in their cards, ignore
            them.
        faces: how faces are found and aligned; None for the central square of the picture.
    """

    size: int
    crop: float
    colour: Colour = "ignore"
    faces: FaceAlignment | None = None

    def stated(self) -> dict[str, Any]:
        """Returns the fields that cards and fingerprints state.

        Fields that older versions did not have are left out where they have no effect: models that were made
        before keep their fingerprints.
        """
        fields = dataclasses.asdict(self)
        if self.colour == "ignore":
            del fields["colour"]
        if self.faces is None:
            del fields["faces"]
        return fields

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Preprocessing":
        """Returns the preprocessing from the result of `stated`.

        Raises:
            TypeError, InputError: this version does not know a field or a value.
        """
        faces = fields.get("faces")
        found = cls(**{**fields, "faces": None if faces is None else FaceAlignment(**faces)})
        if found.colour not in get_args(Colour):
            known = ", ".join(get_args(Colour))
            raise InputError(f"There is no use of colour profiles {found.colour}; choose of {known}.")
        return found

    def __str__(self) -> str:
        if self.faces is None:
            words = [f"central square of {self.crop:g} x the shorter side"]
        else:
            words = ["faces aligned by five landmarks"]
            if self.faces.margin:
                words[0] += f" with a margin of {self.faces.margin:g}"
        words.append(f"{self.size} x {self.size} pixels")
        return ", ".join([*words, "colours converted to sRGB"] if self.colour == "srgb" else words)
