"""Compaction: merges segments into as few as possible, and removes what no row of the database uses."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from retrieval.database.records import Segment
from retrieval.storage.optimization import optimize
from retrieval.storage.vault import Vault


@dataclass(frozen=True, slots=True)
class Compacted:
    """The result of a compaction: segments and bytes on disk (vectors, codes, database) before and after."""

    segments_before: int
    segments_after: int
    bytes_before: int
    bytes_after: int


def compact(vault: Vault) -> Compacted:
    """Merges segments into as few as possible, and erases what no row of the database uses.

    The database is written anew where that saves at least a tenth of it. Returns the sizes.
    """
    with vault.store.read() as reader:
        before, bytes_before = len(reader.segments()), vault.sizes(reader).total
    while _merge_once(vault):
        pass
    optimize(vault)
    with vault.writing() as writer:
        vault.defer(writer, erase=True, labels={}, rewrite=True)
        vault.log(writer, "compact", segments_before=before, segments_after=len(writer.segments()))
    with vault.store.read() as reader:
        return Compacted(before, len(reader.segments()), bytes_before, vault.sizes(reader).total)


def _merge_once(vault: Vault) -> bool:
    """Merges the first adjacent segments that fit into one, in one transaction; returns whether any did."""
    with vault.writing() as writer:
        for generation in writer.generations().values():
            flat, segments = vault.vectors(generation), writer.segments(generation.id)
            for group in _groups(segments, flat.ceiling):
                parts = [flat.stored(one.id, one.rows, one.sha256) for one in group]
                vault.put(writer, generation, [segment.id for segment in group], parts)
                return True
    return False


def _groups(segments: Sequence[Segment], ceiling: int) -> Iterator[list[Segment]]:
    """Yields runs of two or more adjacent segments that fit into one segment."""
    group: list[Segment] = []
    for segment in segments:
        if group and sum(one.rows for one in group) + segment.rows > ceiling:
            if len(group) > 1:
                yield group
            group = []
        group.append(segment)
    if len(group) > 1:
        yield group
