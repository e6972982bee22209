"""The ids that a turn reads: of a whole conversation or behind a snapshot, with passages that are read again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from zsmerge_llm.config import CacheConfig
from zsmerge_llm.errors import InputError
from zsmerge_llm.language.chat_template import ChatTemplate, Tools
from zsmerge_llm.language.reasoning_history import answer_head, answer_header
from zsmerge_llm.language.request_args import without_request_args
from zsmerge_llm.retrieval.attention_search import AttentionSearch
from zsmerge_llm.retrieval.named_passages import lists_by_identifier
from zsmerge_llm.retrieval.passage_search import PassageIndexes, PassageSearch
from zsmerge_llm.retrieval.query_probe import PLACEHOLDER, conversation_probe, is_multi_turn
from zsmerge_llm.retrieval.questions import asked_at, question_parts, search_text
from zsmerge_llm.retrieval.section_notes import SectionNotes, asks_about_whole
from zsmerge_llm.sessions.documents import INSTRUCTION, document_head
from zsmerge_llm.sessions.prompt import Prompt
from zsmerge_llm.sessions.session import Snapshot
from zsmerge_llm.sessions.transcript import DocumentText, Transcript
from zsmerge_llm.types import Message


@dataclass(frozen=True)
class Continuation:
    """A conversation that continues a snapshot. template: as it was when the snapshot was read."""

    template: ChatTemplate
    snapshot: Snapshot
    transcript: Transcript
    tools: Tools
    document: DocumentText | None


@dataclass(frozen=True)
class FollowingIds:
    """What a turn reads behind a snapshot.

    has_evidence: whether a question about one thing of a document comes with passages that share its words.
    needs_document: whether it does not, and the snapshot's cache holds nothing of the document.
    """

    ids: list[int]
    has_evidence: bool = False
    needs_document: bool = False


@dataclass(frozen=True)
class PromptBuilder:
    """Builds the prompts of one model.

    Attributes:
        config: the cache's configuration for a first prompt of so many tokens, of which so many, its first, are the
            system message and the tools, and pinned.
    """

    template: ChatTemplate
    config: Callable[[int, int], CacheConfig]
    passage_search: PassageSearch
    attention_search: AttentionSearch

    def using(self, template: ChatTemplate) -> PromptBuilder:
        """Return the same with another template: one request's variables, or its check."""
        passages = replace(self.passage_search, template=template)
        return PromptBuilder(template, self.config, passages, replace(self.attention_search, template=template))

    def build(
        self,
        messages: list[Message],
        tools: Tools = None,
        template: ChatTemplate | None = None,
        indexes: PassageIndexes | None = None,
        document: DocumentText | None = None,
    ) -> Prompt:
        """Return a whole conversation as a prompt that is read from its beginning, about a document or none."""
        template = template or self.template
        ids = template.encode(template.render(messages, tools))
        system_tokens = _num_system_tokens(template, messages, tools, ids)
        config, plain = self.config(len(ids), system_tokens), len(ids)
        if config.slots is not None and plain > config.slots:
            how = (ids, None, indexes, *_about(document))
            augmented = self.passage_search.augment(messages, config.slots, plain, *how)
            ids = template.encode(template.render(augmented, tools))
        probe = conversation_probe(template, messages)
        return Prompt(ids, config, probe, is_multi_turn(messages), system_tokens, len(ids) - plain)

    def following_ids(self, continuation: Continuation, messages: list[Message]) -> list[int] | None:
        """Return the ids that follow a snapshot of a conversation; None where they cannot be known from it."""
        template, snapshot, tools = continuation.template, continuation.snapshot, continuation.tools
        deltas, document, n = continuation.transcript.deltas, continuation.document, continuation.snapshot.messages
        try:
            if snapshot.kind == "answer":
                return template.encode(deltas.delta(template, messages, n, tools))
            if snapshot.kind == "prompt" and n == len(messages):
                return []
            if snapshot.kind == "prompt" and messages[n]["role"] != "assistant":
                return None  # the answer's header has been read already
            if snapshot.kind == "branch" and n == len(messages) and (header := answer_header(template, messages)):
                return template.encode(header)
            if snapshot.kind == "branch" and (head := answer_head(template, messages, n, tools)) is not None:
                delta = deltas.delta(template, messages, n + 1, tools)
                return template.encode(head + template.guard(messages[n]["content"]) + delta)
            whole = template.render(messages, tools)
            if snapshot.kind == "branch":
                before = template.render(messages[:n], tools, add_generation_prompt=False)
                return template.encode(whole[len(before) :]) if whole.startswith(before) else None
            if snapshot.kind == "prefix":
                ids, known = template.encode(whole), list(snapshot.tokens)
                return ids[len(known) :] if ids[: len(known)] == known else None
            if snapshot.kind == "document":
                text = document.text if document is not None else ""
                before = document_head(without_request_args(template), text)
            else:
                before = template.render(messages[:n], tools)
            if whole.startswith(before):
                return template.encode(whole[len(before) :])
            if snapshot.kind == "prompt" and not messages[n].get("tool_calls"):
                delta = deltas.delta(template, messages, n + 1, tools)
                return template.encode(template.guard(messages[n]["content"]) + delta)
        except InputError:  # the template may still accept the whole conversation
            pass
        return None

    def with_retrieved(self, continuation: Continuation, following: list[int]) -> FollowingIds:
        """Return the ids that follow a snapshot, with those that are read again.

        These are what its cache has lost, or is about to lose, of what the turn asks for. Nothing is read again in a
        turn that was read already.
        """
        snapshot, transcript = continuation.snapshot, continuation.transcript
        cache = snapshot.cache
        capacity, slots, length = cache.exact_capacity, cache.config.slots, len(snapshot.tokens) + len(following)
        if capacity is None or slots is None or length <= capacity or cache.seen == length:
            return FollowingIds(following)
        messages, recent_ids = transcript.messages, [*snapshot.tokens[-slots:], *following][-slots:]
        search = DocumentSearch(self.attention_search, continuation) if continuation.document else None
        how = (recent_ids, search, transcript.indexes, *_about(continuation.document))
        augmented = self.passage_search.augment(messages, slots, length, *how)
        longer = following if augmented is messages else self.following_ids(continuation, augmented) or following
        if search is None:
            return FollowingIds(longer)
        # Not the message that is rendered, which may begin with the document.
        asked = transcript.history.messages
        question = search_text(asked[asked_at(asked)]["content"])
        evidence = len(longer) > len(following) and not search.was_asked and asks_one_thing(question)
        return FollowingIds(longer, evidence, needs_document=not evidence and not search.holds_document)

    def keeps_config(self, snapshot: Snapshot, num_following: int) -> bool:
        """Return whether a prefix's cache has the configuration that a conversation which begins so would get."""
        if snapshot.kind != "prefix":
            return True
        system_tokens = len(snapshot.tokens)
        return snapshot.cache.config == self.config(system_tokens + num_following, system_tokens)


