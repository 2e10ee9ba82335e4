"""A budget of memory, in bytes, that all threads of the process share."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class ByteBudget:
    """So many bytes; who needs some that are held by others waits for them."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._held = 0
        self._changed = threading.Condition()

    @property
    def held(self) -> int:
        """Bytes that are held now."""
        return self._held

    @contextmanager
    def holding(self, number: int) -> Iterator[None]:
        """Holds bytes inside the with statement; of more than there are, all. Never nest it in a thread."""
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
