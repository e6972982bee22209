"""Folders of converted models: whole, or made again."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from zsmerge_llm.models.atomic_write import sync_folder

SETTINGS = ("config.json", "tokenizer.json", "tokenizer_config.json")
"""What a folder holds beside its weights."""


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds a whole model: no file is missing, empty or cut, as after a power failure."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "model.safetensors", "np"):  # compares the header with the length of the file
            return all(_ends_well(folder / name) for name in SETTINGS)
    except (OSError, SafetensorError):
        return False


def put_in_place(folder: Path, target: Path) -> None:
    """Rename a whole folder to `target`. What is there and is not whole is replaced.

    Raises:
        OSError: no permission.
    """
    for path in folder.iterdir():
        with suppress(OSError), path.open("rb") as file:
            os.fsync(file.fileno())
    try:
        folder.rename(target)
    except OSError:
        if is_complete(target):  # another process was faster, and its folder is used
            return
        target.rename(folder.with_name("incomplete"))  # deleted with the temporary folder
        folder.rename(target)
    sync_folder(target.parent)


def _ends_well(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 8))
        return file.read().rstrip().endswith(b"}")
