"""Locks that outlive a fork, in which only the thread that forks goes on."""

import os
import threading
from contextlib import AbstractContextManager


def shared_lock() -> AbstractContextManager[bool]:
    """Returns a lock that no thread holds in a forked child, where that thread would hold it for ever.

    A fork waits until other threads have released it. So a thread must not wait for another such lock while
    it holds one. It is meant for a module: it is never freed.
    """
    lock = threading.RLock()  # the thread that forks may hold it
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock
