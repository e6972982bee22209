"""All sessions under one memory ceiling: the least recently used go to disk and come back when they are continued.

One lock guards the table of sessions. Turns are saved (`folder`) outside it, one write per session at a time, so that
other conversations go on meanwhile; only spilling and bringing back hold it.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Condition

from zsmerge_llm.errors import SessionNotFoundError, StoreFullError
from zsmerge_llm.sessions.folder import Folder, SessionInfo, StoreEntry, new_name
from zsmerge_llm.sessions.session import Fingerprint, Session, Snapshot, load_session


@dataclass(frozen=True)
class ResumePoint:
    """A point to read on from. `head`: the digest of the session's newest point when it was found."""

    session: Session
    snapshot: Snapshot
    head: str


class Store:
    """Sessions by name, found again by what was said in them. Safe to use from several threads.

    Args:
        fingerprint: what all sessions here belong to.
        limit: bytes that the snapshots of all sessions together may hold in memory. Conversations that nobody gave a
            name may take as much on disk; the least recently used ones are forgotten, and read anew if they come back.
        session_nbytes: bytes of one session's cache.
        folder: where sessions are kept for good: each is saved after each turn, and found here at the next start.
            None: nothing lasts, and what does not fit into memory is spilled to a temporary folder.
        devices: where the layers of a session go when it is loaded; None is where they were.

    Raises:
        StoreFullError: `limit` is less than one session needs. ConfigError: `folder` cannot be used.
    """

    def __init__(
        self,
        fingerprint: Fingerprint,
        limit: int,
        session_nbytes: int = 0,
        folder: str | Path | None = None,
        devices: Sequence[str] | None = None,
    ) -> None:
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
        self._folder = Folder(path, fingerprint, self.persistent, devices)
        self._lock = Condition()  # on a re-entrant lock
        self._kept: dict[str, StoreEntry] = {}  # the least recently used first
        self._writing: set[str] = set()  # names of sessions that are being saved outside the lock
        if self.persistent:
            self._folder.sweep()
            self._kept.update((name, StoreEntry(None, file)) for name, file in self._folder.saved().items())

    # -- looking -----------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """Where sessions are saved."""
        return self._folder.path

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[SessionInfo]:
        """All sessions, the most recently used first."""
        with self._lock:
            return iter([kept.info(name) for name, kept in reversed(self._kept.items())])

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    @property
    def nbytes(self) -> int:
        """Bytes held in memory; what sessions share counts once."""
        with self._lock:
            sizes: dict[int, int] = {}
            for kept in self._kept.values():
                if kept.session is not None:
                    sizes.update((id(point), point.nbytes) for point in kept.session.snapshots.values())
                    if kept.session.document is not None:
                        sizes[id(kept.session.document)] = sys.getsizeof(kept.session.document)
            return sum(sizes.values())

    def info(self, name: str) -> SessionInfo | None:
        """What is known of a session without bringing it back; None where there is none."""
        with self._lock:
            return self._kept[name].info(name) if name in self._kept else None

    def get(self, name: str) -> Session:
        """The session of that name, brought back from disk if it is there.

        Raises:
            SessionNotFoundError. SessionCorruptError: its file was damaged.
        """
        with self._lock:
            session = self._restore(name)
            self._shrink()
            return session

    def head(self, name: str) -> str | None:
        """The digest of a session's newest point; None where there is no such session."""
        with self._lock:
            return self._kept[name].head if name in self._kept else None

    def matches(self, digests: Sequence[str], hint: str | None = None) -> list[tuple[str, str]]:
        """Where a conversation may be taken up, as (name, digest), the best first: the latest point of it.

        Among sessions that hold the same point the hinted one comes first, then the most recently used.

        Args:
            digests: one for each beginning of the conversation, the shortest first.
        """
        rank = {digest: n for n, digest in enumerate(digests)}
        with self._lock:
            known = [
                (rank[digest], name == hint, order, name, digest)
                for order, (name, kept) in enumerate(self._kept.items())
                for digest in kept.digests
                if digest in rank
            ]
        return [(name, digest) for *_, name, digest in sorted(known, reverse=True)]

    def open(self, name: str, digest: str) -> ResumePoint:
        """A point that `matches` named. Raises as `get`; SessionNotFoundError too where it is gone meanwhile."""
        with self._lock:
            session = self._restore(name)
            if digest not in session.snapshots:
                raise SessionNotFoundError(f"Session {name!r} has moved on.")
            found = ResumePoint(session, session.snapshots[digest], session.head.digest)
            self._shrink()
            return found

    def resembling(self, digests: Sequence[str]) -> tuple[str, int] | None:
        """The session that began like this conversation, though no point of it is left, and how far: (name, index).

        Index n: `digests[n]` is the last one they share. Answers why something has to be read again.
        """
        rank = {digest: n for n, digest in enumerate(digests)}
        with self._lock:
            shared = [
                (max((rank.get(digest, -1) for digest in kept.chain), default=-1), name)
                for name, kept in self._kept.items()
            ]
        far, name = max(shared, default=(-1, ""))
        return (name, far) if far >= 0 else None

    # -- changing ----------------------------------------------------------------------------------------------------

    def commit(self, session: Session, snapshots: Sequence[Snapshot] = (), chain: Sequence[str] = ()) -> None:
        """Move `session` on to the last of `snapshots` and keep it, instead of any other session of its name."""
        with self._lock:
            self._put(session, snapshots, chain)
        self._save(session.name)

    def advance(
        self,
        session: Session,
        snapshots: Sequence[Snapshot],
        chain: Sequence[str],
        expected: str | None,
        takes_over: bool,
    ) -> Session:
        """Keep what came of a turn; the session that holds it in the end.

        Args:
            session: whose turn it was: one of the store's, or a new one (`takes_over`).
            expected: `head` of the session's name when the turn began. If something else is there by now, the turn
                becomes a session of its own.
            takes_over: the name may be another conversation's, which then goes on without a name.
        """
        with self._lock:
            self._idle(session.name)
            kept = self._kept.get(session.name)
            if kept is not None and kept.head != expected:
                points = session.snapshots if takes_over else {}
                session = replace(session, name=new_name(), snapshots=points, named=False)
            elif kept is not None and takes_over:
                self._unname(session.name)
            elif kept is not None and kept.session is not None:
                session = kept.session
            self._put(session, snapshots, chain)
        self._save(session.name)
        return session

    def load(self, path: str | Path) -> Session:
        """Bring a saved session in, under the name it was saved with. Raises as `session.load_session`."""
        session = load_session(path, self.fingerprint, self._folder.devices)
        self.commit(session)
        return session

    def remove(self, name: str) -> None:
        """Forget a session, on disk too. Raises SessionNotFoundError."""
        with self._lock:
            self._idle(name)
            file = self._entry(name).file
            del self._kept[name]
            if file is not None:
                file.path.unlink(missing_ok=True)

    def forget(self, name: str) -> None:
        """Leave a session out from now on because its file cannot be used; the file stays for who wants to look."""
        with self._lock:
            self._kept.pop(name, None)

    # -- behind it: all of this with the lock held, but for `_save` ----------------------------------------------------

    def _entry(self, name: str) -> StoreEntry:
        if name not in self._kept:
            known = ", ".join(sorted(self._kept)) or "none"
            raise SessionNotFoundError(f"There is no session {name!r}; there are: {known}.")
        return self._kept[name]

    def _idle(self, name: str) -> None:
        """Wait until no other thread writes this session's file. Lets go of the lock, so things may have changed."""
        self._lock.wait_for(lambda: name not in self._writing)

    def _put(self, session: Session, snapshots: Sequence[Snapshot], chain: Sequence[str]) -> None:
        session.add(snapshots, chain)
        old = self._kept.pop(session.name, None)
        self._kept[session.name] = StoreEntry(session) if old is None else StoreEntry(session, old.file, old.written)
        self._shrink()

    def _unname(self, name: str) -> None:
        """Leave a name to another conversation."""
        kept, fresh = self._kept.pop(name), new_name()
        if kept.file is not None:
            try:
                kept.file = self._folder.rename(kept.file, fresh)
            except OSError:
                kept.file = None
        if kept.session is not None:
            kept.session.name, kept.session.named = fresh, False
        if kept.session is not None or kept.file is not None:
            self._kept[fresh] = kept

    def _save(self, name: str) -> None:
        """Write a session's newest point where sessions last, without the lock: others go on meanwhile."""
        if not self.persistent:
            return
        with self._lock:
            self._idle(name)
            kept = self._kept.get(name)
            if kept is None or kept.session is None or kept.saved:
                return
            self._writing.add(name)
            session = replace(kept.session)  # as it is now: the conversation may go on meanwhile
        file = None
        try:
            file = self._folder.save(session)
        except OSError as error:
            warnings.warn(f"Session {name!r} could not be saved, so it will not last: {error}", stacklevel=4)
        finally:
            with self._lock:
                self._writing.discard(name)
                if file is not None and name in self._kept:
                    self._kept[name].wrote(file, session.head)
                    self._trim()
                self._lock.notify_all()

    def _restore(self, name: str) -> Session:
        """The session, in memory and marked as the most recently used."""
        kept = self._entry(name)
        self._kept[name] = self._kept.pop(name)
        if kept.session is None and kept.file is not None:
            self._shrink(reserve=kept.file.nbytes)
            if self._kept.get(name) is not kept:
                return self._restore(name)
        if kept.session is None and kept.file is not None:
            kept.session = self._folder.load(name, kept.file)
            kept.wrote(kept.file, kept.session.head)
        assert kept.session is not None
        kept.session.used = time.time()
        return kept.session

    def _shrink(self, reserve: int = 0) -> None:
        """Down to the ceiling. Idle sessions first: their old points go, then they go to disk; last the one in use."""
        room, everyone = self.limit - reserve, list(self._kept.items())
        for group in (everyone[:-1], everyone[-1:]):
            for _, kept in group:
                if self.nbytes <= room:
                    return
                if kept.session is not None:
                    kept.session.snapshots = {kept.head: kept.session.head}
            for name, kept in group:
                if self.nbytes <= room:
                    return
                self._spill(name, kept)

    def _spill(self, name: str, kept: StoreEntry) -> None:
        self._idle(name)
        if kept.session is None or self._kept.get(name) is not kept:
            return
        if not kept.saved:
            try:
                kept.wrote(self._folder.save(kept.session), kept.session.head)
            except OSError as error:
                fate = "is forgotten" if kept.file is None else "falls back to an earlier point"
                why = f"memory is full and it cannot be saved ({error})"
                warnings.warn(f"Session {name!r} {fate}: {why}.", stacklevel=4)
        kept.session = None
        if kept.file is None:
            del self._kept[name]
        self._trim()

    def _trim(self) -> None:
        """Forget the least recently used files of conversations without a name, where they are too many."""
        files = [
            (name, kept, kept.file)
            for name, kept in self._kept.items()
            if kept.file is not None and not kept.named and name not in self._writing
        ]
        total = sum(file.nbytes for *_, file in files)
        for name, kept, file in files:
            if total <= self.limit:
                return
            total -= file.nbytes
            file.path.unlink(missing_ok=True)
            kept.file = None
            if kept.session is None:
                del self._kept[name]
