"""Which tier a conversation is on: the device of the model, host memory, or disk.

Each tier has a budget. What was used least recently goes down first, and older snapshots before the heads of
conversations. Host memory drops them, but for the last answered point before each head: that goes to disk.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

from zsmerge_llm.sessions.folder import GENERATED_NAME, Folder, SavedFiles
from zsmerge_llm.sessions.session import Session, Snapshot
from zsmerge_llm.sessions.session_table import SessionTable, StoreEntry
from zsmerge_llm.sessions.transfer import Transfer

log = logging.getLogger(__name__)

OVERSHOOT_CACHES = 8
"""Caches by which a tier may exceed its budget while moves are on their way; of host memory, at least an eighth."""


@dataclass(frozen=True)
class DeviceTier:
    """The memory of a model that does not compute in the host's.

    limit: bytes that the snapshots of idle conversations may hold there.
    """

    transfer: Transfer
    limit: int


@dataclass(frozen=True)
class Move:
    """A move of a session, or of one of its snapshots.

    Attributes:
        uses: of the session's entry when the move was chosen.
        snapshot: what to copy to host memory, or None.
        point: what to write beside the session's file, or None. Without either the session goes to its file.
    """

    name: str
    uses: int
    snapshot: Snapshot | None = None
    point: Snapshot | None = None


class TieredTable(SessionTable):
    """Sessions by name, with budgets, and what is to move so that they hold. All of it with the lock held.

    Args:
        folder: where sessions are saved.
        limit: bytes that the snapshots of all sessions may hold in host memory, and unnamed ones on disk.
        session_nbytes: bytes of one session's cache.
        device: the tier above host memory; None where the model computes there.
    """

    def __init__(self, folder: Folder, limit: int, session_nbytes: int, device: DeviceTier | None) -> None:
        super().__init__(has_device=device is not None)
        self.limit = limit
        self.device_limit = 0 if device is None else device.limit
        self._most_host = limit + max(limit // 8, OVERSHOOT_CACHES * session_nbytes)
        self._most_device = self.device_limit + OVERSHOOT_CACHES * session_nbytes
        self._folder = folder
        self._transfer = None if device is None else device.transfer
        self._busy: set[str] = set()  # names of sessions whose file is read or written without the lock
        self._moving = False
        self._has_warned = False
        self._closed = False

    @property
    def folder(self) -> Path:
        """Where sessions are saved."""
        return self._folder.path

    def _next_move(self) -> Move | None:
        """Return the move that is needed most; None where none is, or can be made."""
        use = self._memory_use()
        if self._closed or (use.host <= self.limit and use.device <= self.device_limit):
            return None
        if use.host > self.limit:
            for owner, entry in self._entries.items():
                point = entry.unsaved_point
                if point is not None and owner not in self._busy and not self._is_on_device(point):
                    return Move(owner, entry.uses, point=point)
            holding = self._holding_host_memory()
            name = next((each for each in holding if each not in self._busy), None)
            # The session in use goes last, and not before those that are just being saved.
            if name is not None and (name == holding[0] or name != next(reversed(self._entries))):
                return Move(name, self._entries[name].uses)
        if use.device > self.device_limit:
            for snapshot, name in self._on_device():
                if name not in self._busy:
                    return Move(name, self._entries[name].uses, snapshot)
        return None

    def _holding_host_memory(self) -> list[str]:
        """Return the sessions that could be spilled to free host memory, the first to go first."""
        return [
            name
            for name, entry in self._entries.items()
            if entry.session is not None
            and (entry.session.document is not None or not self._is_on_device(entry.session.head))
        ]

    def _on_device(self) -> list[tuple[Snapshot, str]]:
        """Return the snapshots on the device, the first to go first, each with the last used session that holds it.

        Older snapshots of idle sessions come first, then their heads, then those of the session in use.
        """
        ranks: dict[object, tuple[tuple[bool, bool, int], Snapshot, str]] = {}
        for index, (name, entry) in enumerate(self._entries.items()):
            if entry.session is None:
                continue
            in_use, head = index == len(self._entries) - 1, entry.session.head
            for snapshot in entry.session.snapshots.values():
                if self._is_on_device(snapshot):
                    rank = (in_use, snapshot is head, index)
                    known = ranks.get(snapshot.state)
                    if known is None or known[0] < rank:
                        ranks[snapshot.state] = rank, snapshot, name
        return [(snapshot, name) for _, snapshot, name in sorted(ranks.values(), key=lambda each: each[0])]

    def _has_room(self) -> bool:
        """Return whether a request may go on: within the overshoot, or where no move could help."""
        use = self._memory_use()
        within = use.host <= self._most_host and use.device <= self._most_device
        return within or (not self._moving and self._next_move() is None)

    def _free_at_once(self) -> None:
        """Free host memory by what costs nothing: older snapshots of idle sessions, sessions that are saved.

        The session in use gives up its own when nothing else is left.
        """
        if self._is_within_limit() or not self._entries:
            return
        *idle, last = self._entries
        for name in idle:
            if self._drop_older_snapshots(name) and self._is_within_limit():
                return
        for name in self._holding_host_memory():
            if name == last:
                break
            if name in self._busy or not self._entries[name].is_saved:
                return
            self._leave_memory(name, None)
            if self._is_within_limit():
                return
        self._drop_older_snapshots(last)

    def _is_within_limit(self) -> bool:
        return self._memory_use().host <= self.limit

    def _drop_older_snapshots(self, name: str) -> bool:
        """Drop what a session holds in host memory but its head, and what is to be saved. Return whether it did."""
        entry = self._entries[name]
        session = entry.session
        if session is None or len(session.snapshots) == 1:
            return False
        before = len(session.snapshots)
        session.snapshots = {
            digest: each
            for digest, each in session.snapshots.items()
            if self._is_on_device(each) or entry.is_needed(each)
        }
        return len(session.snapshots) < before

    def _drop(self, snapshot: Snapshot) -> None:
        for entry in self._entries.values():
            if entry.session is not None and snapshot in entry.session.snapshots.values():
                kept = {digest: each for digest, each in entry.session.snapshots.items() if each is not snapshot}
                entry.session = replace(entry.session, snapshots=kept)

    def _replace(self, copied: Snapshot) -> None:
        """Put a copy of a snapshot on another tier in the place of all others, in all sessions that share it."""
        for entry in self._entries.values():
            if entry.session is not None and any(
                each.state is copied.state for each in entry.session.snapshots.values()
            ):
                entry.session = entry.session.with_moved([copied])

    def _leave_memory(self, name: str, problem: Exception | None) -> None:
        """Drop a session from memory: it is on disk or, after a problem, what is there of it."""
        entry = self._entries[name]
        entry.session = None
        if entry.file is None:
            self._delete_files(entry)
            del self._entries[name]
        if problem is not None:
            effect = "is forgotten" if entry.file is None else "falls back to an earlier snapshot"
            warn(f"Session {name!r} {effect}: memory is full and it cannot be saved ({problem}).")
        self._limit_disk_use()

    def _record(self, name: str, session: Session, files: SavedFiles | None) -> None:
        """Record what was written of a session, if it is still there."""
        if files is None:
            return
        if files.set_aside is not None:
            self._add_set_aside(name, files.set_aside)
        if name in self._entries:
            self._entries[name].record_save(files, session.head)
        self._limit_disk_use()

    def _add_set_aside(self, name: str, files: SavedFiles) -> None:
        """Keep another process's conversation, which has lost its name to one of this process."""
        assert files.head is not None
        self._entries[files.head.name] = StoreEntry(None, files.head, files.earlier, version=next(self._versions))
        if name in self._entries:  # it is in use
            self._entries[name] = self._entries.pop(name)
        self._warn_of_conflict(name, files.head.name)

    def _warn_of_conflict(self, name: str, other: str) -> None:
        """Warn once that two conversations want one name. Nobody asks for a generated one."""
        if not self._has_warned and not GENERATED_NAME.fullmatch(name):
            self._has_warned = True
            warn(
                f"Another process keeps a conversation named {name!r} in {self.folder}, too. Both are kept, one of "
                f"them as {other!r}, and each continues. Give each process names or a sessions_dir of its own."
            )

    def _limit_disk_use(self) -> None:
        """Delete the least recently used files of conversations without a name, down to the ceiling.

        Points before a last turn that was answered go before any conversation.
        """
        entries = [
            (name, entry)
            for name, entry in self._entries.items()
            if (entry.file or entry.earlier) is not None and not entry.info.named and name not in self._busy
        ]
        total = sum(file.nbytes for _, entry in entries for file in (entry.file, entry.earlier) if file is not None)
        for _, entry in entries:
            if total > self.limit and entry.earlier is not None and entry.info.kind not in ("prompt", "branch"):
                total -= entry.earlier.nbytes
                self._folder.discard(entry.earlier)
                entry.earlier = None
        for name, entry in entries:
            if total <= self.limit:
                return
            total -= sum(file.nbytes for file in (entry.file, entry.earlier) if file is not None)
            self._delete_files(entry)
            if entry.session is None:
                del self._entries[name]

    def _delete_files(self, entry: StoreEntry) -> None:
        """Delete the files of a conversation that is given up, as far as they can be and no other process uses them."""
        for file in (entry.file, entry.earlier):
            if file is not None:
                self._folder.discard(file)
        entry.file = entry.earlier = None


def warn(message: str) -> None:
    """Warn, also where warnings are errors: nobody could catch one in the background."""
    try:
        warnings.warn(message, stacklevel=2)
    except UserWarning:
        log.warning(message)
