"""From a message list to what is still to be read: finds the session it continues, and commits what came of it.

Identity is verified content. A request carries the whole conversation; the longest beginning that some session holds is
taken up, and only what follows is read. Generated tokens stay as they were generated: the next turn's text is what the
template writes after them (`ChatTemplate.delta`), whatever it makes of the history before.

A document is the beginning of a user's message: every template takes that, and none writes it again in later turns (as
some do with the system's).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, NamedTuple, cast

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.errors import InputError, SessionError, SessionNotFoundError
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.retrieval.attention_search import AttentionSearch
from zsmerge_llm.retrieval.passage_search import PassageSearch, Search
from zsmerge_llm.sessions.folder import new_name
from zsmerge_llm.sessions.session import Kind, Session, Snapshot
from zsmerge_llm.sessions.store import ResumePoint, Store
from zsmerge_llm.types import Message

Tools = Sequence[dict[str, Any]] | None

MIN_PREFIX = 64
"""A shorter common beginning costs less to read than to keep."""
DOCUMENT_GUIDE = "Answer from this document.\n\n"


@dataclass
class Turn:
    """One request on a conversation. `cache` is its own copy; nothing is shared until `Conversations.commit`.

    digests: one for each beginning of `messages`. session: whose turn it is; a new one (`new`) if no session goes on
    under its own name. expected: what was under that name when the turn began. tokens: the conversation's ids, this
    prompt included; those from `start` on are still to be read. prefix: how many of these form a beginning that other
    conversations may share; 0 if none is worth keeping. alone: whether this turn's question alone decides what is kept.
    recalled: how many of the tokens are passages that are read once more (`recall`). origin: the point of its own
    session that it goes on from.
    """

    messages: list[Message]
    tools: Tools
    digests: list[str]
    template: ChatTemplate
    session: Session
    new: bool
    expected: str | None
    cache: Cache
    tokens: list[int]
    start: int
    reuse: str
    prefix: int = 0
    alone: bool = False
    recalled: int = 0
    origin: Snapshot | None = None
    points: list[Snapshot] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        """What is still to be read."""
        return self.tokens[self.start :]

    def mark(self, kind: Kind, messages: int, tokens: Sequence[int]) -> None:
        """Remember this point of the conversation: the cache as it is now."""
        self.points.append(Snapshot(self.digests[messages], messages, tokens, self.cache.clone(), kind))


class Whole(NamedTuple):
    """A conversation from its beginning: its ids, the budget for them, and how many of the ids stem from the system
    message and the tools (`guide`) or are passages that are read once more (`recalled`)."""

    ids: list[int]
    guide: int
    config: CacheConfig
    recalled: int = 0


@dataclass(frozen=True)
class Conversations:
    """The sessions of one model, as conversations of messages.

    config, document_config: the budget for a first prompt, or a document, of so many tokens; for the former also of how
    many of these, its first, stem from the system message and the tools, and stay. today: the date on which a new one
    begins.
    """

    store: Store
    template: ChatTemplate
    new_cache: Callable[[CacheConfig], Cache]
    config: Callable[[int, int], CacheConfig]
    document_config: Callable[[int], CacheConfig]
    recall: PassageSearch
    glance: AttentionSearch
    today: Callable[[], date] = date.today

    def begin(
        self,
        messages: list[Message],
        tools: Tools = None,
        session: str | Session | None = None,
        *,
        reread: bool = False,
    ) -> Turn:
        """What to read for `messages` (from `chat.normalize_messages`), and on which cache.

        Args:
            session: a session or its name. A hint: it is taken up only if its content is a beginning of `messages`; if
                not, the conversation takes over the name. A document's session stays as it is: `messages` are asked
                about it, in a conversation of their own.
            reread: read everything again, for this question alone.

        Raises:
            InputError, MissingTemplateError: as `ChatTemplate.render`. SessionCorruptError: a document that was damaged.
        """
        name, text = self._hint(session)
        document = None
        if text is not None:
            messages, document = about_document(text, messages), self._document_digest(text)
            name = None if self._fixed(name) else name
        digests = self.template.digests(messages, tools)
        if reread:
            turn = self._afresh(messages, tools, digests, name, text, "asked for")
            turn.alone = True
            return turn
        known = digests if document is None else [document, *digests]
        why = ""
        for origin, digest in self.store.matches(known, name):
            try:
                found = self.store.open(origin, digest)
            except SessionNotFoundError:
                continue  # another request took it away meanwhile
            except SessionError:
                self.store.forget(origin)
                why = "the saved session is damaged or gone"
                continue
            template = self._template(found)
            following = self._following(template, found, messages, tools)
            if following is not None and self._suits(found.snapshot, following):
                turn = self._resumed(found, following, messages, tools, digests, name, template)
                self._look_up(turn, found)
                return turn
            if found.snapshot.kind in ("prompt", "answer"):
                why = why or "the chat template writes it differently from what was read"
        return self._afresh(messages, tools, digests, name, text, why)

    def commit(self, turn: Turn, answer: Message | None, generated: Sequence[int]) -> Session:
        """Keep what came of a turn: its points and, unless `answer` is None (cancelled), the answer's end.

        A turn that was cancelled before its prompt was read changes nothing. If the session has moved on meanwhile,
        the turn becomes a session of its own.
        """
        points, chain = turn.points, turn.digests
        if answer is not None:
            conversation = [*turn.messages, answer]
            chain = turn.template.digests(conversation, turn.tools)
            tokens = [*turn.tokens, *generated]
            points = [*points, Snapshot(chain[-1], len(conversation), tokens, turn.cache, "answer")]
        if all(point.kind == "prefix" for point in points):
            return turn.session
        if turn.origin is not None:  # whoever goes back to it does so again, and it must not have gone meanwhile
            points = [turn.origin, *points]
        return self.store.advance(turn.session, points, chain, turn.expected, turn.new)

    # -- documents ---------------------------------------------------------------------------------------------------

    def open_document(self, text: str, name: str | None, title: str, known: bool = False) -> Turn:
        """A document as the beginning of conversations: what is to be read of it, nothing where it is known already.

        Args:
            name: the session's name. None: `title`, or something like it where that is another session's.
            known: whether what will be asked is known, so that the rule for documents read ahead is out of place.
        """
        digest, template = self._document_digest(text), self._dated(self.today())
        for origin, _ in self.store.matches([digest], name):
            if self._fixed(origin) and name in (None, origin):
                try:
                    found = self.store.open(origin, digest)
                except SessionError:
                    self.store.forget(origin)
                    continue
                tokens = list(found.snapshot.tokens)
                cache = found.snapshot.cache
                return Turn([], None, [digest], template, found.session, False, None, cache, tokens, len(tokens), "")
        tokens = template.encode(_document_head(template, text))
        if name is None:
            name = title if title not in self.store else f"{title}-{digest[:8]}"
        session = Session(name, self.store.fingerprint, template.today, document=text)
        cache = self.new_cache(self.config(len(tokens), 0) if known else self.document_config(len(tokens)))
        return Turn([], None, [digest], template, session, True, None, cache, tokens, 0, "new")

    def keep_document(self, turn: Turn) -> None:
        """Keep a document that has been read, under its session's name."""
        point = Snapshot(turn.digests[0], 0, turn.tokens, turn.cache, "document")
        self.store.commit(turn.session, [point], turn.digests)

    def _document_digest(self, text: str) -> str:
        return self.template.digests([], None, {"document": text})[0]

    def _fixed(self, name: str | None) -> bool:
        info = self.store.info(name) if name is not None else None
        return info is not None and info.fixed

    def _hint(self, session: str | Session | None) -> tuple[str | None, str | None]:
        """A session's name and its document's text. A fork that is not in the store yet goes there."""
        if isinstance(session, Session) and session.name not in self.store:
            self.store.commit(session)
        name = session.name if isinstance(session, Session) else session
        info = self.store.info(name) if name is not None else None
        text = self.store.get(info.name).document if info is not None and info.document else None
        return name, text

    # -- how a turn begins -------------------------------------------------------------------------------------------

    def _resumed(
        self,
        found: ResumePoint,
        following: list[int],
        messages: list[Message],
        tools: Tools,
        digests: list[str],
        name: str | None,
        template: ChatTemplate,
    ) -> Turn:
        """A turn from a known point: of the session itself or, under another name, of a new one."""
        origin, point = found.session, found.snapshot
        own = name == origin.name or (name is None and point.kind in ("prompt", "answer"))
        session, expected = origin, cast("str | None", found.head)
        if not own:
            shared = [each for each in (*origin.snapshots.values(), point) if each.kind == "prefix" or each is point]
            snapshots = {each.digest: each for each in shared if each.kind != "document"}
            session, expected = self._session(name, template.today, origin.document, snapshots)
        reuse = "continued" if point.digest == found.head and point.kind == "answer" else "restored"
        tokens = [*point.tokens, *following]
        cache = point.cache.clone()
        start, kept = cache.seen, point if own else None
        return Turn(
            messages, tools, digests, template, session, not own, expected, cache, tokens, start, reuse, origin=kept
        )

    def _look_up(self, turn: Turn, found: ResumePoint) -> None:
        """Let a resumed turn read again what its cache has lost, or is about to lose, of what it asks for."""
        cache, plain = turn.cache, len(turn.tokens)
        if cache.exact_capacity is None or cache.config.slots is None or plain <= cache.exact_capacity or not turn.ids:
            return
        asking = self.recall.into(turn.messages, cache.config.slots, turn.tokens, self._by_looks(turn))
        following = self._following(turn.template, found, asking, turn.tools)
        if following is not None:
            turn.tokens = [*found.snapshot.tokens, *following]
            turn.recalled = len(turn.tokens) - plain

    def _by_looks(self, turn: Turn) -> Search | None:
        """How to find places of the document that a turn is about by what its cache still holds of it."""
        document = turn.session.document

        def search(asked: str, most: int) -> list[str]:
            read = len(turn.template.encode(_document_head(turn.template, document or "")))
            return self.glance.passages(turn.cache, turn.tokens[:read], asked, most)

        return search if document is not None else None

    def whole(self, template: ChatTemplate, messages: list[Message], tools: Tools) -> Whole:
        """A whole conversation as it is read from its beginning."""
        tokens = template.encode(template.render(messages, tools))
        guide = _common_beginning(template, messages, tools, tokens)
        config = self.config(len(tokens), guide)
        if config.slots is None or len(tokens) <= config.slots:
            return Whole(tokens, guide, config)
        both = template.encode(template.render(self.recall.into(messages, config.slots, tokens), tools))
        return Whole(both, guide, config, len(both) - len(tokens))

    def _afresh(
        self, messages: list[Message], tools: Tools, digests: list[str], name: str | None, text: str | None, why: str
    ) -> Turn:
        """A turn that has to read everything, and why."""
        template = self._dated(self.today())
        whole = self.whole(template, messages, tools)
        first = 2 + (messages[0]["role"] == "system")  # a greeting alone makes no conversation that is known
        similar = self.store.resembling(digests[first:])
        if text is not None:
            why = why or "the document was read without these tools"
        elif similar is not None:
            why = why or f"no point of session {similar[0]!r} before message {similar[1] + first + 1} is left"
        elif name is not None and name in self.store:
            why = why or f"the messages and tools are not those of session {name!r}"
        session, expected = self._session(name, template.today, text, {})
        reuse = f"reread: {why}" if why else "new"
        cache = self.new_cache(whole.config)
        turn = Turn(messages, tools, digests, template, session, True, expected, cache, whole.ids, 0, reuse)
        turn.prefix, turn.recalled = whole.guide if whole.guide >= MIN_PREFIX else 0, whole.recalled
        return turn

    def _session(
        self, name: str | None, today: date, document: str | None, snapshots: dict[str, Snapshot]
    ) -> tuple[Session, str | None]:
        """A new session under a name, and what is there until now."""
        expected = self.store.head(name) if name else None
        fingerprint, named = self.store.fingerprint, bool(name)
        return Session(name or new_name(), fingerprint, today, snapshots, document=document, named=named), expected

    def _suits(self, point: Snapshot, following: list[int]) -> bool:
        """Whether the point's cache has the budget that a conversation which begins so would get."""
        if point.kind != "prefix":
            return True
        guide = len(point.tokens)
        return point.cache.config == self.config(guide + len(following), guide)

    def _template(self, found: ResumePoint) -> ChatTemplate:
        """The template as it was when the point was read; a beginning is only shared while its date is right."""
        return self._dated(self.today() if found.snapshot.kind == "prefix" else found.session.today)

    def _dated(self, today: date) -> ChatTemplate:
        own = self.template
        return ChatTemplate(own.tokenizer, own.chat_template, today=today, args=own.args)

    def _following(
        self, template: ChatTemplate, found: ResumePoint, messages: list[Message], tools: Tools
    ) -> list[int] | None:
        """The ids that come after a point of the conversation; None where they cannot be known from here."""
        try:
            return self._after(template, found, messages, tools)
        except InputError:  # the whole conversation may still be one that the template takes
            return None

    def _after(
        self, template: ChatTemplate, found: ResumePoint, messages: list[Message], tools: Tools
    ) -> list[int] | None:
        point, n = found.snapshot, found.snapshot.messages
        if point.kind == "answer":
            return template.encode(template.delta(messages, n, tools))
        if point.kind == "prefix":
            ids, known = template.encode(template.render(messages, tools)), list(point.tokens)
            return ids[len(known) :] if ids[: len(known)] == known else None
        if point.kind == "prompt" and n == len(messages):
            return []
        if point.kind == "prompt" and messages[n]["role"] != "assistant":
            return None  # the answer's header has been read already
        whole = template.render(messages, tools)
        if point.kind == "document":
            before = _document_head(template, found.session.document or "")
        else:
            before = template.render(messages[:n], tools)
        if whole.startswith(before):
            return template.encode(whole[len(before) :])
        if point.kind == "prompt" and not messages[n].get("tool_calls"):
            return template.encode(messages[n]["content"] + template.delta(messages, n + 1, tools))
        return None


