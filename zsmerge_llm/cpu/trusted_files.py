"""Files in the cache folder that are loaded as code: only the user's own, and only as they were written."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from zsmerge_llm.paths import cache_folder, private_folder

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


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def temporary_folder(parent: Path | None, prefix: str) -> Path:
    """Make a new folder that only the user may use, in `parent` or, if that is None, where the system has them."""
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
