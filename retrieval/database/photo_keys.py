"""Keys by which a photo is found in SQLite by its SHA-256, through an index of small integers.

An index of the SHA-256 itself would have 64 digits an entry, and each new photo would write a page of it at
random. A key is an integer: the number of the photo's epoch, then the first 32 bits of its SHA-256. The keys
of an epoch lie side by side, so new photos write pages of the newest epoch only. A search looks in each one.

Different photos may have the same key: a search compares the whole SHA-256 too.
"""

from typing import Final

# An epoch has the photos with 2**19 consecutive ids. Longer epochs make a search faster; shorter ones let a
# batch of new photos write fewer pages.
EPOCH_BITS: Final = 19

# Bits of the SHA-256 in a key: so many that few photos of an epoch have the same key, and so few that SQLite
# stores the keys of 32,768 epochs in 6 bytes.
PREFIX_BITS: Final = 32

# The keys of an epoch.
EPOCH_SPAN: Final = 1 << PREFIX_BITS

_MAX_EPOCH: Final = (1 << (63 - PREFIX_BITS)) - 1


def prefix_of(sha256: str) -> int:
    """Returns the lower bits of the key; 0 for a text that is no number in hexadecimal digits."""
    try:
        return int(sha256[: PREFIX_BITS // 4], 16) & (EPOCH_SPAN - 1)
    except ValueError:
        return 0


def key_of(photo_id: int, sha256: str) -> int:
    """Returns the key of a photo, which any 64-bit integer can hold, whatever its id is."""
    return (photo_id >> EPOCH_BITS & _MAX_EPOCH) << PREFIX_BITS | prefix_of(sha256)
