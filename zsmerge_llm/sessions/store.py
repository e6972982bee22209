"""All sessions under memory budgets: they move between tiers, and come back up when they are continued.

One lock guards the table of sessions, and is never held while a file is read or written or a cache is copied: only who
needs the same session waits.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zsmerge_llm.errors import SessionNotFoundError, StoreFullError
from zsmerge_llm.sessions.folder import Folder, generate_name
from zsmerge_llm.sessions.moves import TieredSessions
from zsmerge_llm.sessions.session import Fingerprint, Session, Snapshot, load_session
from zsmerge_llm.sessions.session_table import StoreEntry
from zsmerge_llm.sessions.tiers import DeviceTier
from zsmerge_llm.sessions.transcript import Transcript
from zsmerge_llm.sessions.validation import ExpectedCache


@dataclass(frozen=True)
class ResumePoint:
    """A snapshot to resume from. `head`: the digest of the session's head when the snapshot was found."""

    session: Session
    snapshot: Snapshot
    head: str


class Store(TieredSessions):
    """Sessions by name, found again by the digests of their messages. Safe to use from several threads.

    Args:
        fingerprint: what all sessions here belong to.
        limit: bytes that the snapshots of all sessions together may hold in host memory. Conversations without a name
            may take as much on disk; the least recently used of them are deleted, and read anew if they come back.
        session_nbytes: bytes of one session's cache.
        folder: where sessions are kept for good: each is saved after each turn, and found here at the next start.
            None: nothing is kept after the process ends, and what does not fit into memory goes to a temporary folder.
        expected: as for `load_session`.
        device: the memory of a model that does not compute in the host's; None for one that does.

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
        expected: ExpectedCache | None = None,
        device: DeviceTier | None = None,
    ) -> None:
        if limit < session_nbytes:
            raise StoreFullError(
                f"One session needs {session_nbytes:,} bytes and the ceiling for all sessions is {limit:,}: "
                "raise session_memory or lower the number of slots."
            )
        self.fingerprint = fingerprint
        self.persistent = folder is not None
        self._temporary = None if folder is not None else tempfile.TemporaryDirectory(prefix="zsmerge-sessions-")
        path = folder if self._temporary is None else self._temporary.name
        assert path is not None
        kept = Folder(path, fingerprint, self.persistent, expected)
        super().__init__(kept, limit, session_nbytes, device)
        if self.persistent:
            self._folder.delete_abandoned_files()
            self._entries.update((name, StoreEntry(None, file)) for name, file in self._folder.list_sessions().items())

    # -- sessions -----------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Session:
        """Return the session of that name, loaded from disk if it is there.

        Raises:
            SessionNotFoundError: no such session.
            SessionCorruptError: its file is corrupt.
        """
        session = self._load(name)
        head = session.head
        raised = self._bring_up(head)
        return session if raised is head else session.with_moved([raised])

    def open(self, name: str, digest: str) -> ResumePoint:
        """Return a snapshot that `find_resume_points` named.

        Raises:
            SessionNotFoundError: the session or the snapshot is gone.
            SessionCorruptError: the session's file is corrupt.
        """
        session = self._load(name)
        snapshots = session.snapshots  # as they are now: older ones may be dropped meanwhile
        if digest not in snapshots:
            raise SessionNotFoundError(f"Session {name!r} has moved on.")
        head, raised = next(reversed(snapshots.values())).digest, self._bring_up(snapshots[digest])
        return ResumePoint(session if raised is snapshots[digest] else session.with_moved([raised]), raised, head)

    # -- changes -----------------------------------------------------------------------------------------------------

    def commit(self, session: Session, snapshots: Sequence[Snapshot] = (), prefix_digests: Sequence[str] = ()) -> None:
        """Add `snapshots` to `session` and keep it, instead of any other session of its name."""
        with self._lock:
            self._wait_until_free(session.name)
            self._put(session, snapshots, prefix_digests)
        self._save(session.name)
        self._rebalance()

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
            self._wait_until_free(session.name)
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
        self._rebalance()
        return session

    def load(self, path: str | Path) -> Session:
        """Load a saved session under the name it was saved with. Raises as `load_session`."""
        session = load_session(path, self.fingerprint, self._folder.expected)
        self.commit(session)
        return session

    def remove(self, name: str) -> None:
        """Delete a session, on disk too. Raises SessionNotFoundError."""
        with self._lock:
            self._wait_until_free(name)
            file = self._entry(name).file
            del self._entries[name]
            self._lock.notify_all()
            if file is not None and file.path is not None:
                file.path.unlink(missing_ok=True)

    # -- with the lock held ------------------------------------------------------------------------------------------

    def _wait_until_free(self, name: str) -> None:
        """Wait until no other thread reads or writes this session's file. The table may have changed then."""
        self._lock.wait_for(lambda: name not in self._busy)

    def _put(self, session: Session, snapshots: Sequence[Snapshot], prefix_digests: Sequence[str]) -> None:
        session.add(snapshots, prefix_digests)
        entry = self._entries.pop(session.name, None) or StoreEntry(None)
        entry.session = session
        entry.uses += 1
        self._entries[session.name] = entry

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

    # -- without the lock ----------------------------------------------------------------------------------------------

    def _save(self, name: str) -> None:
        """Write a session's head to a persistent folder: what is committed is on disk."""
        if not self.persistent:
            return
        with self._lock:
            self._wait_until_free(name)
            entry = self._entries.get(name)
            if entry is None or entry.session is None or entry.is_saved:
                return
            self._busy.add(name)
            session = replace(entry.session)  # as it is now: the conversation may continue meanwhile
        file = None
        try:
            file = self._write(session)
        except (OSError, MemoryError, RuntimeError) as error:
            warnings.warn(f"Session {name!r} could not be saved, so it will not last: {error}", stacklevel=4)
        finally:
            with self._lock:
                self._busy.discard(name)
                self._record(name, session, file)
                self._lock.notify_all()

    def _load(self, name: str) -> Session:
        """Return the session, in memory and marked as the one used last. Raises as `get`."""
        session = self._in_memory(name)
        if session is not None:
            return session
        self._rebalance()  # there may be no room for it yet
        with self._lock:
            session = self._in_memory(name)
            if session is not None:
                return session
            entry = self._entry(name)
            assert entry.file is not None
            file = entry.file
            self._busy.add(name)
        loaded = None
        try:
            loaded = self._folder.load(file)
            loaded.used = time.time()
        finally:
            with self._lock:
                self._busy.discard(name)
                if loaded is not None and self._entries.get(name) is entry and entry.session is None:
                    entry.session = loaded
                    entry.record_save(file, loaded.head)
                self._lock.notify_all()
        self._rebalance()
        return loaded

    def _in_memory(self, name: str) -> Session | None:
        """Return a session that is in memory, or is just being loaded, as the one used last; None for one on disk."""
        with self._lock:
            while (entry := self._entry(name)).session is None and name in self._busy:
                self._wait_until_free(name)
            self._entries[name] = self._entries.pop(name)
            entry.uses += 1
            if entry.session is not None:
                entry.session.used = time.time()
            return entry.session
