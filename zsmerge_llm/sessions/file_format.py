"""Files of tensors and JSON: safetensors, written atomically and sealed by a checksum. Knows nothing of sessions.

The JSON is in the header. The seal is the SHA-256 of the whole file with zeros in the seal's place, so that no byte can
change unnoticed; the JSON has a digest of its own, so that listing a folder needs the headers only.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from zsmerge_llm.errors import SessionCorruptError, SessionMismatchError, SessionNotFoundError

FORMAT = 5
TEMPORARY = (".saving-", ".tmp")
"""How the name of an unfinished file begins and ends."""
MAX_HEADER = 100_000_000
SEAL = b'"sha256":"'  # in the header's own JSON: inside a JSON string the quotes would be escaped
UNSEALED = b"0" * 64


def write(path: Path, about: dict[str, Any], tensors: dict[str, Tensor], durable: bool = True) -> None:
    """Write a file, atomically: what is at `path` is the old file or the new one, never a part.

    Args:
        about: JSON values. tensors: without elements they are left out.
        durable: whether the file must outlast a power failure too, and not only the end of the process.

    Raises:
        OSError: no room or no permission. What was there stays.
    """
    replace(path, _content(about, tensors), durable)


def replace(path: Path, content: bytes | bytearray, durable: bool = True) -> None:
    """Write bytes to `path`, as `write` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY[0], suffix=TEMPORARY[1])
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if durable:
        _sync_folder(path.parent)


def read_about(path: Path) -> dict[str, Any]:
    """The JSON of a file, from its header alone: fast, but the tensors may still be damaged.

    Raises:
        SessionNotFoundError: no such file. SessionCorruptError: truncated, altered, or no such file as `write` makes.
        SessionMismatchError: a format that this version does not read.
    """
    if not path.is_file():
        raise SessionNotFoundError(f"There is no saved session at {path}.")
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            metadata = json.loads(file.read(size))["__metadata__"] if size <= MAX_HEADER else {}
        text = metadata["about"]
        genuine = metadata["check"] == _sha256(text.encode())
        about: dict[str, Any] = json.loads(text)
        version = about["format"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(path, "is no saved session or cannot be read") from error
    if not genuine:
        raise damaged(path, "does not match its checksum")
    if version != FORMAT:
        raise SessionMismatchError(
            f"{path} has format {version} and this version of zsmerge-llm reads format {FORMAT}: "
            "use the version it was saved with, or read the conversation anew."
        )
    return about


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, after its seal was checked. Raises SessionCorruptError."""
    try:
        content = bytearray(path.read_bytes())
    except OSError as error:
        raise damaged(path, "cannot be read") from error
    start = content.find(SEAL) + len(SEAL)
    seal = bytes(content[start : start + 64])
    content[start : start + 64] = UNSEALED
    if _sha256(content).encode() != seal:
        raise damaged(path, "does not match its checksum")
    try:
        return load(bytes(content))
    except SafetensorError as error:
        raise damaged(path, "cannot be read") from error


def damaged(path: Path, what: str) -> SessionCorruptError:
    """The error for a file that cannot be trusted."""
    return SessionCorruptError(
        f"{path} {what}: it is truncated or was altered. Delete it and read the conversation anew."
    )


def _content(about: dict[str, Any], tensors: dict[str, Tensor]) -> bytearray:
    text = json.dumps({"format": FORMAT, **about}, sort_keys=True)
    metadata = {"about": text, "check": _sha256(text.encode()), "sha256": UNSEALED.decode()}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor.numel()}
    content = bytearray(save(plain, metadata))
    start = content.index(SEAL) + len(SEAL)
    content[start : start + 64] = _sha256(content).encode()
    return content


def _sha256(content: bytes | bytearray) -> str:
    return hashlib.sha256(content).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power failure, where the system allows it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
