"""Locks that a process holds on files and folders, and what killed processes left behind.

The system frees a lock when its process ends, however it ends. So what nobody holds has no owner any more.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ABANDONED_SECONDS = 3600
"""Age after which a file has no owner, where the system has no locks. Folders stay there."""
NEW_SECONDS = 1
"""Age below which a file or folder may just be about to be locked."""
RETRY_SECONDS = 0.002


def lock(path: Path, seconds: float = 0.0) -> int | None:
    """Lock a file or a folder, and return the handle that `unlock` takes; None where the system cannot lock it.

    seconds: how long to wait for another owner.

    Raises:
        BlockingIOError: another one still holds it.
    """
    if fcntl is None:
        return None
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(handle)
                raise
            time.sleep(RETRY_SECONDS)
        except OSError:  # a file system without locks
            os.close(handle)
            return None


def unlock(handle: int | None) -> None:
    """Free a lock; None: there is none."""
    if handle is not None:
        with suppress(OSError):
            os.close(handle)


@contextmanager
def locked(path: Path, seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock of a file or a folder, where it can be had in time."""
    handle = None
    with suppress(BlockingIOError):
        handle = lock(path, seconds)
    try:
        yield
    finally:
        unlock(handle)


def delete_leftovers(paths: Iterable[Path]) -> None:
    """Delete the files and folders that have no owner any more. What cannot be deleted stays."""
    for path in paths:
        with suppress(OSError):
            stat = path.stat()
            age = time.time() - stat.st_mtime
            if age < NEW_SECONDS or (hasattr(os, "getuid") and stat.st_uid != os.getuid()):
                continue
            handle = lock(path)
            if handle is None and (age < ABANDONED_SECONDS or path.is_dir()):
                continue
            try:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                unlock(handle)
