"""`Place`: what stands where a gallery is named: a folder, the address of a database, or of a service."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# With one slash it is an address that went through a path; it is refused as such, and makes no folder.
_DATABASE: Final = re.compile(r"postgres\w*(\+\w+)?:/", re.IGNORECASE)
_SERVICE: Final = re.compile(r"https?://[^/]", re.IGNORECASE)
_ADDRESS: Final = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
# Up to the last @: a password may have one, or a slash or question mark, though it should not.
_PASSWORD: Final = re.compile(r"^([^:/]*:/+[^/@?:]*):(?:[^?]*@|.*@)", re.DOTALL)
_PASSWORD_OPTION: Final = re.compile(r"(?<=[?&])[^=&]*(?:pass|secret)[^=&]*=[^&]*&?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a gallery is.

    As a text it is what messages call it, an address without its password; as a path, what was given.

    Attributes:
        text: as it was given, of a folder without superfluous slashes.
    """

    text: str

    @classmethod
    def of(cls, given: "str | os.PathLike[str]") -> "Place":
        """Returns the place of a text or of a path."""
        if isinstance(given, Place):
            return given
        text = os.fspath(given)
        return cls(text if _DATABASE.match(text) or _ADDRESS.match(text) else str(Path(text)))

    @property
    def database(self) -> str | None:
        """The address of a database, perhaps with a password; None for another place.

        An address of another kind is one too, which is refused where it is opened: it is never a new folder.
        """
        if self.service is not None or not (_DATABASE.match(self.text) or _ADDRESS.match(self.text)):
            return None
        return None if Path(self.text).exists() else self.text

    @property
    def service(self) -> str | None:
        """The address of a service; None for another place, and where there is a folder of that name."""
        # A folder may have such a name: `Path("http://host")` is `http:/host`.
        return self.text if _SERVICE.match(self.text) and not Path(self.text).exists() else None

    @property
    def folder(self) -> Path | None:
        """The folder; None for the address of a database."""
        return Path(self.text) if self.database is None else None

    def __fspath__(self) -> str:
        return self.text

    def __str__(self) -> str:
        if not (_DATABASE.match(self.text) or _ADDRESS.match(self.text)):
            return self.text
        return _PASSWORD_OPTION.sub("", _PASSWORD.sub(r"\1@", self.text)).rstrip("?&")
