"""Cleaning of a data set: selects the photos to remove, each with a reason, for the check."""

from retrieval.quality.findings import Kind
from retrieval.quality.photo_set import PhotoSet, Rows, grouped


class Cleaning:
    """The photos to remove, `out`: row to kind of finding; and the rows that remain, `rows`."""

    def __init__(self, seen: PhotoSet) -> None:
        self.seen = seen
        self.copies = seen.copies
        self.out: dict[int, Kind] = {}
        for row, one in enumerate(seen.stats):
            if one.reason is not None:
                self.out[row] = Kind.UNREADABLE
            elif not one.trainable:
                self.out[row] = Kind.NO_FACE if one.face is None else Kind.FACE_TOO_SMALL
        self._leave_out_two_names()
        self._leave_out_copies()
        # Last, because copies do not count as photos of an identity.
        unique = [row for row in seen.readable if row not in self.out]
        self._leave_out_small(unique)
        self.rows = [row for row in unique if row not in self.out]

    def _leave_out_two_names(self) -> None:
        """Removes photos under two names with all their exact and near copies."""
        seen, found = self.seen, self.copies
        clusters = [[first, *(row for row, _ in others)] for first, others in found.near.items()]
        bad = {rows[0]: Kind.TWO_NAMES for rows in found.exact if len(seen.names(rows)) > 1}
        for one, other, _ in found.two_names:
            bad.setdefault(one, Kind.TWO_NAMES_NEAR)
            bad.setdefault(other, Kind.TWO_NAMES_NEAR)
        for rows in clusters:
            if not bad.keys().isdisjoint(rows):
                for row in rows:
                    bad.setdefault(row, Kind.TWO_NAMES_NEAR)
        self.out.update(bad)
        for rows in found.exact:
            if rows[0] in bad:
                self.out.update(dict.fromkeys(rows, bad[rows[0]]))

    def _leave_out_copies(self) -> None:
        for rows in self.copies.exact:
            for row in rows[1:]:
                self.out.setdefault(row, Kind.COPY)
        for others in self.copies.near.values():
            for row, _ in others:
                self.out.setdefault(row, Kind.NEAR_COPY)

    def _leave_out_small(self, unique: Rows) -> None:
        groups = grouped(unique, self.seen.identity)
        for name, rows in groups.items():
            if name is not None and len(rows) < self.seen.options.lowest:
                kind = Kind.SINGLE_PHOTO if len(rows) < 2 else Kind.TOO_FEW_PHOTOS
                self.out.update(dict.fromkeys(rows, kind))

    def labelled_rows(self) -> Rows:
        """Returns the rows with an identity, without copies: a copy would confirm its original's label."""
        return [row for row in self.rows if self.seen.identity(row) is not None]
