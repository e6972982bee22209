"""Files in the cache folder that are loaded as code: only the user's own, and only as they were written."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

from zsmerge_llm.errors import PackageError

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def private_folder(folder: Path) -> Path:
    """Make a folder that only the user may read and write, and return it.

    Raises:
        PackageError: somebody else may write to it, or has made it.
        OSError: it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Check that a folder belongs to the user, who alone may write to it.

    Raises:
        PackageError
        OSError: there is no such folder.
    """
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise PackageError(f"{folder} is not a folder. Remove it: it is made anew.")
    if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & OTHERS_WRITE):
        raise PackageError(f"Others may write to {folder}, so no code is loaded from it. Run: chmod 700 {folder}")


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def temporary_folder(parent: Path | None, prefix: str) -> Path:
    """Make a new folder that only the user may use, in `parent` or, if that is None, where the system has them."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
