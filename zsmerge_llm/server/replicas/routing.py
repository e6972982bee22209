"""Which replica answers a request: always the one that holds its conversation, as long as that one answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

NAMED = re.compile(r"/v1/(?:sessions|documents)/([^/]+)")


def conversation_key(path: str, query: Mapping[str, str], headers: Mapping[str, str], body: Any) -> str:
    """Return a key that all requests of one conversation share.

    The id in the path, the query, the body or the header names it. Without one it is known by its beginning, which
    clients send with each turn: the system message and the first message of the user. Keys of two users differ.

    Args:
        headers: names in lower case. body: the parsed JSON, or None.
    """
    fields: Mapping[str, Any] = body if isinstance(body, dict) else {}
    named = NAMED.match(path)
    candidates = (
        named and named[1],
        query.get("id"),
        fields.get("session_id"),
        headers.get("x-session-id"),
        fields.get("prompt_cache_key"),
        fields.get("previous_response_id"),
    )
    name = next((each for each in candidates if isinstance(each, str) and each), None)
    what = name or [fields.get("document_id"), _beginning(fields)]
    user = headers.get("authorization") or headers.get("x-api-key")
    return _digest(json.dumps([user, what], sort_keys=True))


def replica_order(key: str, number: int) -> list[int]:
    """Return all replicas, the one that a conversation belongs to first, then those that stand in for it.

    Rendezvous hashing (Thaler and Ravishankar 1998): if one is missing, only its own conversations move, and they are
    spread over all others.
    """
    return sorted(range(number), key=lambda replica: _digest(f"{replica}/{key}"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _beginning(body: Mapping[str, Any]) -> list[Any]:
    """Return what a conversation begins with, as text: clients may add marks to blocks from turn to turn."""
    found: list[Any] = [_text(body.get("system") or body.get("instructions"))]
    messages = next((body[name] for name in ("messages", "input", "prompt") if name in body), None)
    for message in messages if isinstance(messages, list) else [messages]:
        role = message.get("role") if isinstance(message, dict) else "user"
        found.append([role, _text(message.get("content") if isinstance(message, dict) else message)])
        if role == "user":
            break
    return found


def _text(content: Any) -> Any:
    """Return the text of some content; whatever is no text as it is."""
    if not isinstance(content, list):
        return content
    texts = [block.get("text") if isinstance(block, dict) else block for block in content]
    return "\n".join(text for text in texts if isinstance(text, str))
