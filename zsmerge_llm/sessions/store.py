"""All sessions under one memory ceiling: the least recently used go to disk and come back when they are continued.

One lock guards the table of sessions. Turns are saved outside it, one write per session at a time, so that other
conversations are not blocked. Only spilling to disk and loading back hold the lock.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zsmerge_llm.errors import SessionNotFoundError, StoreFullError
from zsmerge_llm.sessions.folder import Folder, generate_name
from zsmerge_llm.sessions.session import Fingerprint, Session, Snapshot, load_session
from zsmerge_llm.sessions.session_table import SessionTable, StoreEntry
from zsmerge_llm.sessions.transcript import Transcript


@dataclass(frozen=True)
class ResumePoint:
    """A snapshot to resume from. `head`: the digest of the session's head when the snapshot was found."""

    session: Session
    snapshot: Snapshot
    head: str


class Store(SessionTable):
    """Sessions by name, found again by the digests of their messages. Safe to use from several threads.

    Args:
        fingerprint: what all sessions here belong to.
        limit: bytes that the snapshots of all sessions together may hold in memory. Conversations without a name may
            take as much on disk; the least recently used of them are deleted, and read anew if they come back.
        session_nbytes: bytes of one session's cache.
        folder: where sessions are kept for good: each is saved after each turn, and found here at the next start.
            None: nothing is kept after the process ends, and what does not fit into memory goes to a temporary folder.
        devices: where the layers of a session go when it is loaded; None is where they were.
        policy: as for `load_session`.

    Raises:
        StoreFullError: `limit` is less than one session needs.
        ConfigError: `folder` cannot be used.
    """

    def __init__(
        self,
        fingerprint: Fingerprint,
        limit: int,
        session_nbytes: int = 0,
        folder: str | Path | None = None,
        devices: Sequence[str] | None = None,
        policy: Any = None,
    ) -> None:
        super().__init__()
        if limit < session_nbytes:
            raise StoreFullError(
                f"One session needs {session_nbytes:,} bytes and the ceiling for all sessions is {limit:,}: "
                "raise session_memory or lower the number of slots."
            )
        self.fingerprint = fingerprint
        self.limit = limit
        self.persistent = folder is not None
        self._temporary = None if folder is not None else tempfile.TemporaryDirectory(prefix="zsmerge-sessions-")
        path = folder if self._temporary is None else self._temporary.name
        assert path is not None
        self._folder = Folder(path, fingerprint, self.persistent, devices, policy)
        self._writing: set[str] = set()  # names of sessions that are being saved outside the lock
        if self.persistent:
            self._folder.delete_abandoned_files()
            self._entries.update((name, StoreEntry(None, file)) for name, file in self._folder.list_sessions().items())

    # -- sessions -----------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Where sessions are saved."""
        return self._folder.path

    def get(self, name: str) -> Session:
        """Return the session of that name, loaded from disk if it is there.

        Raises:
            SessionNotFoundError: no such session.
            SessionCorruptError: its file is corrupt.
        """
        with self._lock:
            session = self._load(name)
            self._enforce_limit()
            return session

    def open(self, name: str, digest: str) -> ResumePoint:
        """Return a snapshot that `find_resume_points` named.

        Raises:
            SessionNotFoundError: the session or the snapshot is gone.
            SessionCorruptError: the session's file is corrupt.
        """
        with self._lock:
            session = self._load(name)
            if digest not in session.snapshots:
                raise SessionNotFoundError(f"Session {name!r} has moved on.")
            found = ResumePoint(session, session.snapshots[digest], session.head.digest)
            self._enforce_limit()
            return found

    # -- changes -----------------------------------------------------------------------------------------------------

    def commit(self, session: Session, snapshots: Sequence[Snapshot] = (), prefix_digests: Sequence[str] = ()) -> None:
        """Add `snapshots` to `session` and keep it, instead of any other session of its name."""
        with self._lock:
            self._put(session, snapshots, prefix_digests)
        self._save(session.name)

    def commit_turn(
        self,
        session: Session,
        snapshots: Sequence[Snapshot],
        prefix_digests: Sequence[str],
        expected_head: str | None,
        is_new: bool,
        transcript: Transcript | None = None,
    ) -> Session:
        """Keep the result of a turn; return the session that holds it.

        Args:
            session: the turn's session: one of the store's, or a new one (`is_new`).
            expected_head: head of the session's name when the turn began. If another head is there by now, the turn
                becomes a session of its own.
            is_new: the name may be another conversation's, which then continues without a name.
        """
        with self._lock:
            self._wait_until_written(session.name)
            entry = self._entries.get(session.name)
            if entry is not None and entry.head != expected_head:
                kept = session.snapshots if is_new else {}
                session = replace(session, name=generate_name(), snapshots=kept, named=False)
                transcript = transcript and transcript.of_session(None)
            elif entry is not None and is_new:
                self._take_name_from(session.name)
            elif entry is not None and entry.session is not None:
                session = entry.session
            session.transcript = transcript
            self._put(session, snapshots, prefix_digests)
        self._save(session.name)
        return session

    def load(self, path: str | Path) -> Session:
        """Load a saved session under the name it was saved with. Raises as `load_session`."""
        session = load_session(path, self.fingerprint, self._folder.devices, self._folder.policy)
        self.commit(session)
        return session

    def remove(self, name: str) -> None:
        """Delete a session, on disk too. Raises SessionNotFoundError."""
        with self._lock:
            self._wait_until_written(name)
            file = self._entry(name).file
            del self._entries[name]
            if file is not None and file.path is not None:
                file.path.unlink(missing_ok=True)

    # -- internals: all of this with the lock held, but for `_save` ----------------------------------------------------

    def _wait_until_written(self, name: str) -> None:
        """Wait until no other thread writes this session's file. Releases the lock, so the table may have changed."""
        self._lock.wait_for(lambda: name not in self._writing)

    def _put(self, session: Session, snapshots: Sequence[Snapshot], prefix_digests: Sequence[str]) -> None:
        session.add(snapshots, prefix_digests)
        old = self._entries.pop(session.name, None)
        self._entries[session.name] = replace(old, session=session) if old is not None else StoreEntry(session)
        self._enforce_limit()

    def _take_name_from(self, name: str) -> None:
        """Give the session of that name a generated one, so that another conversation can have it."""
        entry, generated = self._entries.pop(name), generate_name()
        if entry.file is not None:
            try:
                entry.file = self._folder.rename(entry.file, generated)
            except OSError:
                entry.file = None
        if entry.session is not None:
            entry.session.name, entry.session.named = generated, False
        if entry.session is not None or entry.file is not None:
            self._entries[generated] = entry

    def _save(self, name: str) -> None:
        """Write a session's head to a persistent folder, without the lock: other conversations are not blocked."""
        if not self.persistent:
            return
        with self._lock:
            self._wait_until_written(name)
            entry = self._entries.get(name)
            if entry is None or entry.session is None or entry.is_saved:
                return
            self._writing.add(name)
            session = replace(entry.session)  # as it is now: the conversation may continue meanwhile
        file = None
        try:
            file = self._folder.save(session)
        except OSError as error:
            warnings.warn(f"Session {name!r} could not be saved, so it will not last: {error}", stacklevel=4)
        finally:
            with self._lock:
                self._writing.discard(name)
                if file is not None and name in self._entries:
                    self._entries[name].record_save(file, session.head)
                    self._limit_disk_use()
                self._lock.notify_all()

    def _load(self, name: str) -> Session:
        """Return the session, in memory and marked as the most recently used."""
        entry = self._entry(name)
        self._entries[name] = self._entries.pop(name)
        if entry.session is None and entry.file is not None:
            self._enforce_limit(reserve=entry.file.nbytes)
            if self._entries.get(name) is not entry:
                return self._load(name)
        if entry.session is None and entry.file is not None:
            entry.session = self._folder.load(entry.file)
            entry.record_save(entry.file, entry.session.head)
        assert entry.session is not None
        entry.session.used = time.time()
        return entry.session

    def _enforce_limit(self, reserve: int = 0) -> None:
        """Free memory down to the ceiling: old snapshots of idle sessions, then whole ones, then the session in use."""
        limit, entries = self.limit - reserve, list(self._entries.items())
        for group in (entries[:-1], entries[-1:]):
            for _, entry in group:
                if self.nbytes <= limit:
                    return
                if entry.session is not None:
                    entry.session.snapshots = {entry.head: entry.session.head}
            for name, entry in group:
                if self.nbytes <= limit:
                    return
                self._spill(name, entry)

    def _spill(self, name: str, entry: StoreEntry) -> None:
        self._wait_until_written(name)
        if entry.session is None or self._entries.get(name) is not entry:
            return
        if not entry.is_saved:
            try:
                entry.record_save(self._folder.save(entry.session), entry.session.head)
            except OSError as error:
                effect = "is forgotten" if entry.file is None else "falls back to an earlier snapshot"
                reason = f"memory is full and it cannot be saved ({error})"
                warnings.warn(f"Session {name!r} {effect}: {reason}.", stacklevel=4)
        entry.session = None
        if entry.file is None:
            del self._entries[name]
        self._limit_disk_use()

    def _limit_disk_use(self) -> None:
        """Delete the least recently used files of conversations without a name, down to the ceiling."""
        files = [
            (name, entry, entry.file)
            for name, entry in self._entries.items()
            if entry.file is not None and not entry.info.named and name not in self._writing
        ]
        total = sum(file.nbytes for *_, file in files)
        for name, entry, file in files:
            if total <= self.limit:
                return
            total -= file.nbytes
            if file.path is not None:
                file.path.unlink(missing_ok=True)
            entry.file = None
            if entry.session is None:
                del self._entries[name]
