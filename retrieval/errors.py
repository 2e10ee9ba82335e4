"""The one tree of errors. Each message is one sentence that says what to do.

FaceprintError                 anything this project raises on purpose
├── InputError                 what was asked or given is wrong (exit status 2)
│   ├── UnreadableImage        a picture that cannot be read; `.reason` is a stable code
│   ├── DataError              a folder of photographs that cannot be used as asked
│   ├── WeightsError           a file of weights that is not a ResNet50's
│   ├── BundleError            a model folder that is missing, incomplete or damaged
│   ├── GalleryError           a gallery folder that is missing, or of a newer version
│   ├── NotFound               a face or an identity that the gallery does not have
│   └── ModelMismatch          a model and a gallery that do not belong together
└── RunError                   the run itself failed (exit status 1)
    ├── GalleryBusy            another process is writing to the gallery
    ├── GalleryDamaged         the gallery's files contradict each other
    ├── StorageError           the disk refused: full, read-only, no permission
    │   ├── ServerUnavailable  a server of a gallery in databases does not answer
    │   └── GalleryReplaced    other files took the place of an open gallery
    ├── OutOfDate              a copy of a published gallery is older than it may be
    ├── MissingDependency      an optional package is not installed
    └── Interrupted            Ctrl-C; what was finished is kept
"""

from enum import StrEnum


class FaceprintError(Exception):
    """Anything this project raises on purpose."""

    exit_status = 1

    @property
    def words(self) -> str:
        """The sentence as words behind a reason: no capital, no full stop."""
        sentence = str(self)
        return sentence[:1].lower() + sentence[1:].rstrip(".")


class InputError(FaceprintError):
    """What was asked or given is wrong."""

    exit_status = 2


class Reason(StrEnum):
    """Why a file was not enrolled. The values are stable: programs may rely on them."""

    EMPTY_FILE = "empty-file"
    NOT_AN_IMAGE = "not-an-image"
    UNSUPPORTED_FORMAT = "unsupported-format"
    UNSUPPORTED_MODE = "unsupported-mode"
    TRUNCATED = "truncated"
    DAMAGED = "damaged"
    TOO_MANY_BYTES = "too-many-bytes"
    TOO_MANY_PIXELS = "too-many-pixels"
    TOO_SLOW = "too-slow"
    IDENTITY_CONFLICT = "identity-conflict"
    BAD_ROW = "bad-row"
    BAD_METADATA = "bad-metadata"
    BAD_IDENTITY = "bad-identity"
    NAME_NOT_UTF8 = "name-not-utf8"
    NOT_A_FILE = "not-a-file"
    LINK_LOOP = "link-loop"
    MISSING = "missing"
    NO_PERMISSION = "no-permission"
    IO_ERROR = "io-error"
    UNREACHABLE = "unreachable"
    NO_FACE = "no-face"
    SEVERAL_FACES = "several-faces"
    FACE_TOO_SMALL = "face-too-small"
    FACE_BLURRED = "face-blurred"
    FACE_TURNED = "face-turned"

    @property
    def may_pass_when_retried(self) -> bool:
        """Whether the cause lies in the machine rather than in the file's own bytes or name."""
        return self in (Reason.MISSING, Reason.NO_PERMISSION, Reason.IO_ERROR, Reason.UNREACHABLE)


class UnreadableImage(InputError):
    """A picture that cannot be read.

    Attributes:
        reason: the stable code.
        detail: what is known beyond the code, for a person.
    """

    def __init__(self, reason: Reason, detail: str, name: str | None = None) -> None:
        self.reason = reason
        self.detail = detail
        self._name = name
        super().__init__(f"{name or 'The image'} cannot be read: {detail} ({reason}).")

    def __reduce__(self) -> tuple[type["UnreadableImage"], tuple[Reason, str, str | None]]:
        # A loader's process sends it to its parent, which builds it again from these.
        return type(self), (self.reason, self.detail, self._name)


class DataError(InputError):
    """A folder of photographs that cannot be used as asked."""


class WeightsError(InputError):
    """A file of weights that is not a ResNet50's."""


class BundleError(InputError):
    """A model folder that is missing, incomplete or damaged."""


class GalleryError(InputError):
    """A gallery folder that is missing, or made by a newer version."""


class NotFound(InputError):
    """A face or an identity that the gallery does not have."""


class ModelMismatch(InputError):
    """A model and a gallery that do not belong together."""


class RunError(FaceprintError):
    """The run itself failed."""


class GalleryBusy(RunError):
    """Another process is writing to the gallery."""


class GalleryDamaged(RunError):
    """The gallery's files contradict each other."""


class StorageError(RunError):
    """The disk refused: full, read-only or without permission."""


class ServerUnavailable(StorageError):
    """A server of a gallery in databases does not answer; it may later, or to another machine."""


class GalleryReplaced(StorageError):
    """Other files took the place of an open gallery, or nothing did; it must be opened again."""


class OutOfDate(RunError):
    """A copy of a published gallery is older than it may be."""


class MissingDependency(RunError):
    """An optional package is not installed."""


class Interrupted(RunError):
    """Ctrl-C; what was finished is kept."""

    exit_status = 130
