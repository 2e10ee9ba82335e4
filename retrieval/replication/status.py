"""What is published at an address, which followers have it, and which confirmed what was erased."""

from dataclasses import dataclass

from retrieval.errors import InputError, NotFound
from retrieval.replication.objects import ObjectMissing, ObjectStore
from retrieval.replication.states import (
    FOLLOWERS,
    Confirmation,
    Erasure,
    follower_key,
    is_follower_name,
    newest_head,
    read_confirmations,
    read_manifest,
    seconds_since,
)


@dataclass(frozen=True, slots=True)
class FollowerStatus:
    """What a follower said last.

    Attributes:
        name: of the follower.
        number: of the state that it has; 0 while it fetches its first.
        revision: of the gallery in that state.
        is_current: whether that is the revision that is published.
        seen_seconds: how long ago it said so.
    """

    name: str
    number: int
    revision: int
    is_current: bool
    seen_seconds: float


@dataclass(frozen=True, slots=True)
class ErasureStatus:
    """A published erasure, and who has no byte of what it erased.

    Attributes:
        receipt: the id of its receipt.
        at: when it was done; ISO 8601, UTC.
        number: of the first published state without what was erased.
        confirmed: the names of followers that have this state or a later one, and nothing of an earlier one.
        waiting: the names of the other followers.
    """

    receipt: str
    at: str
    number: int
    confirmed: tuple[str, ...]
    waiting: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PublicationStatus:
    """What is published at an address.

    Attributes:
        address: the address.
        publisher: who published last: a machine and a folder.
        gallery: the UUID of the gallery.
        number: of the current state.
        revision, faces: of the gallery in it.
        age_seconds: how long ago the publisher said that this is the gallery's state.
        followers: by name.
        erasures: oldest first.
    """

    address: str
    publisher: str
    gallery: str
    number: int
    revision: int
    faces: int
    age_seconds: float
    followers: tuple[FollowerStatus, ...]
    erasures: tuple[ErasureStatus, ...]

    @property
    def waiting(self) -> tuple[ErasureStatus, ...]:
        """The erasures that not all followers have confirmed."""
        return tuple(one for one in self.erasures if one.waiting)


def publication_status(objects: ObjectStore) -> PublicationStatus:
    """Returns what is published at an address.

    Raises:
        InputError: nothing is.
        DataError: what is there is damaged, or by a newer version.
        StorageError: the store cannot be reached.
    """
    while (head := newest_head(objects)) is not None:
        try:
            manifest = read_manifest(objects, head)
        except ObjectMissing:
            if newest_head(objects) == head:
                raise
            continue
        said = read_confirmations(objects)
        return PublicationStatus(
            address=objects.address,
            publisher=head.publisher,
            gallery=head.gallery,
            number=head.number,
            revision=head.revision,
            faces=head.faces,
            age_seconds=seconds_since(head.current_at),
            followers=tuple(
                FollowerStatus(
                    one.name, one.number, one.revision, one.revision == head.revision, seconds_since(one.at)
                )
                for one in said
            ),
            erasures=tuple(_status(one, said) for one in manifest.erasures),
        )
    raise InputError(f"No gallery is published at {objects.address}; check the address.")


def _status(erasure: Erasure, said: list[Confirmation]) -> ErasureStatus:
    confirmed = tuple(one.name for one in said if one.number >= erasure.number)
    waiting = tuple(one.name for one in said if one.number < erasure.number)
    return ErasureStatus(erasure.receipt, erasure.at, erasure.number, confirmed, waiting)


def remove_follower(objects: ObjectStore, name: str) -> None:
    """Removes a follower that is gone for good from the list; one that still runs comes back to it.

    Raises:
        NotFound: there is none of this name.
        StorageError: the store cannot be reached.
    """
    if not is_follower_name(name) or follower_key(name) not in objects.sizes(FOLLOWERS):
        raise NotFound(f"No follower {name!a} is in the list of {objects.address}.")
    objects.delete([follower_key(name)])
