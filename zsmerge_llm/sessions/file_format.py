"""Files of tensors and JSON: safetensors, written atomically and protected by a checksum. Knows nothing of sessions.

The JSON is in the header. The checksum is the digest (`seal.digest`) of the whole file with zeros in the checksum's
place, so that no byte can change unnoticed. The JSON has a digest of its own, so that listing a folder reads only the
headers.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from zsmerge_llm.errors import ConfigError, SessionCorruptError, SessionMismatchError, SessionNotFoundError
from zsmerge_llm.models.atomic_write import write_atomically
from zsmerge_llm.sessions.seal import KEY_VARIABLE, digest, session_key

FORMAT = 10
READABLE = (7, 8, 9, FORMAT)
"""Formats that are read. In 7, caches have their free slots; 7 and 8 have no index of passages; up to 9, documents
record as many queries as chats."""
MAX_HEADER = 100_000_000
METADATA, METADATA_DIGEST, CHECKSUM = "about", "check", "sha256"
"""Keys of the header, the same in all formats, so that an older file is refused by its number."""
SEALED = "sealed"
"""A key of the header of files whose digests were made with a key."""
CHECKSUM_START = f'"{CHECKSUM}":"'.encode()  # found in the header only: inside a JSON string the quotes are escaped
NO_CHECKSUM = b"0" * 64


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header describes it. dtype: in the words of safetensors, such as "BF16"."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, described: Any) -> TensorInfo:
        """Return what a header says. Raises ValueError, TypeError or KeyError where it is nothing of the kind."""
        dtype, shape = described["dtype"], described["shape"]
        if type(dtype) is not str or type(shape) is not list or any(type(size) is not int for size in shape):
            raise TypeError("no tensor")
        return cls(dtype, tuple(shape))


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, Tensor], durable: bool = True) -> None:
    """Write a file, atomically.

    Args:
        metadata: JSON values.
        tensors: those without elements are left out.
        durable: as for `write_atomically`.

    Raises:
        OSError: no room, no permission, or no `session_key`. The file that was there stays.
    """
    try:
        key = session_key()
    except ConfigError as error:
        raise OSError(str(error)) from error
    write_atomically(path, _serialize(metadata, tensors, key), durable)


def read_metadata(path: Path, check: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Return the JSON of a file, from its header alone: fast, but the tensors may still be corrupt.

    check: raises ValueError where the JSON is not what it must be.

    Raises:
        SessionNotFoundError: no such file.
        SessionCorruptError: truncated, altered, or not written by `write`.
        SessionMismatchError: a format that this version does not read.
        ConfigError: there is no `session_key` though there should be one.
    """
    key = session_key()
    with _open(path) as file, refusing(path):
        metadata = _read_header(path, file, key)[0]
        check(metadata)
    return metadata


