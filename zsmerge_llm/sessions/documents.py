"""Documents that are read once, as the beginning of any number of conversations.

A document is the beginning of a user's message: every template takes that, and none renders it differently in later
turns, as some do with the system message.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import takewhile

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.errors import InputError, SessionError
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.language.request_args import without_request_args
from zsmerge_llm.sessions.session import Session, Snapshot
from zsmerge_llm.sessions.store import Store
from zsmerge_llm.sessions.token_ids import TokenIds
from zsmerge_llm.types import Message

INSTRUCTION = "Answer from this document.\n\n"
MIN_OVERFLOW = 3.5
"""How many times its slots a document is long whose cache is worse than none beside passages that have the answer."""


@dataclass(frozen=True)
class DocumentReading:
    """A document's session and what is to be read of it: `new_ids` into `cache`. Nothing where it is known already."""

    session: Session
    digest: str
    cache: Cache
    tokens: TokenIds
    new_ids: Sequence[int]


@dataclass(frozen=True)
class Documents:
    """The documents of one model.

    Attributes:
        prompt_config: the cache's configuration for a prompt of so many tokens, so many of them a system prefix.
        document_config: the same for a document of so many tokens whose questions are not known yet.
        read: reads ids into a cache.
        today: the date on which a new session begins.
    """

    store: Store
    template: ChatTemplate
    new_cache: Callable[[CacheConfig], Cache]
    prompt_config: Callable[[int, int], CacheConfig]
    document_config: Callable[[int], CacheConfig]
    read: Callable[[Cache, Sequence[int]], object]
    today: Callable[[], date] = date.today

    def open(
        self,
        text: str,
        name: str | None,
        title: str,
        question_known: bool = False,
        check: Callable[[], None] = lambda: None,
        notes: str | None = None,
    ) -> DocumentReading:
        """Return the session of a document, and what is to be read of it.

        Args:
            name: the session's name. None: `title`, or something like it where that is another session's.
            question_known: whether the probe is what will be asked, so that the cache need not suit any question.
            check: as for `ChatTemplate.with_check`.
            notes: what its notes are to be about. A document that has others, or none, is read again. None: any.
        """
        digest, template = self.digest(text), self.template.with_date(self.today()).with_check(check)
        if name is not None:
            self.store.refresh(name)
        for candidate, _ in self.store.find_resume_points({digest: 0}, name):
            if self.is_document(candidate) and name in (None, candidate):
                try:
                    found = self.store.open(candidate, digest)
                except SessionError:
                    self.store.forget(candidate)
                    continue
                if notes is not None and (found.session.notes is None or found.session.notes.instruction != notes):
                    continue
                snapshot = found.snapshot
                return DocumentReading(found.session, digest, snapshot.cache, TokenIds.of(snapshot.tokens), [])
        ids = template.encode(document_head(template, text))
        if name is None:
            name = title if title not in self.store else f"{title}-{digest[:8]}"
        session = Session(name, self.store.fingerprint, template.today, document=text)
        config = self.prompt_config(len(ids), 0) if question_known else self.document_config(len(ids))
        return DocumentReading(session, digest, self.new_cache(config), TokenIds(ids), ids)

    def keep(self, reading: DocumentReading) -> None:
        """Keep a document that has been read, under its session's name."""
        snapshot = Snapshot(reading.digest, 0, reading.tokens, reading.cache.trimmed(), "document")
        self.store.commit(reading.session, [snapshot], [reading.digest])

    def beginning(self, document: Snapshot, template: ChatTemplate) -> Cache:
        """Return a cache that holds what stands before a document's text, and goes on behind the document."""
        before = template.encode(document_head(without_request_args(template), ""))
        known = zip(before, document.tokens[: len(before)], strict=False)
        # The last of them may have become one token with the text.
        shared = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], known)]
        cache = self.new_cache(document.cache.config)
        self.read(cache, shared or document.tokens[:1])
        cache.skip_to(document.cache.seen)
        return cache

    def digest(self, text: str) -> str:
        return self.template.digests([], None, {"document": text})[0]

    def is_document(self, name: str | None) -> bool:
        """Return whether a session is a document before any question."""
        info = self.store.info(name) if name is not None else None
        return info is not None and info.is_document


def put_before(text: str, messages: list[Message]) -> list[Message]:
    """Return `messages` with a document at the beginning; the system message follows it."""
    used = num_merged(messages)
    content = "\n\n".join([INSTRUCTION + text, *(message["content"] for message in messages[:used])])
    return [{"role": "user", "content": content}, *messages[used:]]


def num_merged(messages: list[Message]) -> int:
    """Return how many messages become a part of the document's: the system message and the first question."""
    system = int(messages[0]["role"] == "system")
    return system + sum(message["role"] == "user" for message in messages[system : system + 1])


def loses_most(cache: Cache) -> bool:
    """Return whether a document's cache keeps so little of it that passages found by words are better alone.

    Not one that was read for a question: it keeps what that asks for (docs/research/retrieval).
    """
    slots, read_ahead = cache.config.slots, cache.config == cache.config.query_agnostic()
    return slots is not None and read_ahead and cache.seen >= MIN_OVERFLOW * slots


def document_head(template: ChatTemplate, text: str) -> str:
    """Return what the template writes up to the end of a document. Raises InputError: it does not show it."""
    marker = uuid.uuid4().hex
    head, found, _ = template.render([{"role": "user", "content": INSTRUCTION + text + marker}]).partition(marker)
    if not found:
        raise InputError("The chat template does not show the user's message: pass another as chat_template=.")
    return head
