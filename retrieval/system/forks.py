"""Locks that outlive a fork, in which only the thread that forks goes on."""

import os
import threading
from contextlib import AbstractContextManager


def shared_lock() -> AbstractContextManager[bool]:
    """Returns a lock that only the thread that forks may hold in a child: others would hold it for ever.

    A fork waits until other threads have released it, for as long as a migration of a database takes. So a
    thread must not wait for another such lock while it holds one. It is for a module: it is never freed.
    """
    lock = threading.RLock()  # the thread that forks may hold it
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock
