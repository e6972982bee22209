"""Files of tensors and JSON: safetensors, written atomically and protected by a checksum. Knows nothing of sessions.

The JSON is in the header. The checksum is the SHA-256 of the whole file with zeros in the checksum's place, so that no
byte can change unnoticed. The JSON has a digest of its own, so that listing a folder reads only the headers.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from zsmerge_llm.errors import SessionCorruptError, SessionMismatchError, SessionNotFoundError
from zsmerge_llm.models.atomic_write import write_atomically

FORMAT = 6
MAX_HEADER = 100_000_000
METADATA, METADATA_DIGEST, CHECKSUM = "about", "check", "sha256"
"""Keys of the header, the same in all formats, so that an older file is refused by its number."""
CHECKSUM_START = f'"{CHECKSUM}":"'.encode()  # found in the header only: inside a JSON string the quotes are escaped
NO_CHECKSUM = b"0" * 64


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, Tensor], durable: bool = True) -> None:
    """Write a file, atomically.

    Args:
        metadata: JSON values.
        tensors: those without elements are left out.
        durable: as for `write_atomically`.

    Raises:
        OSError: no room or no permission. The file that was there stays.
    """
    write_atomically(path, _serialize(metadata, tensors), durable)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the JSON of a file, from its header alone: fast, but the tensors may still be corrupt.

    Raises:
        SessionNotFoundError: no such file.
        SessionCorruptError: truncated, altered, or not written by `write`.
        SessionMismatchError: a format that this version does not read.
    """
    if not path.is_file():
        raise SessionNotFoundError(f"There is no saved session at {path}.")
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))["__metadata__"] if size <= MAX_HEADER else {}
        text = header[METADATA]
        intact = header[METADATA_DIGEST] == _sha256(text.encode())
        metadata: dict[str, Any] = json.loads(text)
        version = metadata["format"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise corrupt_error(path, "is no saved session or cannot be read") from error
    if not intact:
        raise corrupt_error(path, "does not match its checksum")
    if version != FORMAT:
        raise SessionMismatchError(
            f"{path} has format {version} and this version of zsmerge-llm reads format {FORMAT}: "
            "use the version it was saved with, or read the conversation anew."
        )
    return metadata


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, after checking its checksum. Raises SessionCorruptError."""
    try:
        content = bytearray(path.read_bytes())
    except OSError as error:
        raise corrupt_error(path, "cannot be read") from error
    start = content.find(CHECKSUM_START) + len(CHECKSUM_START)
    checksum = bytes(content[start : start + 64])
    content[start : start + 64] = NO_CHECKSUM
    if _sha256(content).encode() != checksum:
        raise corrupt_error(path, "does not match its checksum")
    try:
        return load(bytes(content))
    except SafetensorError as error:
        raise corrupt_error(path, "cannot be read") from error


def corrupt_error(path: Path, problem: str) -> SessionCorruptError:
    """Return the error for a file that cannot be trusted."""
    return SessionCorruptError(
        f"{path} {problem}: it is truncated or was altered. Delete it and read the conversation anew."
    )


def _serialize(metadata: dict[str, Any], tensors: dict[str, Tensor]) -> bytearray:
    text = json.dumps({"format": FORMAT, **metadata}, sort_keys=True)
    header = {METADATA: text, METADATA_DIGEST: _sha256(text.encode()), CHECKSUM: NO_CHECKSUM.decode()}
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor.numel()}
    content = bytearray(save(plain, header))
    start = content.index(CHECKSUM_START) + len(CHECKSUM_START)
    content[start : start + 64] = _sha256(content).encode()
    return content


def _sha256(content: bytes | bytearray) -> str:
    return hashlib.sha256(content).hexdigest()