def about_document(text: str, messages: list[Message]) -> list[Message]:
    """`messages` with a document at the beginning; what the system says comes behind it."""
    count = int(messages[0]["role"] == "system")
    first = [message["content"] for message in messages[count : count + 1] if message["role"] == "user"]
    content = "\n\n".join([DOCUMENT_GUIDE + text, *(each["content"] for each in messages[:count]), *first])
    return [{"role": "user", "content": content}, *messages[count + len(first) :]]


def _document_head(template: ChatTemplate, text: str) -> str:
    """What the template writes up to the end of a document."""
    mark = uuid.uuid4().hex
    head, found, _ = template.render([{"role": "user", "content": DOCUMENT_GUIDE + text + mark}]).partition(mark)
    if not found:
        raise InputError("The chat template does not show the user's message: pass another as chat_template=.")
    return head


def _common_beginning(template: ChatTemplate, messages: list[Message], tools: Tools, tokens: list[int]) -> int:
    """How many tokens stem from the system message and the tools alone, up to a special token."""
    system = messages[:1] if messages[0]["role"] == "system" else []
    if len(messages) == len(system) or not (system or tools):
        return 0
    other = template.encode(template.render([*system, {"role": "user", "content": "\x1f"}], tools))
    special = set(template.tokenizer.all_special_ids)
    same = next((at for at, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b), len(other))
    return max((at for at in range(same) if tokens[at] in special), default=0)
