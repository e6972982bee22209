"""Moves of conversations between tiers, made by one thread in the background.

The lock is never held while a cache is copied or a file is written. Nobody waits for a move but who needs room for more
than the budgets and their overshoot. A conversation that is used while it moves stays where it was.
"""

from __future__ import annotations

import weakref
from dataclasses import replace

from zsmerge_llm.sessions.folder import Folder, SavedFiles
from zsmerge_llm.sessions.mover import Mover
from zsmerge_llm.sessions.session import Session, Snapshot
from zsmerge_llm.sessions.tiers import DeviceTier, Move, TieredTable, log


class TieredSessions(TieredTable):
    """Sessions by name, moved so that the budgets hold. Arguments as for `TieredTable`. Call it without the lock."""

    def __init__(self, folder: Folder, limit: int, session_nbytes: int, device: DeviceTier | None) -> None:
        super().__init__(folder, limit, session_nbytes, device)
        self._mover = Mover(self._move)
        weakref.finalize(self, Mover.stop, self._mover)

    def flush(self) -> None:
        """Wait until nothing is on its way to another tier. Then all budgets hold, but for requests meanwhile."""
        with self._lock:
            self._free_at_once()
            needed = self._next_move() is not None
        if needed:
            self._mover.wake()
        self._mover.wait()

    def close(self) -> None:
        """Finish the move that is on its way, and make no more."""
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self._mover.stop()

    def _rebalance(self) -> None:
        """Let the budgets hold again: at once where nothing is copied or written for it, else in the background.

        Waits only while more than the overshoot would be held.
        """
        with self._lock:
            self._free_at_once()
            needed = self._next_move() is not None
        if needed:
            self._mover.wake()
            with self._lock:
                self._lock.wait_for(self._has_room)

    def _bring_up(self, snapshot: Snapshot) -> Snapshot:
        """Return a snapshot where the model computes."""
        if self._transfer is None or not snapshot.offloaded:
            return snapshot
        copied = snapshot.moved(self._transfer.to_device(snapshot.cache), offloaded=False)
        with self._lock:
            self._replace(copied)
        self._rebalance()
        return copied

    def _write(self, session: Session, known: SavedFiles) -> SavedFiles:
        """Write a session to its files. Raises OSError, and MemoryError or RuntimeError without room for it.

        known: as for `Folder.save`.
        """
        on_device = [each for each in (session.head, session.last_answered) if each and self._is_on_device(each)]
        return self._folder.save(session.with_moved(map(self._copied_to_host, on_device)), known)

    def _copied_to_host(self, snapshot: Snapshot) -> Snapshot:
        assert self._transfer is not None
        return snapshot.moved(self._transfer.to_host(snapshot.cache), offloaded=True)

    def _move(self) -> bool:
        """Make the move that is needed most. Return whether there was one."""
        with self._lock:
            self._free_at_once()
            move = self._next_move()
            self._moving = move is not None
        try:
            if move is not None:
                self._make(move)
        finally:
            with self._lock:
                self._moving = False
                self._lock.notify_all()
        return move is not None

    def _make(self, move: Move) -> None:
        if move.snapshot is not None:
            self._offload(move.snapshot, move)
        elif move.point is not None:
            self._save_earlier(move.name, move.point)
        else:
            self._spill(move.name)

    def _offload(self, snapshot: Snapshot, move: Move) -> None:
        """Copy a snapshot to host memory. Without room there, an older one is dropped, and a head goes to disk."""
        try:
            copied = self._copied_to_host(snapshot)
        except Exception as error:  # no room, mostly; whatever it is, nobody could catch it in the background
            log.warning("Host memory has no room for session %r: %s", move.name, error)
            self._give_up(snapshot)
            return
        with self._lock:
            entry = self._entries.get(move.name)
            if entry is not None and entry.uses == move.uses:
                self._replace(copied)

    def _give_up(self, snapshot: Snapshot) -> None:
        with self._lock:
            needed = [
                name
                for name, entry in self._entries.items()
                if entry.session and snapshot in entry.session.snapshots.values() and entry.is_needed(snapshot)
            ]
            if not needed:
                self._drop(snapshot)
        for name in needed:
            self._spill(name)

    def _save_earlier(self, name: str, point: Snapshot) -> None:
        """Move the last answered point before a session's head to disk. Where that is impossible, it is dropped."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None or entry.session is None or name in self._busy or entry.unsaved_point is not point:
                return
            session = replace(entry.session)
            self._busy.add(name)
        file = None
        try:
            file = self._folder.save_earlier(session, point)
        except Exception as error:  # a full disk, mostly; whatever it is, nobody could catch it in the background
            log.warning("The point before the last turn of session %r cannot be saved: %s", name, error)
        finally:
            with self._lock:
                self._busy.discard(name)
                if self._entries.get(name) is entry:
                    entry.earlier = file or entry.earlier
                    self._limit_disk_use()  # may delete it again, which must not bring it back here
                    if entry.session is not None:
                        entry.session.snapshots = {
                            digest: each for digest, each in entry.session.snapshots.items() if each is not point
                        }
                self._lock.notify_all()

    def _spill(self, name: str) -> None:
        """Write a session to its file and leave it there, unless it is used meanwhile."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None or entry.session is None or name in self._busy:
                return
            session, uses, known = replace(entry.session), entry.uses, entry.known_files
            saved = entry.is_saved
            self._busy.add(name)
        files, problem = None, None
        try:
            files = None if saved else self._write(session, known)
        except Exception as error:  # a full disk, mostly; as above
            problem = error
        finally:
            with self._lock:
                self._busy.discard(name)
                self._record(name, session, files)
                if self._entries.get(name) is entry and entry.uses == uses:
                    self._leave_memory(name, problem)
                self._lock.notify_all()
