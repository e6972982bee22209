"""All sessions under one memory ceiling: the least recently used go to disk and come back when they are continued."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import RLock
from urllib.parse import quote, unquote

from zsmerge_llm.errors import SessionError, SessionNotFoundError, StoreFullError
from zsmerge_llm.session import Fingerprint, Kind, Session, Snapshot, load_session, read_about

SUFFIX = ".zsmerge"


@dataclass(frozen=True)
class SessionInfo:
    """One line of a listing. nbytes: in memory, or on disk where `in_memory` is False."""

    name: str
    tokens: int
    messages: int
    nbytes: int
    in_memory: bool
    used: float


@dataclass(frozen=True)
class _Spilled:
    """A session on disk, as far as recognising it needs."""

    path: Path
    digest: str
    messages: int
    tokens: int
    kind: Kind
    used: float


@dataclass(frozen=True)
class Found:
    """A point to read on from. `head`: the digest of the session's newest point when it was found."""

    session: Session
    snapshot: Snapshot
    head: str


class Store:
    """Sessions by name, found again by what was said in them. Safe to use from several threads.

    Args:
        fingerprint: what all sessions here belong to.
        limit: bytes that the snapshots of all sessions together may hold in memory.
        session_nbytes: bytes of one session's cache.
        folder: where sessions are kept for good: each is saved after each turn, and found here at the next start.
            None: nothing lasts, and what does not fit into memory is spilled to a temporary folder.

    Raises:
        StoreFullError: `limit` is less than one session needs.
    """

    def __init__(
        self, fingerprint: Fingerprint, limit: int, session_nbytes: int = 0, folder: str | Path | None = None
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
        self.folder = Path(folder if folder is not None else self._temporary.name)  # type: ignore[union-attr]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = RLock()
        self._sessions: dict[str, Session | _Spilled] = {}  # least recently used first
        if self.persistent:
            self._sessions.update(self._saved())

    # -- looking -----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[SessionInfo]:
        """All sessions, the most recently used first."""
        with self._lock:
            return iter([self._info(name, kept) for name, kept in reversed(self._sessions.items())])

    def __contains__(self, name: str) -> bool:
        return name in self._sessions

    @property
    def nbytes(self) -> int:
        """Bytes held in memory; what sessions share counts once."""
        with self._lock:
            snapshots = {id(s): s for kept in self._sessions.values() for s in _held(kept)}
            return sum(snapshot.nbytes for snapshot in snapshots.values())

    def get(self, name: str) -> Session:
        """The session of that name, brought back from disk if it is there.

        Raises:
            SessionNotFoundError. SessionCorruptError: its file was damaged.
        """
        with self._lock:
            if name not in self._sessions:
                known = ", ".join(sorted(self._sessions)) or "none"
                raise SessionNotFoundError(f"There is no session {name!r}; there are: {known}.")
            session = self._restore(name)
            self._shrink()
            return session

    def find(self, digests: Sequence[str], hint: str | None = None) -> Found | None:
        """The longest known beginning of a conversation: entry n of `digests` stands for its first n messages.

        The hinted session wins among equals, then the most recently used one. A damaged file counts as unknown.
        """
        with self._lock:
            for digest in reversed(digests):
                names = [name for name, kept in self._sessions.items() if digest in _digests(kept)]
                for name in (
                    sorted(names, key=lambda name: name == hint, reverse=True) if hint in names else names[::-1]
                ):
                    try:
                        session = self._restore(name)
                    except SessionError:
                        self.remove(name)
                        continue
                    found = Found(session, session.snapshots[digest], session.head.digest)
                    self._shrink()
                    return found
        return None

    # -- changing ----------------------------------------------------------------------------------------------------

    def commit(self, session: Session, snapshots: Sequence[Snapshot]) -> None:
        """Move `session` on to the last of `snapshots`, keep it, and save it where the folder lasts."""
        with self._lock:
            session.add(snapshots)
            self._sessions.pop(session.name, None)
            self._sessions[session.name] = session
            if self.persistent:
                session.save(self.path(session.name))
            self._shrink()

    def remove(self, name: str) -> None:
        """Forget a session, on disk too. Raises SessionNotFoundError."""
        with self._lock:
            if name not in self._sessions:
                raise SessionNotFoundError(f"There is no session {name!r}.")
            del self._sessions[name]
            self.path(name).unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """The file a session of that name is saved to."""
        return self.folder / f"{quote(name, safe='')}{SUFFIX}"

    def _restore(self, name: str) -> Session:
        """The session, in memory and marked as the most recently used."""
        kept = self._sessions.pop(name)
        if isinstance(kept, _Spilled):
            try:
                kept = load_session(kept.path, self.fingerprint)
            except SessionError:
                self._sessions[name] = kept
                raise
        kept.used = time.time()
        self._sessions[name] = kept
        return kept

    def _shrink(self) -> None:
        """Down to the ceiling: first the old points of all sessions go, then whole sessions to disk."""
        for kept in list(self._sessions.values()):
            if self.nbytes <= self.limit:
                return
            if isinstance(kept, Session):
                kept.snapshots = {kept.head.digest: kept.head}
        for name, kept in list(self._sessions.items()):
            if self.nbytes <= self.limit:
                return
            if isinstance(kept, Session):
                self._sessions[name] = self._spill(kept)

    def _spill(self, session: Session) -> _Spilled:
        head, path = session.head, self.path(session.name)
        if not (self.persistent and path.exists()):
            session.save(path)
        return _Spilled(path, head.digest, head.messages, len(head.tokens), head.kind, session.used)

    def _saved(self) -> dict[str, _Spilled]:
        """What an earlier run left in the folder for this model and cache; anything else stays untouched."""
        saved = {}
        for path in sorted(self.folder.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime):
            try:
                about = read_about(path)
            except SessionError:
                continue
            if about["fingerprint"] == asdict(self.fingerprint):
                tokens, used = about["tokens"], path.stat().st_mtime
                name = unquote(path.name.removesuffix(SUFFIX))
                saved[name] = _Spilled(path, about["digest"], about["messages"], tokens, about["kind"], used)
        return saved

    def _info(self, name: str, kept: Session | _Spilled) -> SessionInfo:
        if isinstance(kept, _Spilled):
            size = kept.path.stat().st_size if kept.path.exists() else 0
            return SessionInfo(name, kept.tokens, kept.messages, size, False, kept.used)
        return SessionInfo(name, len(kept.head.tokens), kept.head.messages, kept.nbytes, True, kept.used)


def _held(kept: Session | _Spilled) -> list[Snapshot]:
    return list(kept.snapshots.values()) if isinstance(kept, Session) else []


def _digests(kept: Session | _Spilled) -> set[str]:
    return set(kept.snapshots) if isinstance(kept, Session) else {kept.digest}