class DocumentSearch:
    """Searches what a snapshot's cache holds of a document by the attention of a question.

    Attributes:
        was_asked: whether it was used: words found nothing.
    """

    def __init__(self, search: AttentionSearch, continuation: Continuation) -> None:
        self._search, self._continuation, self._cache = search, continuation, continuation.snapshot.cache
        self.was_asked = False

    def __call__(self, question: str, max_tokens: int) -> list[str]:
        """Return passages, as `Search`."""
        self.was_asked = True
        if not self.holds_document:
            return []
        read = self._continuation.snapshot.tokens[: self._num_tokens]
        return self._search.search(self._cache.clone(), read, question, max_tokens)  # the snapshot's has other readers

    @cached_property
    def holds_document(self) -> bool:
        """Whether the cache holds anything of the document's second half: one that began anew does not."""
        return self._cache.holds_any(self._num_tokens // 2, self._num_tokens)

    @cached_property
    def _num_tokens(self) -> int:
        document, template = self._continuation.document, self._continuation.template
        assert document is not None
        if document.num_tokens is None:
            head = document_head(without_request_args(template), document.text)
            document.num_tokens = len(template.encode(head))
        return document.num_tokens


def asks_one_thing(question: str) -> bool:
    """Return whether a question asks for one thing, or for all about an identifier, not for several or for a whole."""
    return lists_by_identifier(question) or (not asks_about_whole(question) and not question_parts(question))


def _about(document: DocumentText | None) -> tuple[SectionNotes | None, int]:
    """Return the notes about a document, and the characters that it is in the first message."""
    return (None, 0) if document is None else (document.notes, len(INSTRUCTION + document.text))


def _num_system_tokens(template: ChatTemplate, messages: list[Message], tools: Tools, ids: list[int]) -> int:
    """Return how many of the ids are the system message and the tools alone.

    That is up to a special token or, where a template puts them into the user's message, up to its text.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    if len(messages) == len(system) or not (system or tools):
        return 0
    before, text = _before_question(template, system, tools)
    other = template.encode(text)
    same = next((at for at, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), len(other))
    if before != _before_question(template, [], None)[0]:
        return same
    special = set(template.tokenizer.all_special_ids)
    return max((at for at in range(same) if ids[at] in special), default=0)


def _before_question(template: ChatTemplate, system: list[Message], tools: Tools) -> tuple[str, str]:
    """Return what stands between the last special token and the text of a first question, and the whole prompt."""
    prompt = template.render([*system, {"role": "user", "content": PLACEHOLDER}], tools)
    before = prompt.rpartition(PLACEHOLDER)[0]
    special = (token for token in template.tokenizer.all_special_tokens if token in before)
    return before[max((before.rindex(token) + len(token) for token in special), default=0) :], prompt
