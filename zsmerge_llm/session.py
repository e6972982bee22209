"""A conversation that lives on: exact token ids, the compressed cache, and snapshots to go back to.

A `Snapshot` is never changed: whoever reads on works on a copy of its cache. So branches, forks and concurrent requests
share snapshots freely and cannot corrupt each other. A `Session` is a named line of snapshots with a newest one, its
head; only that one is saved.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from zsmerge_llm.cache import Cache
from zsmerge_llm.errors import SessionCorruptError, SessionMismatchError, SessionNotFoundError

FORMAT = 1
KEPT_SNAPSHOTS = 4

Kind = Literal["prefix", "prompt", "answer", "document"]


@dataclass(frozen=True)
class Fingerprint:
    """What a saved cache belongs to. Digests, but for `cache`, the cache configuration."""

    weights: str
    tokenizer: str
    template: str
    cache: str


@dataclass(frozen=True)
class Snapshot:
    """A point of a conversation, never mutated.

    digest: of the messages it stands for. messages: how many they are. tokens: the exact ids; the last ones may not be
    in the cache yet (`unread`). kind: ends after a common beginning (`prefix`), before an answer (`prompt`), after one
    (`answer`), or after a document's text (`document`).
    """

    digest: str
    messages: int
    tokens: tuple[int, ...]
    cache: Cache
    kind: Kind

    @property
    def unread(self) -> list[int]:
        """Tokens that belong to the conversation and are not in the cache yet."""
        return list(self.tokens[self.cache.seen :])

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes + 8 * len(self.tokens)


@dataclass
class Session:
    """A named conversation. Made and kept by the store; `fork` and `save` are for everyone."""

    name: str
    fingerprint: Fingerprint
    today: date = field(default_factory=date.today)
    snapshots: dict[str, Snapshot] = field(default_factory=dict)
    used: float = field(default_factory=time.time)
    document: str | None = None
    """The text of a document session, which its questions are asked about."""

    @property
    def head(self) -> Snapshot:
        """The newest point."""
        return next(reversed(self.snapshots.values()))

    @property
    def cache(self) -> Cache:
        """The cache at the newest point. Do not read into it: clone it first."""
        return self.head.cache

    @property
    def tokens(self) -> list[int]:
        """Every id read and generated up to the newest point."""
        return list(self.head.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of all snapshots in memory."""
        return sum(snapshot.nbytes for snapshot in self.snapshots.values())

    def fork(self, name: str) -> Session:
        """A session of its own that goes on from here. Snapshots are shared, so this costs nothing."""
        return Session(name, self.fingerprint, self.today, dict(self.snapshots), document=self.document)

    def add(self, snapshots: Iterable[Snapshot]) -> None:
        """Move on to the last of `snapshots`; the oldest go, but never a document's or a common beginning's."""
        for snapshot in snapshots:
            self.snapshots.pop(snapshot.digest, None)
            self.snapshots[snapshot.digest] = snapshot
        passing = [s.digest for s in self.snapshots.values() if s.kind in ("prompt", "answer")]
        for digest in passing[:-KEPT_SNAPSHOTS]:
            del self.snapshots[digest]
        self.used = time.time()

    def save(self, path: str | Path) -> Path:
        """Write the newest point to `path`, atomically: the file there is the old or the new one, never a part.

        One safetensors file of the cache's size; its header carries everything else as JSON, with a checksum.
        """
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        content = self._content()
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        _sync_folder(target.parent)
        return target

    def _content(self) -> bytes:
        head = self.head
        tensors, facts = head.cache.state()
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor.numel()}
        tensors["tokens"] = torch.tensor(head.tokens, dtype=torch.int32)
        about = {
            "format": FORMAT,
            "name": self.name,
            "fingerprint": asdict(self.fingerprint),
            "today": self.today.isoformat(),
            "digest": head.digest,
            "messages": head.messages,
            "kind": head.kind,
            "tokens": len(head.tokens),
            "document": self.document,
            "cache": facts,
        }
        text = json.dumps(about, sort_keys=True)
        return save_tensors(tensors, {"zsmerge": text, "sha256": _checksum(text, tensors)})


def load_session(path: str | Path, fingerprint: Fingerprint | None = None) -> Session:
    """Read a session back, bit for bit.

    Args:
        fingerprint: what the session must belong to; None accepts any (listing).

    Raises:
        SessionNotFoundError: no such file.
        SessionCorruptError: truncated, altered, or no session at all.
        SessionMismatchError: saved with another model, tokenizer, template or cache configuration.
    """
    source = Path(path)
    about, tensors = _read(source)
    saved = Fingerprint(**about["fingerprint"])
    if fingerprint is not None and saved != fingerprint:
        parts = [name for name, value in asdict(saved).items() if value != getattr(fingerprint, name)]
        raise SessionMismatchError(
            f"{source} was saved with another {' and '.join(parts)}: load it with the settings it was saved with, "
            "or read the conversation anew."
        )
    tokens = tuple(tensors.pop("tokens").tolist())
    try:
        cache = Cache.from_state(tensors, about["cache"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _corrupt(source, "does not hold a whole cache") from error
    session = Session(
        about["name"],
        saved,
        date.fromisoformat(about["today"]),
        used=source.stat().st_mtime,
        document=about["document"],
    )
    session.add([Snapshot(about["digest"], about["messages"], tokens, cache, about["kind"])])
    return session


def read_about(path: Path) -> dict[str, Any]:
    """The JSON part of a saved session, from its header alone, its checksum unverified. Raises as load_session."""
    from safetensors import safe_open

    if not path.is_file():
        raise SessionNotFoundError(f"There is no saved session at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})["zsmerge"])
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise _corrupt(path, "cannot be read") from error
    return about


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    about = read_about(path)
    content = path.read_bytes()
    try:
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size])["__metadata__"]
        tensors = load_tensors(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise _corrupt(path, "cannot be read") from error
    if metadata.get("sha256") != _checksum(metadata["zsmerge"], tensors):
        raise _corrupt(path, "does not match its checksum")
    if about["format"] != FORMAT:
        raise SessionMismatchError(f"{path} has format {about['format']}; this version reads format {FORMAT}.")
    return about, tensors


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.view(torch.uint8).numpy().data if tensor.numel() else b"")
    return sha.hexdigest()


def _corrupt(path: Path, what: str) -> SessionCorruptError:
    return SessionCorruptError(
        f"{path} {what}: it is truncated or was altered. Delete it and read the conversation anew."
    )


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power failure, where the system allows it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
