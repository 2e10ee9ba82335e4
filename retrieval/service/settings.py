"""The settings of the service: its gallery and address, and the limits of requests."""

import ipaddress
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from retrieval.errors import InputError
from retrieval.system.places import Place

MIB: Final = 2**20


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests may take; each limit is checked before the work that it bounds.

    Attributes:
        body_bytes: the bytes of a request's body.
        pending: the requests that are read or answered at the same time; more get the status 429.
        pending_bytes: the bytes of their bodies together.
        pixels: the pixels of a photo, by its header.
        results: the greatest k, and the number of results of a search without k.
        text_bytes: the bytes of a text field of a form.
        body_seconds: the time for receiving a body.
        read_seconds: how long a client may read nothing of a response that waits for it.
        photo_seconds: the time for decoding a photo.
        answer_seconds: the time for answering.
        header_seconds: the time for receiving the header of a request on a new connection.
        idle_seconds: how long a connection without a request is kept.
        drain_seconds: how long requests may go on after SIGTERM.
        connections: open connections of a process; more are closed at once.
        rate: requests per second of one token, or of one address where no token is needed, in a process; None
            for no limit.
    """

    body_bytes: int = 32 * MIB
    pending: int = 64
    pending_bytes: int = 256 * MIB
    pixels: int = 50_000_000
    results: int = 1000
    text_bytes: int = 64 * 1024
    body_seconds: float = 30.0
    read_seconds: float = 30.0
    photo_seconds: float = 20.0
    answer_seconds: float = 60.0
    header_seconds: float = 10.0
    idle_seconds: float = 15.0
    drain_seconds: float = 30.0
    connections: int = 512
    rate: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not value > 0:
                raise InputError(f"`{name}` is {value}; it must be above 0.")
        # Otherwise no request with the largest body could ever be admitted.
        if self.pending_bytes < self.body_bytes:
            object.__setattr__(self, "pending_bytes", self.body_bytes)


@dataclass(frozen=True, slots=True)
class Settings:
    """How a gallery is served.

    Attributes:
        gallery: the gallery's folder, or the address of its database.
        host, port: the address; port 0 is any free one.
        workers: the number of processes that answer.
        device, precision: see `Embedder.open`.
        access_log: log a line for each request.
        sources: the folders below which jobs may read photos.
        certfile, keyfile: the certificate, with those that lead to its authority, and its private key, in
            PEM: the service speaks TLS; None for HTTP, and for a key in the certificate's file.
        limits: of requests.
    """

    gallery: Path | Place
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    device: str = "auto"
    precision: str = "float32"
    access_log: bool = False
    sources: tuple[Path, ...] = ()
    certfile: Path | None = None
    keyfile: Path | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise InputError(f"`port` is {self.port}; it must be between 0 and {2**16 - 1:,}.")
        if self.workers < 1:
            raise InputError(f"`workers` is {self.workers}; it must be at least 1.")
        if self.keyfile is not None and self.certfile is None:
            raise InputError("A `keyfile` belongs to a certificate; give its `certfile` too.")

    @property
    def place(self) -> Place:
        """Where the gallery is."""
        return Place.of(self.gallery)

    def to_json(self) -> str:
        """Returns the settings as one line of JSON, for another process."""
        return json.dumps(asdict(self) | {"gallery": self.place.text}, default=os.fspath)

    @classmethod
    def from_json(cls, text: str) -> "Settings":
        """Returns the settings from the result of `to_json`."""
        fields: Mapping[str, Any] = json.loads(text)
        paths = {name: Path(fields[name]) for name in ("certfile", "keyfile") if fields[name]}
        place, sources = Place.of(fields["gallery"]), tuple(map(Path, fields["sources"]))
        gallery = place.folder or place
        return cls(
            **{
                **fields,
                **paths,
                "gallery": gallery,
                "sources": sources,
                "limits": Limits(**fields["limits"]),
            }
        )


def is_loopback(address: str) -> bool:
    """Returns whether an IP address can be reached from this machine alone."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
