"""From a message list to what is still to be read: finds the session it continues, and commits what came of it.

Identity is verified content. A request carries the whole conversation; the longest beginning that some session holds is
taken up, and only what follows is read. Generated tokens stay as they were generated: the next turn's text is what the
template writes after them (`Template.delta`), whatever it makes of the history before.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from zsmerge_llm.cache import Cache
from zsmerge_llm.chat import Template
from zsmerge_llm.session import Session, Snapshot
from zsmerge_llm.store import Found, Store
from zsmerge_llm.types import Message

MIN_PREFIX = 64
"""A shorter common beginning costs less to read than to keep."""
DOCUMENT_GUIDE = "Answer from this document.\n\n"


@dataclass
class Turn:
    """One request on a conversation. `cache` is its own copy; nothing is shared until `Conversations.commit`.

    tokens: the conversation's ids, this prompt included. ids: those of them still to be read, after the first `start`.
    prefix: how many of `ids` form a beginning that other conversations may share; 0 if none is worth keeping.
    """

    messages: list[Message]
    tools: Sequence[dict[str, Any]] | None
    digests: list[str]
    template: Template
    session: Session
    expected_head: str | None
    cache: Cache
    tokens: list[int]
    start: int
    reuse: str
    prefix: int = 0
    points: list[Snapshot] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return self.tokens[self.start :]

    def mark(self, kind: str, messages: int, tokens: Sequence[int]) -> None:
        """Remember this point of the conversation: the cache as it is now."""
        digest = self.digests[messages]
        self.points.append(Snapshot(digest, messages, tuple(tokens), self.cache.clone(), kind))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Conversations:
    """The sessions of one model, as conversations of messages."""

    store: Store
    template: Template
    new_cache: Callable[[], Cache]

    def begin(
        self, messages: list[Message], tools: Sequence[dict[str, Any]] | None = None, name: str | None = None
    ) -> Turn:
        """What to read for `messages` (from `chat.normalise`), and on which cache.

        Args:
            name: a session's name. A hint: it is taken up only if its content is a beginning of `messages`; if it is
                not, the conversation takes over the name.

        Raises:
            InputError, MissingTemplateError: as `Template.render`.
        """
        document = self.store.get(name).document if name is not None and name in self.store else None
        if document is not None and messages[0]["role"] != "system":
            messages = [_document_message(document), *messages]
        digests = self.template.digests(messages, tools)
        found = self.store.find(digests, name)
        name = None if document is not None else name  # questions about a document leave it as it is
        while found is not None:
            template = self._dated(found.session)
            following = _following(template, found.snapshot, messages, tools)
            if following is not None:
                return self._resumed(found, following, messages, tools, digests, name, template)
            earlier = found.snapshot.messages
            found = self.store.find(digests[:earlier], name)
        tokens = self.template.encode(self.template.render(messages, tools))
        known = name is not None and name in self.store
        reuse = f"reread: the messages do not continue session {name!r}" if known else "new"
        session = self._session(name)
        turn = Turn(messages, tools, digests, self.template, session, None, self.new_cache(), tokens, 0, reuse)
        turn.prefix = self._common_beginning(messages, tools, tokens)
        return turn

    def commit(self, turn: Turn, answer: Message | None, generated: Sequence[int]) -> Session:
        """Keep what came of a turn: its points and, unless `answer` is None (cancelled), the answer's end.

        If the session has moved on meanwhile, the turn becomes a session of its own.
        """
        points = turn.points
        if answer is not None:
            conversation = [*turn.messages, answer]
            digest = turn.template.digests(conversation, turn.tools)[-1]
            tokens = (*turn.tokens, *generated)
            points = [*points, Snapshot(digest, len(conversation), tokens, turn.cache, "answer")]
        session = turn.session
        if points:
            moved = bool(session.snapshots) and turn.expected_head not in (None, session.head.digest)
            if moved:
                session = Session(_new_name(), session.fingerprint, session.today)
            self.store.commit(session, points)
        return session

    def open_document(self, text: str, name: str | None, title: str) -> Turn:
        """A document as the beginning of conversations: what is to be read of it, nothing where it is known already."""
        messages = [_document_message(text), {"role": "user", "content": "?"}]
        digests = self.template.digests(messages[:1])
        found = self.store.find(digests[1:], name)
        if found is not None and found.session.document is not None and name in (None, found.session.name):
            cache, tokens = found.snapshot.cache, list(found.snapshot.tokens)
            return Turn(messages[:1], None, digests, self.template, found.session, None, cache, tokens, len(tokens), "")
        whole = self.template.render(messages)
        tokens = self.template.encode(whole.removesuffix(self.template.delta(messages, 1)))
        session = Session(name or title, self.store.fingerprint, self.template.today, document=text)
        return Turn(messages[:1], None, digests, self.template, session, None, self.new_cache(), tokens, 0, "new")

    def keep_document(self, turn: Turn) -> None:
        """Keep a document that has been read, under its session's name."""
        point = Snapshot(turn.digests[1], 1, tuple(turn.tokens), turn.cache, "document")
        self.store.commit(turn.session, [point])

    def _resumed(
        self,
        found: Found,
        following: list[int],
        messages: list[Message],
        tools: Sequence[dict[str, Any]] | None,
        digests: list[str],
        name: str | None,
        template: Template,
    ) -> Turn:
        session, snapshot = found.session, found.snapshot
        own = name in (None, session.name) and snapshot.kind not in ("document", "prefix")
        reuse = "continued" if snapshot.digest == found.head and snapshot.kind == "answer" else "restored"
        if not own:
            takeover = name if name is not None and session.name != name else None
            session = Session(takeover or _new_name(), session.fingerprint, session.today)
        return Turn(
            messages,
            tools,
            digests,
            template,
            session,
            found.head if own else None,
            snapshot.cache.clone(),
            [*snapshot.tokens, *following],
            snapshot.cache.seen,
            reuse,
        )

    def _session(self, name: str | None) -> Session:
        return Session(name or _new_name(), self.store.fingerprint, self.template.today)

    def _dated(self, session: Session) -> Template:
        """The template with the date the session began on."""
        own = self.template
        return Template(own.tokenizer, own.chat_template, today=session.today, args=own.args)

    def _common_beginning(
        self, messages: list[Message], tools: Sequence[dict[str, Any]] | None, tokens: list[int]
    ) -> int:
        """How many tokens stem from the system message and the tools alone, up to a special token."""
        system = messages[:1] if messages[0]["role"] == "system" else []
        if len(messages) == len(system) or not (system or tools):
            return 0
        other = self.template.encode(self.template.render([*system, {"role": "user", "content": "\x1f"}], tools))
        special = set(self.template.tokenizer.all_special_ids)
        same = next((at for at, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b), len(other))
        cut = max((at for at in range(same) if tokens[at] in special), default=0)
        return cut if cut >= MIN_PREFIX else 0


def _following(
    template: Template, point: Snapshot, messages: list[Message], tools: Sequence[dict[str, Any]] | None
) -> list[int] | None:
    """The ids that come after `point` in the conversation; None where they cannot be known from here."""
    n = point.messages
    if point.kind in ("answer", "document"):
        return template.encode(template.delta(messages, n, tools))
    if point.kind == "prompt" and n == len(messages):
        return []
    if point.kind == "prompt" and messages[n]["role"] == "assistant" and not messages[n].get("tool_calls"):
        # Another answer than was generated (edited, or cut off by the caller): read it as the caller gives it.
        return template.encode(messages[n]["content"] + template.delta(messages, n + 1, tools))
    whole = template.encode(template.render(messages, tools))
    known = len(point.tokens)
    return whole[known:] if tuple(whole[:known]) == point.tokens and len(whole) > known else None


def _document_message(text: str) -> Message:
    return {"role": "system", "content": DOCUMENT_GUIDE + text}


def _new_name() -> str:
    return f"chat-{uuid.uuid4().hex[:8]}"
