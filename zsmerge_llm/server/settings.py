"""Settings of the server. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path

from zsmerge_llm.config import check_integer, check_number
from zsmerge_llm.errors import ConfigError

NAME = re.compile(r"[^/\x00-\x1f\x7f]{1,200}")
"""Ids of sessions and documents that clients may choose."""
MIN_KEY = 16
KEYS = "ZSMERGE_API_KEYS"
"""The variable that holds API keys, with commas between them."""


def environment_keys() -> list[str]:
    """Return the API keys of the environment."""
    return [key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()]


def responses_folder(sessions_dir: str | None) -> str | None:
    """Return where responses are kept beside sessions: in a folder, or at a URL, within theirs."""
    return sessions_dir and f"{sessions_dir.rstrip('/')}/responses"


@dataclass(frozen=True)
class ServerSettings:
    """What the server allows.

    Args:
        api_keys: each owns the sessions and documents that it makes. None: everybody who reaches the server is one
            user.
        aliases: further names of the model, for clients that know only those of their vendor.
        max_tokens: of an answer, where the request gives no limit.
        max_body: bytes of a request. max_messages: of a conversation.
        timeout: seconds for an answer. body_timeout: seconds for a request's body to arrive.
        responses_dir: folder, or its fsspec URL, that keeps responses across restarts. `previous_response_id` names
            them. None keeps them for this process.
        max_responses: how many of them are kept, of all users together; older ones are forgotten.
        max_response_bytes: how many bytes of them.

    Raises:
        ConfigError: a setting out of its range.
    """

    api_keys: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    max_tokens: int = 4096
    max_body: int = 64 * 2**20
    max_messages: int = 10_000
    timeout: float = 600.0
    body_timeout: float = 60.0
    responses_dir: Path | str | None = None
    max_responses: int = 1_000
    max_response_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_body", "max_messages", "max_responses", "max_response_bytes"):
            check_integer(name, getattr(self, name), 1)
        for name in ("timeout", "body_timeout"):
            check_number(name, getattr(self, name), 0.001, 1e6)
        if short := [key for key in self.api_keys if len(key) < MIN_KEY or not key.isascii() or not key.isprintable()]:
            raise ConfigError(
                f"{len(short)} of the API keys are too short or not printable ASCII: use {MIN_KEY} characters or more, "
                "such as those of `openssl rand -hex 24`."
            )

    def owner(self, key: str | None) -> str | None:
        """Return the namespace of a key's user; None where there are no keys.

        All keys are compared, each in constant time.

        Raises:
            PermissionError: not one of the keys.
        """
        if not self.api_keys:
            return None
        given = hashlib.sha256((key or "").encode(errors="surrogatepass")).hexdigest()
        known = [hashlib.sha256(each.encode()).hexdigest() for each in self.api_keys]
        if not sum(hmac.compare_digest(given, each) for each in known):  # no early end, as `any` has
            raise PermissionError
        return given[:16]


def is_loopback(host: str) -> bool:
    """Return whether only programs on this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(host: str, settings: ServerSettings, insecure: bool) -> None:
    """Refuse to serve others without keys. Raises ConfigError."""
    if not (is_loopback(host) or settings.api_keys or insecure):
        raise ConfigError(
            f"{host} can be reached from other machines, so the server needs API keys: put some into the variable "
            "ZSMERGE_API_KEYS (separated by commas) or a file for --api-key-file, or serve everybody with --insecure."
        )
