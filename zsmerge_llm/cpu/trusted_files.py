"""Files in the cache folder that are loaded as code: only the user's own, and only as they were written."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from zsmerge_llm.errors import UntrustedFolderError
from zsmerge_llm.paths import cache_folder, private_folder

log = logging.getLogger(__name__)

INDUCTOR_CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""The variable with which TorchInductor is told where to keep code, headers and libraries."""


def compiler_cache() -> Path:
    """Return the folder for what TorchInductor compiles: that of the variable, else one in our cache folder.

    PyTorch's default is in the system's temporary folder, where another user may make it first. PyTorch sets the
    variable to it when it is asked for the folder: that is nobody's choice.

    Raises:
        UntrustedFolderError: others may write to it.
        OSError: it cannot be made.
    """
    chosen = os.environ.get(INDUCTOR_CACHE)
    default = Path(tempfile.gettempdir(), "torchinductor_").resolve()
    if not chosen or str(Path(chosen).resolve()).startswith(str(default)):
        return private_folder(cache_folder() / "inductor")
    return private_folder(Path(chosen).resolve())


def writable_folder(find: Callable[[], Path], consequence: str) -> Path | None:
    """Return the private folder that `find` finds or makes; None, and a warning, where it cannot be written to.

    find: may raise UntrustedFolderError or OSError. consequence: what the warning says before the reason.
    """
    try:
        if os.access(folder := find(), os.W_OK):
            return folder
        reason = f"{folder} cannot be written to"
    except (OSError, UntrustedFolderError) as error:
        reason = str(error)
    log.warning("%s: %s.", consequence, reason.rstrip("."))
    return None


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def temporary_folder(parent: Path | None, prefix: str) -> Path:
    """Make a new folder that only the user may use, in `parent` or, if that is None, where the system has them."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
