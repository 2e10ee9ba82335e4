"""`Place`: what stands where a gallery is named: a folder, the address of a database, or of a service."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_DATABASE: Final = re.compile(r"postgresql(\+\w+)?://")
_SERVICE: Final = re.compile(r"https?://[^/]")
_PASSWORD: Final = re.compile(r"(://[^/@?:]*):[^/@]*@")
_PASSWORD_OPTION: Final = re.compile(r"(?<=[?&])password=[^&]*&?")


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
        return cls(text if _DATABASE.match(text) or _SERVICE.match(text) else str(Path(text)))

    @property
    def database(self) -> str | None:
        """The address of a database, perhaps with a password; None for another place."""
        return self.text if _DATABASE.match(self.text) else None

    @property
    def service(self) -> str | None:
        """The address of a service; None for another place, and where there is a folder of that name."""
        # A folder may have such a name: `Path("http://host")` is `http:/host`.
        return self.text if _SERVICE.match(self.text) and not Path(self.text).exists() else None

    @property
    def folder(self) -> Path | None:
        """The folder; None for the address of a database."""
        return None if _DATABASE.match(self.text) else Path(self.text)

    def __fspath__(self) -> str:
        return self.text

    def __str__(self) -> str:
        if self.database is None:
            return self.text
        return _PASSWORD_OPTION.sub("", _PASSWORD.sub(r"\1@", self.text)).rstrip("?&")
