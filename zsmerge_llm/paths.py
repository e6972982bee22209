"""Paths that users give, and where this package keeps what it makes: in folders that only the user may write to."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zsmerge_llm.errors import ConfigError, InputError, UntrustedFolderError, shown

KINDS = {stat.S_ISDIR: "folder", stat.S_ISREG: "file"}
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def as_path(path: Any, what: str) -> Path:
    """Return a path that a user has given.

    what: its name in the error.

    Raises:
        InputError: neither text nor a `Path`, empty, or with characters that no path has.
    """
    if not isinstance(path, (str, Path)):
        raise InputError(f"{what} must be a path (text or a Path), not a {type(path).__name__}.")
    text = str(path)
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        text = ""
    if not path or not text or "\0" in text:
        raise InputError(f"{what} must be the path of a file or folder, not {shown(path)}.")
    return Path(path)


def cache_folder(cache_dir: Path | str | None = None) -> Path:
    """Return `cache_dir`, else the variable ZSMERGE_CACHE_DIR, else the user's cache folder.

    Raises:
        ConfigError: the user has no home folder.
    """
    from platformdirs import user_cache_dir

    try:
        chosen = cache_dir or os.environ.get("ZSMERGE_CACHE_DIR") or user_cache_dir("zsmerge-llm")
        return Path(chosen).expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError("There is no home folder for the cache folder: set HOME or ZSMERGE_CACHE_DIR.") from error


def private_folder(folder: Path) -> Path:
    """Make a folder, and those above it, that only the user may enter, where they are missing; return it.

    Raises:
        UntrustedFolderError: as `check_folder`.
        OSError: it cannot be made.
    """
    for each in (*reversed(folder.parents), folder):
        if not each.exists():
            each.mkdir(mode=0o700, exist_ok=True)
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Check that a folder is the user's, who alone may write to it, and that no stranger can put another in its place.

    Folders above it may be writable for the user's own group, or for all with the sticky bit.

    Raises:
        UntrustedFolderError: it is not so; the message names the remedy.
        OSError: there is no such folder.
    """
    check_owner(folder, stat.S_ISDIR)
    if not hasattr(os, "getuid"):
        return
    if folder.stat().st_mode & OTHERS_WRITE:
        raise UntrustedFolderError(f"Others may write to {folder}, so nothing in it is used. Run: chmod 700 {folder}")
    for above in {*folder.absolute().parents, *folder.resolve().parents}:
        found = above.stat()
        others = found.st_mode & (stat.S_IWOTH if found.st_gid == os.getegid() else OTHERS_WRITE)
        if others and not found.st_mode & stat.S_ISVTX:
            remedy = f"Run: chmod go-w {above}, or set ZSMERGE_CACHE_DIR to a folder of your own"
            raise UntrustedFolderError(f"Others may replace {folder}: they may write to {above}. {remedy}.")


def check_owner(path: Path, is_kind: Callable[[int], bool] = stat.S_ISREG) -> None:
    """Check that a file, or what `is_kind` accepts, is no link and belongs to the user or to root.

    Raises:
        UntrustedFolderError: it is not so.
        OSError: there is no such file.
    """
    found = path.lstat()
    if not is_kind(found.st_mode):
        raise UntrustedFolderError(f"{path} is a link or no {KINDS[is_kind]}. Move it elsewhere: it is made anew.")
    if hasattr(os, "getuid") and found.st_uid not in (0, os.getuid()):
        raise UntrustedFolderError(
            f"{path} belongs to another user, so it is not used. Remove it, or set ZSMERGE_CACHE_DIR to a folder of "
            "your own."
        )
