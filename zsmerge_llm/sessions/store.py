"""All sessions under memory budgets: they move between tiers, and come back up when they are continued.

One lock guards the table of sessions, and is never held while a cache is read, written or copied: only who needs the
same session waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zsmerge_llm.errors import StoreFullError
from zsmerge_llm.sessions.folder import Folder, generate_name
from zsmerge_llm.sessions.remote_folder import RemoteFolder, is_url, without_scheme
from zsmerge_llm.sessions.saved_sessions import SavedSessions
from zsmerge_llm.sessions.session import Fingerprint, Session, Snapshot, load_session
from zsmerge_llm.sessions.spill_folder import SpillFolder
from zsmerge_llm.sessions.tiers import DeviceTier
from zsmerge_llm.sessions.transcript import Transcript
from zsmerge_llm.sessions.validation import ExpectedCache


@dataclass(frozen=True)
class ResumePoint:
    """A snapshot to resume from, with the digest of its session's head and the session's version at that time."""

    session: Session
    snapshot: Snapshot
    head: str
    version: int | None


class Store(SavedSessions):
    """Sessions by name, found again by the digests of their messages. Safe to use from several threads.

    Args:
        fingerprint: what all sessions here belong to.
        limit: bytes that the snapshots of all sessions together may hold in host memory. Conversations without a name
            may take as much on disk; the least recently used of them are deleted, and read anew if they come back.
        session_nbytes: bytes of one session's cache.
        folder: where sessions are kept for good: each is saved after each turn, and found here at the next start. A
            path, or a URL of fsspec's such as "s3://bucket/chats". None: nothing is kept after the process ends, and
            what does not fit into memory goes to a temporary folder.
        expected: as for `load_session`.
        device: the memory of a model that does not compute in the host's; None for one that does.

    Raises:
        StoreFullError: `limit` is less than one session needs.
        ConfigError: `folder` cannot be used, or there is no temporary one.
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
        folder = without_scheme(folder)
        self._spill_folder = SpillFolder() if folder is None or is_url(folder) else None
        path = folder if self._spill_folder is None else self._spill_folder.path
        assert path is not None
        kept = Folder(path, fingerprint, self._spill_folder is None, expected)
        if is_url(folder):
            kept = RemoteFolder(str(folder), Path(path), fingerprint, expected)
        super().__init__(kept, limit, session_nbytes, device, persistent=folder is not None)

    # -- sessions -----------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Session:
        """Return the session of that name, loaded from disk if it is there.

        Raises:
            SessionNotFoundError: no such session.
            SessionCorruptError: its file is corrupt.
        """
        self.refresh(name)
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
        self.refresh(name)
        version, session = self.version(name), self._load(name)
        snapshots = session.snapshots  # as they are now: older ones may be dropped meanwhile
        head, snapshot = next(reversed(snapshots.values())).digest, snapshots.get(digest)
        snapshot = snapshot or self._load_earlier(name, digest)
        raised = self._bring_up(snapshot)
        return ResumePoint(session if raised is snapshot else session.with_moved([raised]), raised, head, version)

    # -- changes -----------------------------------------------------------------------------------------------------

    def commit(self, session: Session, snapshots: Sequence[Snapshot] = (), prefix_digests: Sequence[str] = ()) -> None:
        """Add `snapshots` to `session` and keep it, instead of any other session of its name."""
        with self._lock:
            self._wait_until_free(session.name)
            self._put(session, snapshots, prefix_digests)
        self._save(session.name)
        self._rebalance()

    def adopt(self, session: Session) -> Session:
        """Keep a session that a caller hands in, as `commit`, and return it; one of elsewhere is checked before.

        Raises:
            SessionMismatchError, SessionCorruptError: as `load_session`. SessionStorageError: it cannot be checked.
        """
        if session.origin is not self._folder:
            session = self._folder.checked(session)
        self.commit(session)
        return session

    def commit_turn(
        self,
        session: Session,
        snapshots: Sequence[Snapshot],
        prefix_digests: Sequence[str],
        version: int | None,
        is_new: bool,
        transcript: Transcript | None = None,
    ) -> Session:
        """Keep the result of a turn; return the session that holds it.

        Args:
            session: the turn's session: one of the store's, or a new one (`is_new`).
            version: that of the session of its name when the turn began. If it has another one by now, the turn
                becomes a session of its own.
            is_new: the name may be another conversation's, which then continues without a name.
        """
        with self._lock:
            self._wait_until_free(session.name)
            entry = self._entries.get(session.name)
            if entry is not None and entry.version != version:
                kept = session.snapshots if is_new else {}
                session = replace(session, name=generate_name(session.name), snapshots=kept, named=False)
                transcript = transcript and transcript.of_session(None)
            elif entry is not None and is_new:
                self._take_name_from(session.name)
            elif entry is not None and entry.session is not None:
                session = entry.session
            session.transcript, session.saved_index = transcript, {}
            self._put(session, snapshots, prefix_digests)
        self._save(session.name)
        self._rebalance()
        return session

    def read(self, path: str | Path) -> Session:
        """Return a saved session without keeping it. Raises as `load_session`."""
        return load_session(path, self.fingerprint, self._folder.expected)

    def load(self, path: str | Path) -> Session:
        """Load a saved session under the name it was saved with. Raises as `load_session`."""
        session = self.read(path)
        self.commit(session)
        return session

    def remove(self, name: str) -> None:
        """Delete a session, on disk too.

        Raises:
            SessionNotFoundError: no such session.
            SessionStorageError: its file cannot be deleted. Then the session stays.
        """
        self.refresh(name)
        with self._lock:
            self._entry(name)
            self._wait_until_free(name)
            file = self._entry(name).file
            self._folder.delete((file and file.path) or self._folder.file(name))
            del self._entries[name]
            self._lock.notify_all()
