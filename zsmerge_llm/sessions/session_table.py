"""The table of all sessions, in memory or on disk, and what can be asked of it without loading one."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

from zsmerge_llm.errors import InputError, SessionNotFoundError, shown
from zsmerge_llm.models.owner_process import ProcessCondition
from zsmerge_llm.sessions.folder import SavedFiles
from zsmerge_llm.sessions.session import Session, SessionInfo, Snapshot
from zsmerge_llm.sessions.transcript import Transcript


@dataclass(eq=False)
class StoreEntry:
    """A session in memory (`session`), on disk (`file`, maybe at an earlier head), or both.

    Attributes:
        earlier: the file of the last answered point before the head, or before the file's.
        saved_state: `Snapshot.state` of what the file holds. Another snapshot may have the same digest.
        foreign: whether the file is another process's work that this one has found there.
        version: another one after every change of the session, but not after it was moved to another tier.
        uses: how often it was used or changed. A move that finds another number than at its beginning leaves the
            session where it is.
    """

    session: Session | None
    file: SessionInfo | None = None
    earlier: SessionInfo | None = None
    saved_state: object | None = None
    foreign: bool = False
    version: int = 0
    uses: int = 0

    @property
    def info(self) -> SessionInfo:
        if self.session is not None:
            return self.session.info
        assert self.file is not None
        return self.file

    @property
    def digests(self) -> list[str]:
        """Digests of the snapshots that requests can resume from."""
        in_memory = [] if self.session is None else self.session.snapshots
        return list(dict.fromkeys([*in_memory, *(file.digest for file in self.points_on_disk)]))

    @property
    def points_on_disk(self) -> list[SessionInfo]:
        """The files that requests can resume from."""
        files = [file for file in (self.file, self.earlier) if file is not None]
        return files if self.session is None else [file for file in files if self.session.answered(file)]

    @property
    def unsaved_point(self) -> Snapshot | None:
        """The last answered point before the head, if it is in memory and not on disk."""
        point = None if self.session is None else self.session.last_answered
        newest_on_disk = max((file.messages for file in self.points_on_disk), default=-1)
        return None if point is None or point.messages <= newest_on_disk else point

    def is_needed(self, snapshot: Snapshot) -> bool:
        """Return whether a snapshot in memory is the head, or is to be saved before it leaves memory."""
        return self.session is not None and (snapshot is self.session.head or snapshot is self.unsaved_point)

    @property
    def is_saved(self) -> bool:
        """Whether all is on disk that is to be: the head, and the answered point before it."""
        if self.session is None or self.file is None:
            return self.file is not None
        return self.saved_state is self.session.head.state and self.unsaved_point is None

    @property
    def known_files(self) -> SavedFiles:
        """The files as this process has last read or written them; none of another process's."""
        return SavedFiles() if self.foreign else SavedFiles(self.file, self.earlier)

    def record_save(self, files: SavedFiles, head: Snapshot) -> None:
        """Record what is on disk now."""
        self.file, self.earlier, self.saved_state, self.foreign = files.head, files.earlier, head.state, False


class MemoryUse(NamedTuple):
    """Bytes of all sessions in host memory, and on the device of the model where that is another."""

    host: int
    device: int


class SessionTable:
    """Sessions by name, the least recently used first. Safe to use from several threads.

    has_device: whether the model computes elsewhere than in host memory.
    """

    def __init__(self, has_device: bool = False) -> None:
        self._lock = ProcessCondition()  # on a re-entrant lock
        self._entries: dict[str, StoreEntry] = {}
        self._versions = count(1)
        self._has_device = has_device

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[SessionInfo]:
        """Iterate over all sessions, the most recently used first."""
        with self._lock:
            return iter([self._describe(entry) for entry in reversed(self._entries.values())])

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._entries

    @property
    def nbytes(self) -> int:
        """Bytes held in host memory; what sessions share counts once."""
        return self._memory_use().host

    @property
    def device_nbytes(self) -> int:
        """Bytes held on the device of the model: 0 where that is the host."""
        return self._memory_use().device

    def _memory_use(self) -> MemoryUse:
        with self._lock:
            sizes: tuple[dict[int, int], dict[int, int]] = ({}, {})
            for entry in self._entries.values():
                if entry.session is None:
                    continue
                for snapshot in entry.session.snapshots.values():
                    sizes[self._is_on_device(snapshot)][id(snapshot)] = snapshot.nbytes
                if entry.session.document is not None:
                    sizes[False][id(entry.session.document)] = sys.getsizeof(entry.session.document)
            return MemoryUse(*(sum(each.values()) for each in sizes))

    def _is_on_device(self, snapshot: Snapshot) -> bool:
        return self._has_device and not snapshot.offloaded

    def _describe(self, entry: StoreEntry) -> SessionInfo:
        """Return what is listed of a session, with its tier."""
        if entry.session is None or not self._is_on_device(entry.session.head):
            return entry.info
        return replace(entry.info, tier="device")

    def info(self, name: str) -> SessionInfo | None:
        """Return the description of a session without loading it; None where there is none."""
        with self._lock:
            return self._describe(self._entries[name]) if name in self else None

    def version(self, name: str) -> int | None:
        """Return a number that changes with every change of a session; None where there is no such session."""
        with self._lock:
            return self._entries[name].version if name in self._entries else None

    def transcripts(self, first: str | None = None) -> list[Transcript]:
        """Return the transcripts of the sessions in memory: that of the session `first`, then the newest."""
        with self._lock:
            sessions = [entry.session for entry in reversed(self._entries.values()) if entry.session is not None]
        sessions.sort(key=lambda session: session.name != first)
        return [session.transcript for session in sessions if session.transcript is not None]

    def find_resume_points(self, lengths: Mapping[str, int], hint: str | None = None) -> list[tuple[str, str]]:
        """Return the snapshots that a conversation can resume from, as (name, digest), the longest first.

        Among sessions that hold the same snapshot the one named `hint` comes first, then the most recently used.

        lengths: by the digest of each prefix of the conversation.
        """
        with self._lock:
            known = [
                (lengths[digest], name == hint, order, name, digest)
                for order, (name, entry) in enumerate(self._entries.items())
                for digest in entry.digests
                if digest in lengths
            ]
        return [(name, digest) for *_, name, digest in sorted(known, reverse=True)]

    def longest_shared_prefix(self, digests: Sequence[str]) -> tuple[str, int] | None:
        """Return the session that began like this conversation, though no snapshot of it is left: (name, index).

        `digests[index]` is the last prefix they share. Explains why a conversation has to be read again.
        """
        length = {digest: n for n, digest in enumerate(digests)}
        with self._lock:
            shared = [
                (max((length.get(digest, -1) for digest in entry.info.prefix_digests), default=-1), name)
                for name, entry in self._entries.items()
            ]
        longest, name = max(shared, default=(-1, ""))
        return (name, longest) if longest >= 0 else None

    def forget(self, name: str) -> None:
        """Leave a session out from now on because its file cannot be used; the file itself stays."""
        with self._lock:
            self._entries.pop(name, None)

    def _entry(self, name: str) -> StoreEntry:
        if not isinstance(name, str):
            raise InputError(f"The name of a session is text, not a {type(name).__name__}.")
        if name not in self._entries:
            raise SessionNotFoundError(f"There is no session {shown(name)}: list(llm.store) gives those there are.")
        return self._entries[name]
