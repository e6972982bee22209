"""Responses that are kept: a later request can go on from one (`previous_response_id`), and it can be looked up.

With a folder they are there after a restart, and for every server that has the same folder.
"""

from __future__ import annotations

import json
import logging
import re
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from zsmerge_llm.models.atomic_write import write_atomically
from zsmerge_llm.server.errors import not_found
from zsmerge_llm.types import Message

log = logging.getLogger(__name__)

NAME = re.compile(r"resp_[0-9a-f]{32}")
"""Ids that this server makes. No other can name a file."""


CLEAN_EVERY = 100
"""Responses between two looks whether there are too many in remote storage, where a look is a request."""


@dataclass(frozen=True)
class StoredResponse:
    """A conversation that a later request can go on from.

    Attributes:
        owner: whose it is. messages: all of it, without instructions, the answer included. response: as it was sent.
    """

    owner: str | None
    messages: list[Message]
    response: dict[str, Any]


class Entries(Protocol):
    """Texts by name. When there are too many, the oldest are forgotten."""

    def put(self, name: str, text: bytes) -> None: ...

    def get(self, name: str) -> bytes | None: ...

    def remove(self, name: str) -> None: ...


class StoredResponses:
    """The newest responses by their ids. Safe to use from several threads.

    Args:
        entries: where they are kept.
    """

    def __init__(self, entries: Entries) -> None:
        self._entries = entries

    def keeper(
        self, messages: list[Message], owner: str | None, wanted: bool
    ) -> Callable[[dict[str, Any], Message], None]:
        """Return a function that keeps a response and the conversation it ends.

        Args:
            messages: those before its answer, without instructions.
            wanted: whether it is to be kept.
        """

        def keep(response: dict[str, Any], answer: Message) -> None:
            if wanted:
                stored = StoredResponse(owner, [*messages, answer], response)
                self._entries.put(response["id"], json.dumps(asdict(stored)).encode())

        return keep

    def get(self, name: str, owner: str | None) -> StoredResponse:
        """Return a response. Raises RequestError: it is not there, or somebody else's."""
        text = self._entries.get(name) if NAME.fullmatch(name) else None
        found = None if text is None else _parse(text)
        if found is None or found.owner != owner:
            raise not_found(f"There is no response {name!r}: send the whole conversation as input.")
        return found

    def remove(self, name: str, owner: str | None) -> None:
        """Forget a response. Raises as `get`."""
        self.get(name, owner)
        self._entries.remove(name)


def stored_responses(folder: str | Path | None, max_number: int, max_bytes: int) -> StoredResponses:
    """Return the responses that are kept in a folder; None: in memory, until the process ends.

    folder: a path, or a URL that fsspec knows.

    Raises:
        OSError: the folder cannot be made.
    """
    if folder is None:
        return StoredResponses(MemoryEntries(max_number, max_bytes))
    storage, root = url_to_fs(str(folder), use_listings_cache=False)
    limits = (max_number, max_bytes)
    if not isinstance(storage, LocalFileSystem):
        storage.makedirs(root, exist_ok=True)
        return StoredResponses(FileEntries(storage, root, limits, storage.pipe_file, CLEAN_EVERY))
    Path(root).mkdir(mode=0o700, parents=True, exist_ok=True)
    return StoredResponses(FileEntries(storage, root, limits, _write_private, clean_every=0))


def _write_private(path: str, text: bytes) -> None:
    """Write a file as a whole, that only the user may read."""
    write_atomically(Path(path), text, durable=False)


class MemoryEntries:
    """Texts in memory."""

    def __init__(self, max_number: int, max_bytes: int) -> None:
        self._limits = max_number, max_bytes
        self._texts: OrderedDict[str, bytes] = OrderedDict()
        self._lock = Lock()

    def put(self, name: str, text: bytes) -> None:
        """Keep a text."""
        with self._lock:
            self._texts[name] = text
            sizes = {each: len(kept) for each, kept in reversed(self._texts.items())}
            for old in _beyond(sizes, *self._limits):
                del self._texts[old]

    def get(self, name: str) -> bytes | None:
        """Return a text, None where there is none."""
        return self._texts.get(name)

    def remove(self, name: str) -> None:
        """Forget a text."""
        with self._lock:
            self._texts.pop(name, None)


class FileEntries:
    """Texts as files of a folder, which several processes may use, or of storage that several machines may use.

    Args:
        write: writes a text to a path.
        clean_every: texts between two looks whether there are too many.
    """

    def __init__(
        self,
        storage: AbstractFileSystem,
        root: str,
        limits: tuple[int, int],
        write: Callable[[str, bytes], object],
        clean_every: int,
    ) -> None:
        self._storage, self._root, self._limits = storage, root.rstrip("/"), limits
        self._write = write
        self._clean_every = clean_every
        self._until_cleaning = 0

    def put(self, name: str, text: bytes) -> None:
        """Keep a text, if there is room: its client has the answer in any case."""
        try:
            self._write(self._path(name), text)
            self._until_cleaning -= 1
            if self._until_cleaning < 0:
                self._until_cleaning = self._clean_every
                for old in _beyond(self._sizes(), *self._limits):
                    self.remove(old)
        except OSError as error:
            log.warning("A response was not kept (%s): make room in %s.", error.strerror or error, self._root)

    def get(self, name: str) -> bytes | None:
        """Return a text, None where there is none."""
        try:
            found: bytes = self._storage.cat_file(self._path(name))
        except OSError:
            return None
        return found

    def remove(self, name: str) -> None:
        """Forget a text."""
        with suppress(FileNotFoundError):
            self._storage.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}.json"

    def _sizes(self) -> dict[str, int]:
        """Return the bytes of all texts, the newest first."""
        found = []
        for entry in self._storage.ls(self._root, detail=True):
            name = entry["name"].rpartition("/")[2].removesuffix(".json")
            if NAME.fullmatch(name):
                with suppress(FileNotFoundError):  # another process has removed it
                    modified = entry.get("mtime") or self._storage.modified(entry["name"])
                    found.append((modified, name, entry["size"]))
        return {name: size for _, name, size in sorted(found, reverse=True)}


def _beyond(sizes: dict[str, int], max_number: int, max_bytes: int) -> list[str]:
    """Return the names of what is beyond a number of entries or of bytes. sizes: by name, the newest first."""
    names, total = [], 0
    for index, (name, size) in enumerate(sizes.items()):
        total += size
        if index and (index >= max_number or total > max_bytes):  # the newest one stays in any case
            names.append(name)
    return names


def _parse(text: bytes) -> StoredResponse | None:
    """Return a response that was kept, None for a text that was damaged."""
    try:
        found = StoredResponse(**json.loads(text))
    except (ValueError, TypeError):
        return None
    return found if isinstance(found.messages, list) and isinstance(found.response, dict) else None
