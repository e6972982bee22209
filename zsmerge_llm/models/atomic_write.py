"""Write files atomically: after a crash there is the old file or the new one, never a part of one."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from zsmerge_llm.models.file_locks import locked

TEMPORARY_PREFIX = ".saving-"
TEMPORARY_SUFFIX = ".tmp"
"""How the name of an unfinished file begins and ends."""


def write_atomically(path: Path, content: bytes | bytearray, durable: bool = True) -> None:
    """Write `content` to `path`, making its folder where it is missing. Only the owner may read the file.

    Args:
        durable: whether the file must outlast a power failure too, and not only the end of the process.

    Raises:
        OSError: no room or no permission, or there is something that is no file. What was there stays.
    """
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY_PREFIX, suffix=TEMPORARY_SUFFIX)
    try:
        with locked(Path(temporary)), os.fdopen(handle, "wb") as file:  # another process may look for leftovers
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if durable:
        sync_folder(path.parent)


def _check_replaceable(path: Path) -> None:
    """Refuse to replace devices, pipes and sockets, which root could: `/dev/null` would be a file from then on."""
    with suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise FileExistsError(errno.EEXIST, "This is no regular file", str(path))


def sync_folder(folder: Path) -> None:
    """Make a rename last through a power failure, where the system allows it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
