"""A folder of saved sessions in storage that fsspec reaches, such as a bucket.

A temporary folder of this process mirrors it. Files go up when they are saved. They come down when they are needed: of
a file that another process has written only the header, which says whose session it is, until the session continues.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from zsmerge_llm.errors import ConfigError, SessionStorageError
from zsmerge_llm.sessions.folder import EARLIER_SUFFIX, Folder, SavedFiles, earlier_path
from zsmerge_llm.sessions.session import Fingerprint, Session, SessionInfo, Snapshot
from zsmerge_llm.sessions.validation import ExpectedCache

STAMPS = ("ETag", "etag", "md5Hash", "mtime", "updated", "LastModified", "last_modified", "created")
"""What file systems call what changes with a file's content. The first that there is counts."""
FIRST_BYTES = 256 * 1024
"""Read at once of a file whose header is wanted: most headers are shorter."""
CONNECTIONS = 16
NOTHING_SAVED = SavedFiles()

Stamp = tuple[Any, Any]


def is_url(folder: object) -> bool:
    """Return whether sessions are to be kept in storage that is reached by a URL."""
    return isinstance(folder, str) and "://" in folder


def without_scheme(folder: str | Path | None) -> str | Path | None:
    """Return the path of a `file://` URL, which is a folder as any other; anything else as it is."""
    return url_to_fs(folder)[1] if isinstance(folder, str) and folder.startswith("file://") else folder


