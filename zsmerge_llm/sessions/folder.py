"""Where a store has its sessions: in memory or in a folder, one file each by name and by what they belong to."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

from zsmerge_llm.errors import ConfigError, SessionCorruptError, SessionError
from zsmerge_llm.sessions import file_format as saving
from zsmerge_llm.sessions.session import Fingerprint, Session, Snapshot, load_session

SUFFIX = ".zsmerge"
PLAIN = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")
LONGEST = 120
NAMELESS = re.compile(r"chat-[0-9a-f]{8}")
ABANDONED = 3600
"""Seconds after which an unfinished file is taken for the rest of a killed process."""


@dataclass(frozen=True)
class File:
    """A session on disk, as far as recognising and listing it needs. used: seconds since 1970."""

    path: Path
    digest: str
    messages: int
    tokens: int
    chain: tuple[str, ...]
    named: bool
    document: bool
    fixed: bool
    nbytes: int
    used: float


@dataclass(frozen=True)
class SessionInfo:
    """One line of a listing. nbytes: in memory, or on disk where `in_memory` is False. used: seconds since 1970.

    document: whether it is about a document; fixed: whether it is that document itself.
    """

    name: str
    tokens: int
    messages: int
    nbytes: int
    in_memory: bool
    used: float
    document: bool
    fixed: bool


@dataclass(eq=False)
class StoreEntry:
    """A session in memory (`session`), on disk (`file`, maybe of an earlier point), or both.

    written: the point in memory that the file holds. Others may have the same words.
    """

    session: Session | None
    file: File | None = None
    written: ReferenceType[Snapshot] | None = None

    @property
    def head(self) -> str:
        return self.session.head.digest if self.session is not None else self._known.digest

    @property
    def named(self) -> bool:
        return self.session.named if self.session is not None else self._known.named

    @property
    def chain(self) -> tuple[str, ...]:
        return self.session.chain if self.session is not None else self._known.chain

    @property
    def digests(self) -> list[str]:
        return list(self.session.snapshots) if self.session is not None else [self._known.digest]

    @property
    def saved(self) -> bool:
        """Whether the file holds the newest point."""
        if self.session is None or self.file is None:
            return self.file is not None
        return self.written is not None and self.written() is self.session.head

    def wrote(self, file: File, point: Snapshot) -> None:
        """Take note of what is on disk now."""
        self.file, self.written = file, ref(point)

    def info(self, name: str) -> SessionInfo:
        if self.session is None:
            file = self._known
            return SessionInfo(
                name, file.tokens, file.messages, file.nbytes, False, file.used, file.document, file.fixed
            )
        session, head = self.session, self.session.head
        tokens, document = len(head.tokens), session.document is not None
        return SessionInfo(name, tokens, head.messages, session.nbytes, True, session.used, document, session.fixed)

    @property
    def _known(self) -> File:
        assert self.file is not None
        return self.file


class Folder:
    """Saved sessions of one model, tokenizer, template and cache configuration; files of others are left alone.

    Args:
        path: made where it is missing.
        durable: whether what is saved must outlast a power failure.
        devices: where the layers of a session go when it is loaded; None is where they were.

    Raises:
        ConfigError: `path` cannot be a folder.
    """

    def __init__(
        self, path: str | Path, fingerprint: Fingerprint, durable: bool, devices: Sequence[str] | None
    ) -> None:
        self.path = Path(path)
        self.fingerprint = fingerprint
        self.durable = durable
        self.devices = devices
        self._ending = _ending(asdict(fingerprint))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"Sessions cannot be kept in {path}: {error}. Give another folder.") from error

    def file(self, name: str) -> Path:
        """Where the session of that name is saved."""
        return self.path / f"{_plain(name)}{self._ending}"

    def save(self, session: Session) -> File:
        """Write a session's newest point. Raises OSError."""
        path = session.save(self.file(session.name), self.durable)
        head = session.head
        return File(
            path,
            head.digest,
            head.messages,
            len(head.tokens),
            session.chain,
            session.named,
            session.document is not None,
            session.fixed,
            path.stat().st_size,
            session.used,
        )

    def load(self, name: str, file: File) -> Session:
        """Bring a session back. Raises as `session.load_session`, also where the file is not the one we know."""
        if not file.path.is_file():
            raise SessionCorruptError(f"{file.path}, where session {name!r} was kept, is gone: read it anew.")
        session = load_session(file.path, self.fingerprint, self.devices)
        if session.head.digest != file.digest:
            raise SessionCorruptError(f"{file.path} was replaced by another conversation: it is read anew.")
        session.name, session.named = name, file.named
        return session

    def rename(self, file: File, name: str) -> File:
        """The same session under a name that nobody chose. Raises OSError."""
        path = self.file(name)
        os.replace(file.path, path)
        facts = {key: getattr(file, key) for key in File.__dataclass_fields__}
        return File(**{**facts, "path": path, "named": False})

    def saved(self) -> dict[str, File]:
        """What an earlier run left here, the oldest first. Anything that is no session of ours stays untouched."""
        found: list[tuple[str, File]] = []
        for about, path in list_folder(self.path, self._ending):
            if about["fingerprint"] == asdict(self.fingerprint):
                with suppress(OSError):
                    found.append((about["name"], _file(about, path)))
        return dict(sorted(found, key=lambda entry: entry[1].used))

    def sweep(self) -> None:
        """Delete what killed processes left unfinished."""
        start, end = saving.TEMPORARY
        for path in self.path.glob(f"{start}*{end}"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()


def new_name() -> str:
    """A name for a conversation that nobody named."""
    return f"chat-{uuid.uuid4().hex[:8]}"


def list_folder(path: Path, ending: str = SUFFIX) -> list[tuple[dict[str, Any], Path]]:
    """What every session in a folder says of itself, whatever model it belongs to; damaged files are left out."""
    found = []
    for file in path.glob(f"*{ending}"):
        with suppress(SessionError, OSError):
            about = saving.read_about(file)
            found.append(({**about, "name": _name(about, file)}, file))
    return found


def _file(about: dict[str, Any], path: Path) -> File:
    """What is known of a session of `list_folder`. Raises OSError where the file is gone meanwhile."""
    stat = path.stat()
    return File(
        path,
        about["digest"],
        about["messages"],
        about["tokens"],
        tuple(about["chain"]),
        about["named"] and not NAMELESS.fullmatch(about["name"]),
        about["document"],
        about["fixed"],
        stat.st_size,
        stat.st_mtime,
    )


def _name(about: dict[str, Any], path: Path) -> str:
    """The name of a saved session: by its file where that was renamed or copied."""
    ending = _ending(about["fingerprint"])
    known = path.name == f"{_plain(about['name'])}{ending}"
    return about["name"] if known else path.name.removesuffix(ending).removesuffix(SUFFIX)


def _ending(fingerprint: dict[str, str]) -> str:
    """What sets the files of one model, tokenizer, template and cache configuration apart."""
    kind = json.dumps(fingerprint, sort_keys=True)
    return f".{hashlib.sha256(kind.encode()).hexdigest()[:8]}{SUFFIX}"


def _plain(name: str) -> str:
    """A name that is safe, and as different from others, on every file system."""
    plain = "".join(letter if letter in PLAIN else _escaped(letter) for letter in name)
    if len(plain) > LONGEST:
        plain = plain[:LONGEST] + "~" + hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]
    return plain


def _escaped(letter: str) -> str:
    return "".join(f"%{byte:02x}" for byte in letter.encode(errors="surrogatepass"))
