"""A folder of saved sessions: files named by the session and by what it belongs to.

A session has one file for its head, and one beside it for the last answered point before the head. Several processes
may use a folder. None overwrites what another one has written and it has not read: that is set aside.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from zsmerge_llm.errors import ConfigError, InputError, SessionCorruptError, SessionError, SessionStorageError
from zsmerge_llm.models.atomic_write import TEMPORARY_PREFIX, TEMPORARY_SUFFIX, sync_folder
from zsmerge_llm.models.file_locks import delete_leftovers, locked
from zsmerge_llm.paths import OTHERS_WRITE, as_path
from zsmerge_llm.sessions import file_format
from zsmerge_llm.sessions.seal import session_key
from zsmerge_llm.sessions.session import Fingerprint, Session, SessionInfo, Snapshot, file_stamp, load_session
from zsmerge_llm.sessions.validation import ExpectedCache, check_facts

SUFFIX = ".zsmerge"
EARLIER_SUFFIX = ".earlier"
"""Suffix of the file with the last answered point before the head, instead of `SUFFIX`."""
SAFE_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")
MAX_STEM = 120
GENERATED_NAME = re.compile(r"(.*/)?chat-[0-9a-f]{8}", re.DOTALL)
LOCK_SECONDS = 2.0
"""Longest wait for another process that renames files in the folder: that takes milliseconds."""


@dataclass(frozen=True)
class SavedFiles:
    """What is on disk of a session.

    Attributes:
        head: the file of its head.
        earlier: the file of the last answered point before the head.
        set_aside: another process's conversation of the same name, which has got a generated name.
    """

    head: SessionInfo | None = None
    earlier: SessionInfo | None = None
    set_aside: SavedFiles | None = None


class Folder:
    """Saved sessions of one model, tokenizer, template and cache configuration; other files are left alone.

    Args:
        path: made where it is missing.
        durable: whether what is saved must outlast a power failure.
        expected: as for `load_session`.

    Raises:
        ConfigError: `path` cannot be a folder, or others may write to it; the session key cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        fingerprint: Fingerprint,
        durable: bool,
        expected: ExpectedCache | None = None,
    ) -> None:
        self.path = _folder_path(path)
        self.fingerprint = fingerprint
        self.durable = durable
        self.expected = expected
        self._suffix = _suffix(asdict(fingerprint))
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = self.path.stat().st_mode
            with os.scandir(self.path):  # else it would only look empty
                pass
        except OSError as error:
            raise ConfigError(f"Sessions cannot be kept in {path}: {error}. Give another folder.") from error
        if hasattr(os, "getuid") and mode & OTHERS_WRITE:
            raise ConfigError(f"Others may write to {path}, so no sessions are kept there. Run: chmod go-w {path}")
        session_key()  # one that cannot be read is an error now, not at the first save

    def file(self, name: str) -> Path:
        """Return the path of the session of that name."""
        return self.path / f"{_stem(name)}{self._suffix}"

    def save(self, session: Session, known: SavedFiles = SavedFiles()) -> SavedFiles:
        """Write a session's head, and see to it that the last answered point before it is beside it.

        A file that is not `known`, and that the session does not continue, is another process's: it is set aside.

        known: what this process has last read or written of the session.

        Raises:
            OSError: no room or no permission. What was there stays.
        """
        path, point = self.file(session.name), session.last_answered
        with self._temporary() as head, self._temporary() as earlier:
            session.save(head, self.durable)
            if point is not None and not _holds(point, known.head, known.earlier):
                session.at(point).save(earlier, self.durable)
            with locked(head), self._renaming():
                before, set_aside = self._at_path(session, path, known.head)
                beside = None if set_aside else known.earlier or self.earlier(path, session.prefix_digests)
                newest = max(_answered_messages(session, each) for each in (point, before, beside))
                if newest == _answered_messages(session, beside):
                    earlier.unlink(missing_ok=True)
                elif newest == _answered_messages(session, before):
                    _link(path, earlier)
                if earlier.exists():  # first: if the process is killed in between, the last answer is there
                    os.replace(earlier, earlier_path(path))
                os.replace(head, path)
                if not newest:
                    earlier_path(path).unlink(missing_ok=True)
        if self.durable:
            sync_folder(self.path)
        return SavedFiles(self._info(session, path), self.earlier(path, session.prefix_digests), set_aside)

    def save_earlier(self, session: Session, point: Snapshot) -> SessionInfo:
        """Write the last answered point before a session's head, beside the file of that head. Raises OSError."""
        path = earlier_path(self.file(session.name))
        session.at(point).save(path, self.durable)
        return self._info(session.at(point), path)

    def _at_path(
        self, session: Session, path: Path, known: SessionInfo | None
    ) -> tuple[SessionInfo | None, SavedFiles | None]:
        """Return what is at the path of a session, after setting aside what the session does not continue."""
        found = self.describe(path, known)
        if found is None or found is known or session.contains(found):
            return found, None
        return None, self.rename(SavedFiles(found, self.earlier(path, found.prefix_digests)), generate_name(found.name))

    def _renaming(self) -> AbstractContextManager[None]:
        """Keep other processes from renaming files. One that does not last is one process's, which has its lock."""
        return locked(self.path, LOCK_SECONDS) if self.durable else nullcontext()

    @contextmanager
    def _temporary(self) -> Iterator[Path]:
        """Give the path of a file that is gone afterwards, unless it was renamed."""
        path = self.path / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}{TEMPORARY_SUFFIX}"
        try:
            yield path
        finally:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _info(self, session: Session, path: Path) -> SessionInfo:
        stat = path.stat()
        return replace(session.info, path=path, nbytes=stat.st_size, tier="disk", stamp=file_stamp(stat))

    def describe(self, path: Path, known: SessionInfo | None = None) -> SessionInfo | None:
        """Return what is saved at a path: `known`, where that is still there; None where there is no session."""
        try:
            if known is not None and known.path == path and file_stamp(path.stat()) == known.stamp:
                return known
            return self._from_metadata(file_format.read_metadata(path, check_facts), path)
        except (SessionError, OSError):
            return None

    def earlier(self, path: Path, prefix_digests: Sequence[str]) -> SessionInfo | None:
        """Return what is saved beside a head at `path`; None where it is no point before that head."""
        found = self.describe(earlier_path(path))
        return found if found is not None and found.digest in prefix_digests else None

    def load(self, info: SessionInfo) -> Session:
        """Read a session back. Raises as `load_session`, also where the file no longer holds the session of `info`."""
        path = info.path
        if path is None or not path.is_file():
            raise SessionCorruptError(f"{path}, where session {info.name!r} was kept, is gone: read it anew.")
        session = load_session(path, self.fingerprint, self.expected)
        if session.head.digest != info.digest:
            raise SessionCorruptError(f"{path} was replaced by another conversation: it is read anew.")
        session.name, session.named, session.origin = info.name, info.named, self
        return session

    def checked(self, session: Session) -> Session:
        """Return a session that another model or nobody has checked, its head rebuilt as its file would be loaded.

        Raises:
            SessionMismatchError, SessionCorruptError: as `load_session`. SessionStorageError: no room for a file.
        """
        with self._temporary() as path:
            session.save(path, durable=False)
            try:
                return load_session(path, self.fingerprint, self.expected)
            except SessionError as error:
                raise type(error)(str(error).replace(str(path), f"Session {session.name!r}")) from error

    def rename(self, files: SavedFiles, name: str) -> SavedFiles:
        """Move the files of a session to a generated name. Raises OSError."""
        assert files.head is not None
        path = self.file(name)
        head, earlier = _renamed(files.head, path, name), None
        if files.earlier is not None:
            with suppress(OSError):
                earlier = _renamed(files.earlier, earlier_path(path), name)
        return SavedFiles(head, earlier)

    def delete(self, path: Path) -> None:
        """Delete the files of the session at a path. Raises SessionStorageError: they cannot be deleted."""
        delete_files(path)

    def discard(self, file: SessionInfo) -> None:
        """Delete a file, unless another process uses it, or it cannot be deleted."""
        if file.path is not None and self.describe(file.path, file) is file:
            with suppress(OSError):
                file.path.unlink()

    def list_sessions(self) -> dict[str, SavedFiles]:
        """Return what an earlier process left here, by name, the oldest first."""
        found: list[tuple[SessionInfo, Path]] = []
        for metadata, path in list_folder(self.path, self._suffix):
            with suppress(OSError):
                info = self._from_metadata(metadata, path)
                if info is not None:
                    found.append((info, path))
        found.sort(key=lambda each: each[0].used)
        return {info.name: SavedFiles(info, self.earlier(path, info.prefix_digests)) for info, path in found}

    def names_changed(self, known: Mapping[Path, tuple[int, ...]]) -> list[str]:
        """Return the names of the sessions whose files are not as `known` gives their stamps."""
        changed = []
        for path in self.path.glob(f"*{self._suffix}"):
            with suppress(SessionError, OSError):
                if known.get(path) != file_stamp(path.stat()):
                    info = self._from_metadata(file_format.read_metadata(path, check_facts), path)
                    changed += [info.name] if info is not None else []
        return changed

    def _from_metadata(self, metadata: dict[str, Any], path: Path) -> SessionInfo | None:
        """Return the description of a session, None for one of another model or configuration. Raises OSError."""
        if metadata["fingerprint"] != asdict(self.fingerprint):
            return None
        info = SessionInfo.from_metadata({**metadata, "name": _name(metadata, path)}, path)
        return replace(info, named=info.named and not GENERATED_NAME.fullmatch(info.name))

    def delete_abandoned_files(self) -> None:
        """Delete what killed processes left unfinished, and what is left of sessions that were deleted."""
        delete_leftovers(self.path.glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}"))
        with self._renaming(), suppress(OSError):
            for path in self.path.glob(f"*{Path(self._suffix).with_suffix(EARLIER_SUFFIX)}"):
                if not path.with_suffix(SUFFIX).exists():
                    path.unlink()