def read(
    path: Path, check: Callable[[dict[str, Any], dict[str, TensorInfo]], None]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON and the tensors of a file.

    check: called with the JSON and the shapes of all tensors, before any is read; raises ValueError where they are not
        what they must be.

    Raises:
        As `read_metadata`.
    """
    key = session_key()
    with _open(path) as file:
        with refusing(path):
            metadata, tensors, start = _read_header(path, file, key)
            check(metadata, tensors)
        file.seek(0)
        content = file.read()
    if not content.startswith(start):
        raise corrupt_error(path, "was changed while it was read")
    place = content.find(CHECKSUM_START) + len(CHECKSUM_START)
    checksum = digest((content[:place], NO_CHECKSUM, memoryview(content)[place + 64 :]), key)
    if not hmac.compare_digest(checksum.encode(), content[place : place + 64]):
        raise corrupt_error(path, _mismatch(key))
    try:
        return metadata, load(content)
    except SafetensorError as error:
        raise corrupt_error(path, "cannot be read") from error


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn what a check raises about the content of a file into SessionCorruptError."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        problem = str(error) if type(error) is ValueError else "is no saved session or cannot be read"
        raise corrupt_error(path, problem) from error


@contextmanager
def _open(path: Path) -> Iterator[FileIO]:
    if not _is_file(path):
        raise SessionNotFoundError(f"There is no saved session at {path}: check the path.")
    try:
        with path.open("rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise corrupt_error(path, "cannot be read") from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _read_header(path: Path, file: FileIO, key: bytes | None) -> tuple[dict[str, Any], dict[str, TensorInfo], bytes]:
    """Return the JSON, the shapes of all tensors, and the bytes read. Raises what `refusing` turns into an error."""
    prefix = file.read(8)
    size = int.from_bytes(prefix, "little")
    if size > min(MAX_HEADER, os.fstat(file.fileno()).st_size - 8):
        raise _foreign_error(path)
    content = file.read(size)
    header, own = _own_header(path, content)
    text = own[METADATA]
    metadata = _parse(text)
    version = metadata["format"]
    _check_seal(path, SEALED in own, key)
    if not hmac.compare_digest(own[METADATA_DIGEST], digest((text.encode(),), key)):
        raise ValueError(_mismatch(key))
    if version not in READABLE:
        raise SessionMismatchError(
            f"{path} has format {version} and this version of zsmerge-llm reads formats "
            f"{READABLE[0]} to {FORMAT}: "
            "use the version it was saved with, or read the conversation anew."
        )
    return metadata, {name: TensorInfo.parse(each) for name, each in header.items()}, prefix + content


def _own_header(path: Path, content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a header, and what `write` has put into it. Raises SessionCorruptError: it was not written by that."""
    try:
        header = _parse(content)
        own = header.pop("__metadata__")
        if not {METADATA, METADATA_DIGEST, CHECKSUM} <= own.keys():
            raise TypeError("another file of tensors")
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
        raise _foreign_error(path) from error
    return header, own


def _parse(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object in which no name occurs twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        parsed = dict(pairs)
        if len(parsed) < len(pairs):
            raise ValueError("says two things under one name")
        return parsed

    parsed = json.loads(text, object_pairs_hook=unique)
    if not isinstance(parsed, dict):
        raise TypeError("no JSON object")
    return parsed


def corrupt_error(path: Path, problem: str) -> SessionCorruptError:
    """Return the error for a file that cannot be trusted."""
    return SessionCorruptError(
        f"{path} {problem}: it is truncated or was altered. Delete it and read the conversation anew."
    )


def _foreign_error(path: Path) -> SessionCorruptError:
    """Return the error for a file that may be anything, and somebody's only copy: it is not to be deleted."""
    return SessionCorruptError(
        f"{path} is no saved session, or its beginning is damaged: give a file that Session.save has written."
    )


def _check_seal(path: Path, is_sealed: bool, key: bytes | None) -> None:
    """Raise SessionCorruptError where a file is sealed and there is no key, or the other way round."""
    if is_sealed and key is None:
        raise SessionCorruptError(f"{path} is sealed: set {KEY_VARIABLE} to the file of the key it was sealed with.")
    if not is_sealed and key is not None:
        raise SessionCorruptError(
            f"{path} is not sealed, so anybody may have made it. If you trust it, load it without {KEY_VARIABLE}; "
            "else delete it and read the conversation anew."
        )


def _mismatch(key: bytes | None) -> str:
    return "does not match its checksum" if key is None else "was not sealed with this session key"


def _serialize(metadata: dict[str, Any], tensors: dict[str, Tensor], key: bytes | None) -> bytearray:
    text = json.dumps({"format": FORMAT, **metadata}, sort_keys=True)
    header = {METADATA: text, METADATA_DIGEST: digest((text.encode(),), key), CHECKSUM: NO_CHECKSUM.decode()}
    if key is not None:
        header[SEALED] = "HMAC-SHA256"
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor.numel()}
    content = bytearray(save(plain, header))
    start = content.index(CHECKSUM_START) + len(CHECKSUM_START)
    content[start : start + 64] = digest((content,), key).encode()
    return content
