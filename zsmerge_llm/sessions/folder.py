"""A folder of saved sessions: one file each, named by the session and by what it belongs to."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from zsmerge_llm.errors import ConfigError, SessionCorruptError, SessionError
from zsmerge_llm.models.atomic_write import TEMPORARY_PREFIX, TEMPORARY_SUFFIX
from zsmerge_llm.sessions import file_format
from zsmerge_llm.sessions.seal import session_key
from zsmerge_llm.sessions.session import Fingerprint, Session, SessionInfo, load_session
from zsmerge_llm.sessions.validation import ExpectedCache, check_facts

SUFFIX = ".zsmerge"
SAFE_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")
MAX_STEM = 120
GENERATED_NAME = re.compile(r"chat-[0-9a-f]{8}")
OTHERS_WRITE = 0o022
ABANDONED_SECONDS = 3600
"""Age after which an unfinished file is taken to belong to a killed process."""


class Folder:
    """Saved sessions of one model, tokenizer, template and cache configuration; other files are left alone.

    Args:
        path: made where it is missing.
        durable: whether what is saved must outlast a power failure.
        expected: as for `load_session`.

    Raises:
        ConfigError: `path` cannot be a folder, or others may write to it; the session key cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        fingerprint: Fingerprint,
        durable: bool,
        expected: ExpectedCache | None = None,
    ) -> None:
        self.path = Path(path)
        self.fingerprint = fingerprint
        self.durable = durable
        self.expected = expected
        self._suffix = _suffix(asdict(fingerprint))
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = self.path.stat().st_mode
        except OSError as error:
            raise ConfigError(f"Sessions cannot be kept in {path}: {error}. Give another folder.") from error
        if hasattr(os, "getuid") and mode & OTHERS_WRITE:
            raise ConfigError(f"Others may write to {path}, so no sessions are kept there. Run: chmod go-w {path}")
        session_key()  # one that cannot be read is an error now, not at the first save

    def file(self, name: str) -> Path:
        """Return the path of the session of that name."""
        return self.path / f"{_stem(name)}{self._suffix}"

    def save(self, session: Session) -> SessionInfo:
        """Write a session's head. Raises OSError."""
        path = session.save(self.file(session.name), self.durable)
        return replace(session.info, path=path, nbytes=path.stat().st_size, tier="disk")

    def load(self, info: SessionInfo) -> Session:
        """Read a session back. Raises as `load_session`, also where the file no longer holds the session of `info`."""
        path = info.path
        if path is None or not path.is_file():
            raise SessionCorruptError(f"{path}, where session {info.name!r} was kept, is gone: read it anew.")
        session = load_session(path, self.fingerprint, self.expected)
        if session.head.digest != info.digest:
            raise SessionCorruptError(f"{path} was replaced by another conversation: it is read anew.")
        session.name, session.named = info.name, info.named
        return session

    def rename(self, info: SessionInfo, name: str) -> SessionInfo:
        """Move a file to a generated name. Raises OSError."""
        assert info.path is not None
        path = self.file(name)
        os.replace(info.path, path)
        return replace(info, path=path, name=name, named=False)

    def list_sessions(self) -> dict[str, SessionInfo]:
        """Return what an earlier process left here, by name, the oldest first."""
        found: list[SessionInfo] = []
        for metadata, path in list_folder(self.path, self._suffix):
            if metadata["fingerprint"] == asdict(self.fingerprint):
                with suppress(OSError):
                    info = SessionInfo.from_metadata(metadata, path)
                    found.append(replace(info, named=info.named and not GENERATED_NAME.fullmatch(info.name)))
        return {info.name: info for info in sorted(found, key=lambda info: info.used)}

    def delete_abandoned_files(self) -> None:
        """Delete what killed processes left unfinished."""
        for path in self.path.glob(f"{TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink()


def generate_name() -> str:
    """Return a name for a conversation that nobody named."""
    return f"chat-{uuid.uuid4().hex[:8]}"


def list_folder(path: Path, suffix: str = SUFFIX) -> list[tuple[dict[str, Any], Path]]:
    """Return the metadata and path of each session in a folder, of any model. Corrupt files are left out."""
    found = []
    for file in path.glob(f"*{suffix}"):
        with suppress(SessionError, OSError):
            metadata = file_format.read_metadata(file, check_facts)
            found.append(({**metadata, "name": _name(metadata, file)}, file))
    return found


def _name(metadata: dict[str, Any], path: Path) -> str:
    """Return the name of a saved session: by its file where that was renamed or copied."""
    suffix = _suffix(metadata["fingerprint"])
    unchanged = path.name == f"{_stem(metadata['name'])}{suffix}"
    return metadata["name"] if unchanged else path.name.removesuffix(suffix).removesuffix(SUFFIX)


def _suffix(fingerprint: dict[str, str]) -> str:
    """Return what sets the files of one model, tokenizer, template and cache configuration apart."""
    text = json.dumps(fingerprint, sort_keys=True)
    return f".{hashlib.sha256(text.encode()).hexdigest()[:8]}{SUFFIX}"


def _stem(name: str) -> str:
    """Return a name as a file name that is safe, and as different from others, on every file system."""
    stem = "".join(letter if letter in SAFE_CHARACTERS else _escaped(letter) for letter in name)
    if len(stem) > MAX_STEM:
        stem = stem[:MAX_STEM] + "~" + hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]
    return stem


def _escaped(letter: str) -> str:
    return "".join(f"%{byte:02x}" for byte in letter.encode(errors="surrogatepass"))
