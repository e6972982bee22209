"""`/v1/sessions` and `/v1/documents`: what the server keeps of a user. Nobody sees what is another's."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from zsmerge_llm.errors import SessionNotFoundError
from zsmerge_llm.inspection.html import render
from zsmerge_llm.inspection.memory_map import memory_map
from zsmerge_llm.server.errors import ErrorReply, RequestError, not_found
from zsmerge_llm.server.requests import Context, session_name

if TYPE_CHECKING:
    from zsmerge_llm.sessions.session import Session, SessionInfo


def list_sessions(context: Context, documents: bool) -> list[dict[str, Any]]:
    """Return a user's conversations or documents, the most recently used first."""
    prefix = context.qualified("")
    own = [info for info in context.llm.store if info.name.startswith(prefix)]
    return [describe(context, info) for info in own if info.is_document == documents]


def describe(context: Context, info: SessionInfo) -> dict[str, Any]:
    """Return what is listed of a session."""
    return {
        "id": info.name.removeprefix(context.qualified("")),
        "object": "document" if info.is_document else "session",
        "messages": info.messages,
        "tokens": info.tokens,
        "bytes": info.nbytes,
        "tier": info.tier,
        "used_at": int(info.used),
        "named": info.named,
        "has_document": info.has_document,
    }


def find(context: Context, name: str) -> Session:
    """Return a user's session. Raises RequestError: no name, or it is not there. SessionError: it is damaged."""
    checked = session_name(name)
    assert checked is not None
    try:
        return context.llm.session(context.qualified(checked))
    except SessionNotFoundError as error:  # its message has the user's prefix
        raise not_found(f"There is no session {checked!r}.") from error


def inspect(context: Context, name: str) -> dict[str, Any]:
    """Return what a session's cache holds."""
    session = find(context, name)
    held = memory_map(session)
    return {
        **describe(context, session.info),
        "cache": {
            "read_tokens": held.seen,
            "verbatim_tokens": round(held.verbatim_tokens, 1),
            "merged_tokens": round(held.merged_tokens, 1),
            "dropped_tokens": round(held.dropped_tokens, 1),
            "bytes": held.nbytes,
            "full_cache_bytes": held.full_nbytes,
        },
    }


def draw(context: Context, name: str) -> str:
    """Return a page that shows which tokens a session's cache holds."""
    session = find(context, name)
    return render(memory_map(session), context.llm.tokenizer, name)


def fork(context: Context, name: str, new_name: str) -> dict[str, Any]:
    """Copy a session under another name."""
    session = find(context, name)
    return describe(context, _add(context, session, new_name).info)


def save(context: Context, name: str) -> bytes:
    """Return a session as a file."""
    session = find(context, name)
    with tempfile.TemporaryDirectory() as folder:
        return session.save(Path(folder) / "session.zsmerge", durable=False).read_bytes()


def load(context: Context, data: bytes, name: str) -> dict[str, Any]:
    """Keep a session that was saved as a file. Raises SessionError: it is none of this model's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "session.zsmerge"
        path.write_bytes(data)
        session = context.llm.store.read(path)
    return describe(context, _add(context, session, name).info)


def delete(context: Context, name: str) -> None:
    """Delete a session."""
    context.llm.store.remove(find(context, name).name)


def _add(context: Context, session: Session, name: str) -> Session:
    """Add a copy of a session under a name that is free. Raises RequestError: it is taken, or no name."""
    checked = session_name(name)
    assert checked is not None
    context.llm.store.refresh(context.qualified(checked))  # another process may have it
    if context.qualified(checked) in context.llm.store:
        message = f"There is a session {checked!r} already: delete it first, or give another id."
        raise RequestError(ErrorReply(409, "invalid_request_error", message, "exists"))
    return context.llm.add_session(session.fork(context.qualified(checked)))


def read_document(context: Context, text: str, name: str | None, cancel: Event) -> dict[str, Any]:
    """Read a document, unless it has been read. The same text has the same id where none is given."""
    name = session_name(name) or f"doc-{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:16]}"
    session = context.llm.read_document(text=text, name=context.qualified(name), cancel=cancel)
    return describe(context, session.info)
