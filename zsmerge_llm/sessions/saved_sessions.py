"""Sessions and their files: each is saved after each turn where they are to last, and loaded when it is continued.

Several processes may keep sessions in one folder. What another one has written is found when its name is asked for, and
when a conversation is not known, or not as far as its messages go.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from zsmerge_llm.errors import SessionError, SessionNotFoundError
from zsmerge_llm.sessions.folder import Folder, SavedFiles, generate_name
from zsmerge_llm.sessions.moves import TieredSessions
from zsmerge_llm.sessions.session import Session, SessionInfo, Snapshot
from zsmerge_llm.sessions.session_table import StoreEntry
from zsmerge_llm.sessions.tiers import DeviceTier, warn


class SavedSessions(TieredSessions):
    """Sessions by name, in memory or in their files.

    Args:
        persistent: whether they are saved after each turn, and found in the folder at the next start.

    The others are those of `TieredSessions`.
    """

    def __init__(
        self, folder: Folder, limit: int, session_nbytes: int, device: DeviceTier | None, *, persistent: bool
    ) -> None:
        super().__init__(folder, limit, session_nbytes, device)
        self.persistent = persistent
        if persistent:
            folder.delete_abandoned_files()
            for name, files in folder.list_sessions().items():
                self._entries[name] = StoreEntry(None, files.head, files.earlier)

    def __iter__(self) -> Iterator[SessionInfo]:
        """Iterate over all sessions, those of other processes included, the most recently used first."""
        self.refresh_all()
        return super().__iter__()

    def refresh_all(self) -> None:
        """Look whether other processes have written sessions of any name. Takes 6 ms for 1,000 files."""
        if not self.persistent:
            return
        with self._lock:
            files = [entry.file for entry in self._entries.values() if entry.file is not None]
        for name in self._folder.names_changed({file.path: file.stamp for file in files if file.path is not None}):
            self.refresh(name)

    def refresh(self, name: str) -> None:
        """Look whether another process has written, moved or deleted the session of that name.

        What it has continued is taken over. Where it has given the name to another conversation, the one in memory
        goes on under a generated name.
        """
        if not self.persistent or not isinstance(name, str):
            return
        with self._lock:
            entry = self._entries.get(name)
            known = None if entry is None else entry.file
            if name in self._busy:
                return
        path = (known and known.path) or self._folder.file(name)
        found = self._folder.describe(path, known)
        if found is known:
            return
        files = SavedFiles(found, found and self._folder.earlier(path, found.prefix_digests))
        with self._lock:
            current = self._entries.get(name)
            if current is entry and (entry is None or entry.file is known) and name not in self._busy:
                self._take_over(name, entry, files)

    # -- with the lock held ------------------------------------------------------------------------------------------

    def _take_over(self, name: str, entry: StoreEntry | None, files: SavedFiles) -> None:
        """Record what another process has left of a session's files."""
        session, found = None if entry is None else entry.session, files.head
        if session is not None and found is not None and not session.contains(found):
            if session.head.digest not in found.prefix_digests:
                assert entry is not None
                entry.file = entry.earlier = None  # the other process has moved them
                self._warn_of_conflict(name, self._rename(name))
            session = None
        if session is None and found is None:
            self._entries.pop(name, None)
        elif session is None:
            self._entries[name] = StoreEntry(
                None, files.head, files.earlier, foreign=True, version=next(self._versions)
            )
        else:
            assert entry is not None
            entry.file, entry.earlier, entry.foreign = files.head, files.earlier, True
            same = found is not None and found.digest == session.head.digest
            entry.saved_state = session.head.state if same else None

    def _wait_until_free(self, name: str) -> None:
        """Wait until no other thread reads or writes this session's file. The table may have changed then."""
        self._lock.wait_for(lambda: name not in self._busy)

    def _put(self, session: Session, snapshots: Sequence[Snapshot], prefix_digests: Sequence[str]) -> None:
        session.add(snapshots, prefix_digests)
        session.origin = self._folder
        entry = self._entries.pop(session.name, None) or StoreEntry(None)
        entry.session = session
        entry.uses, entry.version = entry.uses + 1, next(self._versions)
        self._entries[session.name] = entry

    def _take_name_from(self, name: str) -> None:
        """Give the session of that name a generated one, so that another conversation can have it."""
        entry = self._entries[name]
        generated = self._rename(name)
        if entry.file is not None:
            try:
                files = self._folder.rename(SavedFiles(entry.file, entry.earlier), generated)
                entry.file, entry.earlier = files.head, files.earlier
            except OSError:
                entry.file = entry.earlier = None
        if entry.session is None and entry.file is None:
            del self._entries[generated]

    def _rename(self, name: str) -> str:
        """Give a session a generated name, in memory, and return it."""
        entry, generated = self._entries.pop(name), generate_name(name)
        self._entries[generated] = entry
        if entry.session is not None:
            entry.session.name, entry.session.named = generated, False
        return generated

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
            known = entry.known_files
        files = None
        try:
            files = self._write(session, known)
        except (OSError, MemoryError, RuntimeError) as error:
            warn(f"Session {name!r} could not be saved, so it will not last: {error}")
        finally:
            with self._lock:
                self._busy.discard(name)
                self._record(name, session, files)
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
                    entry.session, entry.saved_state = loaded, loaded.head.state
                self._lock.notify_all()
        self._rebalance()
        return loaded

    def _load_earlier(self, name: str, digest: str) -> Snapshot:
        """Return a snapshot that is on disk beside a session's head. Raises SessionNotFoundError: there is none."""
        with self._lock:
            self._wait_until_free(name)
            entry = self._entry(name)
            session, files = entry.session, [file for file in entry.points_on_disk if file.digest == digest]
            if not files:
                raise SessionNotFoundError(f"Session {name!r} has moved on.")
            self._busy.add(name)
        found = None
        try:
            found = self._folder.load(files[0]).head
        except SessionError as error:
            raise SessionNotFoundError(f"The point before the last turn of session {name!r} is damaged.") from error
        finally:
            with self._lock:
                self._busy.discard(name)
                if found is None:
                    entry.earlier = None
                elif session is not None and self._entries.get(name) is entry and entry.session is session:
                    session.snapshots = {digest: found, **session.snapshots}
                self._lock.notify_all()
        self._rebalance()
        return found

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