def earlier_path(path: Path) -> Path:
    """Return the path of the last answered point before a head that is saved at `path`."""
    return path.with_suffix(EARLIER_SUFFIX)


def delete_files(path: Path) -> None:
    """Delete a session's files: its head's, and what is beside it.

    Raises:
        SessionStorageError: the head's file cannot be deleted. Then the session is as it was.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise SessionStorageError(
            f"{path} cannot be deleted ({error.strerror}), so its session stays: allow writing to its folder."
        ) from error
    with suppress(OSError):
        earlier_path(path).unlink(missing_ok=True)


def _renamed(info: SessionInfo, path: Path, name: str) -> SessionInfo:
    assert info.path is not None
    os.replace(info.path, path)
    return replace(info, path=path, name=name, named=False)


def _answered_messages(session: Session, point: Snapshot | SessionInfo | None) -> int:
    """Return after how many messages an answered point before a session's head is; 0 where it is none."""
    return point.messages if point is not None and session.answered(point) else 0


def _holds(point: Snapshot, *files: SessionInfo | None) -> bool:
    return any(file is not None and file.digest == point.digest for file in files)


def _link(path: Path, target: Path) -> None:
    """Make `target` another name of a file or, where the file system has no such names, a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(path, target)
    except OSError:
        with suppress(OSError):
            shutil.copyfile(path, target)


def generate_name(beside: str = "") -> str:
    """Return a name for a conversation that nobody named, in the namespace of the name `beside`."""
    namespace, slash, _ = beside.rpartition("/")
    return f"{namespace}{slash}chat-{uuid.uuid4().hex[:8]}"


def list_folder(path: Path, suffix: str = SUFFIX) -> list[tuple[dict[str, Any], Path]]:
    """Return the metadata and path of each session in a folder, of any model. Corrupt files are left out."""
    found = []
    for file in path.glob(f"*{suffix}"):
        with suppress(SessionError, OSError):
            metadata = file_format.read_metadata(file, check_facts)
            found.append(({**metadata, "name": _name(metadata, file)}, file))
    return found


def _name(metadata: dict[str, Any], path: Path) -> str:
    """Return the name of a saved session: by its file where that was renamed or copied."""
    suffix = _suffix(metadata["fingerprint"])
    unchanged = path.name == f"{_stem(metadata['name'])}{suffix}"
    return metadata["name"] if unchanged else path.name.removesuffix(suffix).removesuffix(SUFFIX)


def _folder_path(path: Any) -> Path:
    try:
        return as_path(path, "sessions_dir")
    except InputError as error:
        raise ConfigError(str(error)) from error


def _suffix(fingerprint: dict[str, str]) -> str:
    """Return what sets the files of one model, tokenizer, template and cache configuration apart."""
    text = json.dumps(fingerprint, sort_keys=True)
    return f".{hashlib.sha256(text.encode()).hexdigest()[:8]}{SUFFIX}"


def _stem(name: str) -> str:
    """Return a name as a file name that is safe, and as different from others, on every file system."""
    stem = "".join(letter if letter in SAFE_CHARACTERS else _escaped(letter) for letter in name)
    if len(stem) > MAX_STEM:
        stem = stem[:MAX_STEM] + "~" + hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]
    return stem


def _escaped(letter: str) -> str:
    return "".join(f"%{byte:02x}" for byte in letter.encode(errors="surrogatepass"))
