"""The key that seals session files: whoever has none can neither make nor change a file that is read.

Without a key the digest of a file is SHA-256, which finds damage only. With one it is HMAC-SHA256 (RFC 2104).
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from zsmerge_llm.errors import ConfigError

KEY_VARIABLE = "ZSMERGE_SESSION_KEY"
"""The variable that names the file of the key."""
MIN_KEY_BYTES, MAX_KEY_BYTES = 32, 4096
OTHERS = 0o077


def session_key() -> bytes | None:
    """Return the key in the file that ZSMERGE_SESSION_KEY names; None where the variable is not set.

    Raises:
        ConfigError: no such file, one that others may read, or fewer than 32 bytes, or more than 4,096.
    """
    name = os.environ.get(KEY_VARIABLE)
    if not name:
        return None
    try:
        path = Path(name).expanduser()
        if not path.is_file():  # a device may never end, and a pipe never begin
            raise FileNotFoundError(f"there is no file {path}")
        with path.open("rb") as file:
            found, key = os.fstat(file.fileno()), file.read(MAX_KEY_BYTES + 1)
    except (OSError, RuntimeError) as error:  # or no home folder
        remedy = f"(umask 077; head -c {MIN_KEY_BYTES} /dev/urandom > {name})"
        raise ConfigError(
            f"The session key that {KEY_VARIABLE} names cannot be read: {error}. Make one: {remedy}"
        ) from error
    if hasattr(os, "getuid") and (found.st_mode & OTHERS or found.st_uid not in (0, os.getuid())):
        raise ConfigError(f"Others may read the session key {path}: run chmod 600 {path}, or make a new one.")
    if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise ConfigError(f"The session key {path} must have at least {MIN_KEY_BYTES} random bytes, at most 4,096.")
    return key


def digest(parts: Iterable[bytes | bytearray | memoryview], key: bytes | None) -> str:
    """Return the digest of some bytes, in hexadecimal: HMAC-SHA256 or, without a key, SHA-256."""
    running = hashlib.sha256() if key is None else hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        running.update(part)
    return running.hexdigest()