class RemoteFolder(Folder):
    """Saved sessions of one model in storage that several machines share.

    Two processes that save the same session at the same moment are not kept apart: the later file replaces the other.
    One that comes later than that sees the other's file, and sets it aside, as in any folder.

    Args:
        url: of the folder, as fsspec writes it.
        mirror: an empty folder of this process alone.

    The others are those of `Folder`.

    Raises:
        ConfigError: fsspec cannot reach it, or a package for this kind of storage is missing.
    """

    def __init__(self, url: str, mirror: Path, fingerprint: Fingerprint, expected: ExpectedCache | None = None) -> None:
        super().__init__(mirror, fingerprint, durable=False, expected=expected)
        self._fs: AbstractFileSystem
        try:
            self._fs, self._root = url_to_fs(url, use_listings_cache=False)
            self._fs.makedirs(self._root, exist_ok=True)
        except Exception as error:  # each kind of storage has errors of its own
            raise ConfigError(f"Sessions cannot be kept at {url}: {error}. Give another folder.") from error
        self._stamps: dict[str, Stamp] = {}  # of the remote files that the mirror has, by their names
        self._headers: set[str] = set()  # names of the files that it has the header of only
        self._locks: defaultdict[str, RLock] = defaultdict(RLock)

    # -- saving ------------------------------------------------------------------------------------------------------

    def save(self, session: Session, known: SavedFiles = NOTHING_SAVED) -> SavedFiles:
        """Write a session's files, as `Folder.save`, and bring them up. Raises OSError."""
        path = self.file(session.name)
        with self._locks[path.name]:
            for each in (path, earlier_path(path)):
                self._fetch(each, whole=True)
            saved = super().save(session, known)
            for info in (saved.earlier, saved.head):
                if info is not None and info.path is not None:
                    self._store(info.path)
            if saved.earlier is None:
                self._remove(earlier_path(path))
        return saved

    def save_earlier(self, session: Session, point: Snapshot) -> SessionInfo:
        """Write the last answered point before a session's head, as `Folder.save_earlier`. Raises OSError."""
        info = super().save_earlier(session, point)
        self._store(earlier_path(self.file(session.name)))
        return info

    def rename(self, files: SavedFiles, name: str) -> SavedFiles:
        """Move the files of a session to a generated name. Raises OSError."""
        before = [file.path for file in (files.head, files.earlier) if file is not None and file.path is not None]
        for path in before:
            self._fetch(path, whole=True)
        renamed = super().rename(files, name)
        for info in (renamed.earlier, renamed.head):
            if info is not None and info.path is not None:
                self._store(info.path)
        for path in before:
            self._remove(path)
        return renamed

    def delete(self, path: Path) -> None:
        """Delete the files of the session at a path. Raises SessionStorageError: they cannot be deleted."""
        try:
            self._remove(path)
            self._remove(earlier_path(path))
        except OSError as error:
            raise SessionStorageError(f"{path.name} cannot be deleted ({error}), so its session stays.") from error
        super().delete(path)

    def discard(self, file: SessionInfo) -> None:
        """Delete a file, unless another process uses it, or it cannot be deleted."""
        super().discard(file)
        if file.path is not None and not file.path.exists():
            with suppress(OSError):
                self._remove(file.path)

    # -- finding -----------------------------------------------------------------------------------------------------

    def describe(self, path: Path, known: SessionInfo | None = None) -> SessionInfo | None:
        """Return what is saved at a path, as `Folder.describe`."""
        with suppress(OSError):
            self._fetch(path)
        return super().describe(path, known)

    def load(self, info: SessionInfo) -> Session:
        """Read a session back, as `Folder.load`."""
        if info.path is not None:
            with suppress(OSError):
                self._fetch(info.path, whole=True)
        return super().load(info)

    def list_sessions(self) -> dict[str, SavedFiles]:
        """Return what is stored, by name, the oldest first."""
        self._fetch_headers()
        return super().list_sessions()

    def names_changed(self, known: Mapping[Path, tuple[int, ...]]) -> list[str]:
        """Return the names of the sessions whose files are not as `known` gives their stamps."""
        self._fetch_headers()
        return super().names_changed(known)

    # -- the mirror --------------------------------------------------------------------------------------------------

    def _remote(self, path: Path) -> str:
        return f"{self._root.rstrip('/')}/{path.name}"

    def _stamp(self, path: Path) -> Stamp | None:
        """Return what tells a remote file from its other versions; None where there is none. Raises OSError."""
        with _as_os_error():
            try:
                return _stamp_of(self._fs.info(self._remote(path)))
            except FileNotFoundError:
                return None

    def _fetch_headers(self) -> None:
        """Bring down the headers of all files of this model that have changed."""
        suffixes = (self._suffix, str(Path(self._suffix).with_suffix(EARLIER_SUFFIX)))
        try:
            with _as_os_error():
                found = self._fs.ls(self._root, detail=True)
        except OSError:
            return
        stamps = {Path(each["name"]).name: _stamp_of(each) for each in found if each["name"].endswith(suffixes)}
        changed = [name for name, stamp in stamps.items() if self._stamps.get(name) != stamp]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(self._try_to_fetch, changed))

    def _try_to_fetch(self, name: str) -> None:
        with suppress(OSError):
            self._fetch(self.path / name)

    def _fetch(self, path: Path, whole: bool = False) -> None:
        """Let the mirror have a file as it is stored now, or at least its header. Raises OSError."""
        with self._locks[path.name]:
            stamp = self._stamp(path)
            if stamp is None:
                if self._stamps.pop(path.name, None) is not None:  # another process has deleted it
                    path.unlink(missing_ok=True)
                return
            if self._stamps.get(path.name) != stamp:
                self._download_header(path, stamp[0])
                self._stamps[path.name] = stamp
                self._headers.add(path.name)
            if whole and path.name in self._headers:
                self._download_rest(path)
                self._headers.discard(path.name)

    def _download_header(self, path: Path, nbytes: int) -> None:
        """Write a remote file's header to the mirror, as a file of its length."""
        remote = self._remote(path)
        with self._temporary() as temporary, _as_os_error():
            content = self._fs.cat_file(remote, start=0, end=min(FIRST_BYTES, nbytes))
            size = min(8 + int.from_bytes(content[:8], "little"), nbytes)
            if size > len(content):
                content = self._fs.cat_file(remote, start=0, end=size)
            temporary.write_bytes(content[:size])
            os.truncate(temporary, nbytes)  # a hole takes no room
            os.replace(temporary, path)

    def _download_rest(self, path: Path) -> None:
        """Fill a file of which the mirror has the header. It stays the file it was: same inode, same time."""
        stat = path.stat()
        with path.open("r+b") as file, _as_os_error():
            file.write(self._fs.cat_file(self._remote(path)))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def _store(self, path: Path) -> None:
        """Bring a file up. Raises OSError."""
        with self._locks[path.name], _as_os_error():
            with path.open("rb") as source, self._fs.open(self._remote(path), "wb", autocommit=False) as target:
                while part := source.read(2**22):
                    target.write(part)
            target.commit()
            self._headers.discard(path.name)
            stamp = self._stamp(path)
            if stamp is not None:
                self._stamps[path.name] = stamp

    def _remove(self, path: Path) -> None:
        """Delete a remote file, if it is there. Raises OSError."""
        with self._locks[path.name], _as_os_error():
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._remote(path))
            self._stamps.pop(path.name, None)
            self._headers.discard(path.name)


def _stamp_of(info: Mapping[str, Any]) -> Stamp:
    return info["size"], next((info[name] for name in STAMPS if info.get(name) is not None), None)


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn the errors that some kinds of storage have of their own into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
