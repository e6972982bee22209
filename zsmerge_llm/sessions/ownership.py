"""Which session a turn belongs to: the one that it continues, or a new one."""

from __future__ import annotations

from datetime import date

from zsmerge_llm.errors import SessionError
from zsmerge_llm.sessions.folder import generate_name
from zsmerge_llm.sessions.session import Session, Snapshot
from zsmerge_llm.sessions.store import ResumePoint, Store
from zsmerge_llm.sessions.transcript import DocumentText


def new_session(
    store: Store,
    name: str | None,
    namespace: str | None,
    today: date,
    document: DocumentText | None,
    snapshots: dict[str, Snapshot],
) -> tuple[Session, int | None]:
    """Return a new session, and the version of the session that has its name until now."""
    version = store.version(name) if name else None
    own = name or generate_name(f"{namespace}/" if namespace else "")
    text, notes = (None, None) if document is None else (document.text, document.notes)
    session = Session(own, store.fingerprint, today, snapshots, document=text, notes=notes, named=bool(name))
    return session, version


def find_owner(
    store: Store, found: ResumePoint, name: str | None, is_named_so: bool
) -> tuple[Session, int | None] | None:
    """Return the session that goes on from a snapshot, and its version; None: a new one does."""
    if name == found.session.name or (name is None and found.snapshot.kind in ("branch", "prompt", "answer")):
        return found.session, found.version
    if name is None or not is_named_so:
        return None
    version = store.version(name)
    try:
        return store.get(name), version
    except SessionError:
        return None
