"""One process at a time makes a package: it inherits a lock from the process that starts it, and keeps it to its end.

The system frees the lock when that process ends, however it ends. It does not matter what becomes of the one that
started it.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from zsmerge_llm.errors import PackageError

if TYPE_CHECKING:
    from zsmerge_llm.cpu.package_builder import PackageJob

try:
    import fcntl
except ImportError:  # Windows: several processes may make the same package; the first one that is whole is used
    fcntl = None  # type: ignore[assignment]

POLL_SECONDS = 0.2
MAX_SECONDS = 1200
"""A package takes 20 to 60 s; after this time its process is taken for stuck."""


def lock_package(folder: Path) -> int | None:
    """Lock a package that is to be made in `folder`; return the lock's handle, None where the system has no locks.

    Raises:
        BlockingIOError: another process makes it. OSError: the lock's file cannot be made.
    """
    if fcntl is None:
        return None
    handle = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:  # a file system without locks
        os.close(handle)
        return None
    return handle


def unlock(handle: int | None) -> None:
    """Give up a lock here; a process that has inherited it keeps it."""
    if handle is not None:
        os.close(handle)


class AwaitedPackage:
    """A package that another process makes.

    Attributes:
        job: how to make it here, should that process end without it.
    """

    def __init__(self, job: PackageJob) -> None:
        self.job = job

    @property
    def finished(self) -> bool:
        """Whether that process has ended."""
        try:
            unlock(lock_package(self.job.folder))
        except BlockingIOError:
            return False
        except OSError:  # the folder is gone
            pass
        return True

    def wait(self) -> None:
        """Wait until that process has ended, unless it takes too long."""
        deadline = time.monotonic() + MAX_SECONDS
        while not self.finished and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def check(self) -> None:
        """Check that there is nothing more to wait for.

        Raises:
            PackageError: that process has not ended.
        """
        if not self.finished:
            raise PackageError("Another process has been compiling the same steps for too long.")
