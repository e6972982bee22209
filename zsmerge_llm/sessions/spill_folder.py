"""The temporary folder of conversations that do not fit into memory and end with the process."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path

from zsmerge_llm.errors import ConfigError
from zsmerge_llm.models.file_locks import delete_leftovers, lock, unlock

PREFIX = "zsmerge-sessions-"


class SpillFolder:
    """A folder that only this user may read. It is deleted with this object, by the process that made it.

    What killed processes of this user have left is deleted when it is made.

    Attributes:
        path: where it is.

    Raises:
        ConfigError: there is no folder for temporary files.
    """

    def __init__(self) -> None:
        try:
            parent = Path(tempfile.gettempdir())
            delete_leftovers(parent.glob(f"{PREFIX}*"))
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        except OSError as error:
            raise ConfigError(
                f"Conversations cannot be kept in a temporary folder ({error}): set TMPDIR, or give sessions_dir."
            ) from error
        weakref.finalize(self, _delete, self.path, lock(self.path), os.getpid())


def _delete(path: Path, handle: int | None, owner: int) -> None:
    """Delete a folder, unless this is a fork of the process that made it."""
    unlock(handle)
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
