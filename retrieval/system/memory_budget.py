"""A memory budget in bytes that all threads of the process share, for decoding."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ByteBudget:
    """A budget of `total` bytes; a thread waits while other threads hold the bytes that it needs."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._held = 0
        self._changed = threading.Condition()

    @property
    def held(self) -> int:
        """The number of bytes held now."""
        return self._held

    @contextmanager
    def holding(self, number: int) -> Iterator[None]:
        """Holds `number` bytes, at most the total, inside the with statement. Never nest it in one thread."""
        number = min(number, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self._held + number <= self.total)
            self._held += number
        try:
            yield
        finally:
            with self._changed:
                self._held -= number
                self._changed.notify_all()
