"""Blocks of photos: each becomes a part, with a name that its photos decide."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from retrieval.errors import InputError
from retrieval.sources.photos import Photo

# Bytes of photos with content in a block; a block ends with the photo that exceeds it.
_MAX_BYTES: Final = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Block:
    """Photos that one worker embeds into one part.

    Attributes:
        number: from 0, in the order of the photos; parts in the order of their names are in that order too.
        photos: at least one.
    """

    number: int
    photos: tuple[Photo, ...]

    @property
    def part(self) -> str:
        """The file name of the part: the number, and a hash of what the photos are."""
        digest = hashlib.sha256()
        for photo in self.photos:
            content = hashlib.sha256(photo.content).hexdigest() if isinstance(photo.content, bytes) else None
            metadata: Mapping[str, object] = photo.metadata
            said = [photo.path, photo.identity, photo.problem, metadata, content]
            digest.update(json.dumps(said, sort_keys=True).encode())
        return f"part-{self.number:08}-{digest.hexdigest()[:16]}.parquet"


def in_blocks(found: Iterable[Photo], size: int) -> Iterator[Block]:
    """Yields photos in blocks of `size`, or fewer where those of an archive, with their bytes, exceed 32 MiB.

    Raises:
        InputError: a photo is a picture in memory that is not bytes.
    """
    photos: list[Photo] = []
    number = held = 0
    for photo in found:
        if photo.content is not None and not isinstance(photo.content, bytes):
            raise InputError("Other machines get paths, addresses or bytes; write pictures to files.")
        photos.append(photo)
        held += photo.held
        if len(photos) >= size or held > _MAX_BYTES:
            yield Block(number, tuple(photos))
            photos, held, number = [], 0, number + 1
    if photos:
        yield Block(number, tuple(photos))
