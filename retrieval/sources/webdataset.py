"""WebDataset shards: label files beside a photo in an archive hold its identity and metadata.

Consecutive members that differ only in their last suffix form one sample. In a sample, `.cls` holds the
identity as text. `.json` holds an object: its key `identity` is the identity, its other keys are metadata.
`.txt` holds a text: the identity where nothing else gives one, and the metadata key `text` otherwise.
"""

import posixpath
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from retrieval.database.metadata import decoded, encoded
from retrieval.errors import InputError, Reason
from retrieval.images.pixels import MAX_BYTES
from retrieval.sources.archives import Member
from retrieval.system.paths import composed

_LABEL_SUFFIXES: Final = (".cls", ".json", ".txt")
_MAX_LABEL_BYTES: Final = 2**20


@dataclass(frozen=True, slots=True)
class Sample:
    """A member of an archive that is presumably a photo, with its identity and metadata."""

    member: Member
    identity: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def samples(members: Iterable[Member], identity_of: Callable[[str], str | None]) -> Iterator[Sample]:
    """Returns the photos of an archive with what their label files give, in the order of the members.

    A label file without a photo beside it is passed on as a presumed photo. An invalid label file becomes
    the `problem` of the photos beside it.

    Args:
        members: of one archive, in its order.
        identity_of: returns the identity that a member's path gives.
    """
    group: list[Member] = []
    held = 0
    for member in members:
        if group and (_key(member) != _key(group[0]) or held > MAX_BYTES):
            yield from _group_samples(group, identity_of)
            group, held = [], 0
        group.append(member)
        held += len(member.content or b"")
    yield from _group_samples(group, identity_of)


def _key(member: Member) -> str:
    return posixpath.splitext(member.name)[0]


def _suffix(member: Member) -> str:
    return posixpath.splitext(member.name)[1].lower()


def _group_samples(group: list[Member], identity_of: Callable[[str], str | None]) -> Iterator[Sample]:
    photos = [member for member in group if _suffix(member) not in _LABEL_SUFFIXES]
    beside = {_suffix(member): member for member in group if _suffix(member) in _LABEL_SUFFIXES}
    if not photos or not beside:
        yield from (Sample(member, identity_of(member.name)) for member in group)
        return
    try:
        identity, metadata = _labels(beside, identity_of(photos[0].name))
    except InputError as error:
        for photo in photos:
            yield Sample(Member(photo.name, None, Reason.BAD_METADATA, error.words), identity_of(photo.name))
        return
    yield from (Sample(photo, identity, metadata) for photo in photos)


def _labels(beside: dict[str, Member], folder: str | None) -> tuple[str | None, dict[str, Any]]:
    """Returns the identity and the metadata that the label files beside a photo give.

    Raises:
        InputError: a label file is invalid.
    """
    texts = {suffix: _text(member) for suffix, member in beside.items()}
    metadata = decoded(texts[".json"], beside[".json"].name) if ".json" in texts else {}
    identity = metadata.pop("identity", None)
    if not isinstance(identity, str | int | None):
        raise InputError(f"The identity in {beside['.json'].name} is not a text.")
    identity = (None if identity is None else str(identity)) or texts.get(".cls") or folder
    if texts.get(".txt"):
        if identity is None:
            identity = texts[".txt"]
        else:
            metadata.setdefault("text", texts[".txt"])
    encoded(metadata, beside[max(beside)].name)
    return composed(identity) if identity else None, metadata


def _text(member: Member) -> str:
    if member.content is None or len(member.content) > _MAX_LABEL_BYTES:
        raise InputError(f"The file {member.name} beside it cannot be read.")
    try:
        return member.content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise InputError(f"The file {member.name} beside it is not a text in UTF-8.") from error
