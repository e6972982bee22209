"""Passage retrieval: what a compressed cache no longer holds is looked up in the text and read again.

Text is cheap to keep, keys and values are not: a token takes some 4 bytes as text and 10,000 and more in a cache. So a
turn whose cache loses tokens searches what was said before for passages that share the question's rarest words (BM25)
and say like things (`similarity_index`), and reads them again, as a part of the question's message: more of them where
more was lost, and never more than the cache has room for (`selection`). The question need not be known in advance.

Where no passage shares enough words with the question, nothing is found: small models answer from whatever stands
before a question, and a search by meaning always finds something (docs/research/retrieval). About a document, the
model's attention is searched then (`attention_search`). The system message is held for ever, but models follow it less
the further behind it is, so it is repeated, and so is what the user said about every answer (`standing_instructions`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import TYPE_CHECKING

from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.retrieval.conversation_start import start_block
from zsmerge_llm.retrieval.excerpts import MAX_ALIKE, Excerpts, alike, first_passages, sought_terms
from zsmerge_llm.retrieval.named_passages import by_identifier, named_passages, numbers
from zsmerge_llm.retrieval.passages import Passage
from zsmerge_llm.retrieval.personal_facts import asked_about, asks_about_self, find_facts
from zsmerge_llm.retrieval.query_probe import MAX_QUESTION_TOKENS
from zsmerge_llm.retrieval.questions import (
    Query,
    asked_at,
    find_question,
    queries,
    question_parts,
    question_start,
    search_text,
)
from zsmerge_llm.retrieval.section_notes import SectionNotes, notes_for
from zsmerge_llm.retrieval.selection import (
    QUESTION_TOKENS,
    RetrievalTokens,
    merge,
    passage_words,
    pinned_tokens,
    token_limit,
    with_context,
    with_replies,
)
from zsmerge_llm.retrieval.standing_instructions import find_statements
from zsmerge_llm.retrieval.terms import count_words, query_terms, terms
from zsmerge_llm.retrieval.user_statements import UserStatements, relevance
from zsmerge_llm.retrieval.whole_text import asks_for_frequent_words, whole_text_block
from zsmerge_llm.types import Message

if TYPE_CHECKING:
    from torch import Tensor

    from zsmerge_llm.retrieval.passage_index import PassageIndex
    from zsmerge_llm.retrieval.token_vectors import TokenVectors

Search = Callable[[str, int], list[str]]
"""A question, and how many tokens of passages at most → the passages."""
DEFAULT_TOKENS: RetrievalTokens = "auto"
"""How many tokens are read again at most, unless a user sets a number (docs/research/retrieval)."""
STANDING_SHARE = 4
"""The standing instructions take one in so many of the tokens at most, and so do facts about the user."""
FACT_SHARE = 0.5
"""Relevance of a fact about the user, as a share of the most relevant one's, from which on it is repeated."""
NEAR_TOKENS = 128
"""Tokens behind which a request, and what it asked for, is sent once more: an agent's results may be short."""
MAX_LETTERS = 32
"""Letters of a token at most, on average over a text."""
MAX_INDEXES = 3
"""Indexes of one conversation that are kept, those used last."""
SAMPLE_LETTERS, SAMPLE_MESSAGES = 2000, 16
"""First characters of the first messages, which tell how many tokens a word has."""
INTRODUCTION = "Remember this part of the text:"


def pinned_tail_tokens(retrieved: int) -> int:
    """Return how many tokens at a prompt's end hold its `retrieved` ones and the question behind them."""
    return retrieved + 2 * MAX_QUESTION_TOKENS if retrieved else 0


@dataclass
class PassageIndexes:
    """What one conversation is searched by. Turns differ in the size of passages where other things are repeated.

    saved: the index that the conversation was saved with; {} for none.
    """

    by_size: dict[int, PassageIndex] = field(default_factory=dict)
    standing: UserStatements = field(default_factory=partial(UserStatements, find_statements))
    facts: UserStatements = field(default_factory=partial(UserStatements, find_facts))
    saved: Mapping[str, Tensor] = field(default_factory=dict)

    def of_size(self, size: int, vectors: TokenVectors | None, messages: Sequence[Message]) -> PassageIndex:
        """Return the index with passages of so many words, of the first of some messages.

        vectors: as for `PassageSearch`.
        """
        from zsmerge_llm.retrieval.passage_index import PassageIndex  # needs NumPy
        from zsmerge_llm.retrieval.saved_index import restored_index  # needs torch

        known = {each: index for each, index in self.by_size.items() if each != size}
        index = self.by_size.get(size) or PassageIndex(size, vectors)
        saved, self.saved = self.saved, {}  # it is looked at once
        if saved and (restored := restored_index(saved, messages, size, vectors)):
            index = max(restored, index, key=lambda each: len(each.passages))
        self.by_size = dict([*known.items(), (size, index)][-MAX_INDEXES:])
        return index

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the index that was used last as it is saved; {} where there is none."""
        from zsmerge_llm.retrieval.saved_index import index_tensors  # needs torch

        return index_tensors(list(self.by_size.values())[-1]) if self.by_size else self.saved

    def copy(self) -> PassageIndexes:
        """Return the same for another conversation that begins alike: it indexes only what is its own."""
        return PassageIndexes({size: index.copy() for size, index in self.by_size.items()})


@dataclass(frozen=True)
class RecentText:
    """What the newest ids of a conversation say. Decoded only if it is asked for."""

    template: ChatTemplate
    ids: Sequence[int]

    def __contains__(self, text: str) -> bool:
        return _squeezed(text) in self._text

    @cached_property
    def _text(self) -> str:
        return _squeezed(str(self.template.tokenizer.decode(list(self.ids))))


@dataclass(frozen=True)
class AskedMessage:
    """What a user's message asks.

    before, results: the messages before it, and those since: calls of tools and their results.
    start: where its question begins; 0 where all of it is the question.
    is_short: whether it is no longer than a question.
    question: what to search for, without instructions how to answer.
    searched: the messages that are searched for it, and its own text before the question.
    queries: as for `PassageSearch.search`.
    """

    before: list[Message]
    content: str
    start: int
    is_short: bool
    question: str
    searched: list[Message]
    results: list[Message]
    queries: list[Query]

    def with_repeated(self, messages: list[Message], repeated: str, request: str) -> list[Message]:
        """Return the messages with a text before the question; behind results of tools, before `request`."""
        *before, last = messages
        if not self.results:
            text = self.content[: self.start] + repeated + self.content[self.start :]
            return [*before, {**last, "content": text}]
        if last["role"] == "tool":
            return [*messages, {"role": "user", "content": repeated + request}]
        return [*before, {**last, "content": f"{last['content']}\n\n{repeated}{request}"}]


@dataclass(frozen=True)
class PassageSearch:
    """Adds passages of what was said before, and the system message, to the message that asks for them.

    max_tokens: how many of them at most, as for `token_limit`. 0: none, ever.
    vectors: those of the model's tokens, for a search by meaning; None: by words alone.
    """

    template: ChatTemplate
    max_tokens: RetrievalTokens
    vectors: TokenVectors | None = None

    def augment(
        self,
        messages: list[Message],
        slots: int,
        length: int = 0,
        recent_ids: Sequence[int] = (),
        fallback: Search | None = None,
        indexes: PassageIndexes | None = None,
        notes: SectionNotes | None = None,
        document_length: int = 0,
    ) -> list[Message]:
        """Return the messages, the last of them with the passages it asks for; unchanged where there are none.

        Only a user's message asks. In a message that is longer than the cache, the end asks for what stands before it.
        In any other, what is repeated comes first. Behind the result of a tool, the request that it was called for is
        sent once more, with what it asks for: inside of the result, models heed it less (docs/research/retrieval).

        The system message is repeated as a whole if that takes no more than half of this, whatever is asked: models do
        not follow it from far behind, even where the cache holds all of it. But not before a message longer than a
        question: it would not stand near what is asked, and what is repeated again and again is not followed either.
        So it is with the user's standing instructions and, where he asks about himself, with what he said of himself. A
        question about the conversation's beginning comes behind its first message.

        Args:
            slots: of the cache.
            length: tokens of the conversation.
            recent_ids: ids of the conversation; what the last `slots` of them hold is not repeated whatever is asked.
            fallback: another search, for where words find nothing.
            indexes: those of the conversation, so that only new messages are split and indexed.
            notes: about its document. They come first where a question is about all of it, whatever `max_tokens` is;
                passages take what they leave of the slots for what a turn reads. What only the whole text tells
                (`whole_text`) comes last.
            document_length: characters of the first message that are the document, whatever is asked about it.
        """
        asked = self._asked(messages, slots, document_length) if self.max_tokens or notes else None
        if asked is None:
            return messages
        indexes = indexes or PassageIndexes()
        left = token_limit(self.max_tokens, length, slots)
        recent = RecentText(self.template, recent_ids[-slots:])
        request = self._request(asked, min(left // 2, QUESTION_TOKENS)) if asked.results else ""
        near = RecentText(self.template, recent_ids[-NEAR_TOKENS - self._count(request) :])
        if request and request in near:
            return messages
        system = self._system_message(asked.before, left // 2)
        repeated = ""
        if asked.is_short or asked.start > 0 or asked.results:
            statements = self._statements(asked.before, asked.question, left, recent, indexes)
            repeated = "\n\n".join([each for each in (system, statements) if each and each not in recent] + [""])
        if not document_length:
            repeated += start_block(asked.question, asked.before, self._count, left // 2)
        left -= self._count(repeated)
        if noted := notes_for(notes, asked.question):
            repeated += noted
            left = min(left, pinned_tokens(slots) - self._count(repeated))
        searched, wanted = apart(asked.searched[bool(system) :], document_length), asked.queries
        whole = whole_text_block(asked.question, [each["content"] for each in searched], self._count, left)
        left -= self._count(whole)
        if left > 0 and not (whole and asks_for_frequent_words(asked.question)):
            found = self.search(searched, wanted, left, indexes)
            repeated += as_block(found if found or whole or fallback is None else fallback(wanted[-1].text, left))
        repeated += whole
        return asked.with_repeated(messages, repeated, request) if repeated or request else messages

    def _asked(self, messages: list[Message], slots: int, document_length: int) -> AskedMessage | None:
        """Return what a cache of so many slots is asked by the messages; None if it is nothing of a user's.

        document_length: as for `augment`. The question stands behind it, whatever the document looks like.
        """
        at = asked_at(messages)
        before, message, results = messages[:at], messages[at], messages[at + 1 :]
        if message["role"] != "user":
            return None
        content, begin = message["content"], 0 if at else document_length
        start = begin + question_start(content[begin:]) if results or not self._fits(content, slots) else 0
        is_short = self._fits(content, MAX_QUESTION_TOKENS)
        question = search_text(content if is_short else find_question(content[begin:]))
        read = results[:-1] if results and self._fits(results[-1]["content"], slots) else results
        searched = [*before, *([{**message, "content": content[:start]}] if start else []), *read]
        wanted = queries([] if start else before, question)
        if results:  # the earlier question of a follow-up is not among the newest that are searched
            wanted = [Query(each.text) for each in wanted]
        return AskedMessage(before, content, start, is_short, question, searched, results, wanted)

    def _request(self, asked: AskedMessage, max_tokens: int) -> str:
        """Return a user's message or, where it is too long, its question; "" where that is too long."""
        forms = (asked.content, asked.content[asked.start :].rstrip())
        return next((form for form in forms if self._fits(form, max_tokens)), "")

    def _fits(self, text: str, max_tokens: int) -> bool:
        """Return whether a text has at most so many tokens. Those of a very long one are not counted at each turn."""
        return len(text) <= MAX_LETTERS * max_tokens and self._count(text) <= max_tokens

    def _count(self, text: str) -> int:
        """Return the tokens of a text."""
        return len(self.template.encode_text(text))

    def _statements(
        self, messages: Sequence[Message], question: str, left: int, recent: RecentText, indexes: PassageIndexes
    ) -> str:
        """Return what the user has said that a question needs and `recent` does not hold, in a share of `left` tokens.

        That are standing instructions and, where he asks about himself, facts about him.
        """

        def fits(statement: str, costs: list[int]) -> bool:
            costs.append(self._count(statement + "\n"))
            if sum(costs) <= left // STANDING_SHARE and statement not in recent:
                return True
            costs.pop()
            return False

        def relevant_to(asked: list[str], text: str) -> Callable[[Sequence[str]], list[float]]:
            return lambda statements: relevance(statements, asked, text, self.vectors)

        heeded = relevant_to(query_terms(question), question)
        found = indexes.standing.select(messages, heeded, partial(fits, costs=[]))
        if asks_about_self(question):
            about = asked_about(question)
            facts = relevant_to(terms(about), about)
            found += indexes.facts.select(messages, facts, partial(fits, costs=[]), FACT_SHARE)
        return "\n".join(dict.fromkeys(found))

    def _system_message(self, messages: Sequence[Message], max_tokens: int) -> str:
        """Return the system message, if it has at most `max_tokens`; else ""."""
        text = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
        return text if self._fits(text, max_tokens) else ""

    def search(
        self,
        messages: Sequence[Message],
        asked: Sequence[Query],
        max_tokens: int,
        indexes: PassageIndexes | None = None,
    ) -> list[str]:
        """Return the passages that fit best to a question, at most `max_tokens` together, in the text's order.

        Where not all that were found have room, the best ones are whole up to half of the tokens. Of the others stand
        the sentences that say what is asked for: so an answer that stands in many places is found in more of them
        (`excerpts`).

        asked: the question, alone and perhaps behind the one that it refers to. Passages for each take turns.
        """
        size = passage_words(max_tokens, self._tokens_per_word(messages))
        index = (indexes or PassageIndexes()).of_size(size, self.vectors, messages)
        rankings, passages = index.find(messages, [*asked, *map(Query, question_parts(asked[0].text))])
        best, cost = merge(rankings), cache(self._cost)
        named = named_passages(index, passages, asked[-1], best)
        listed = by_identifier(asked[-1].text, named)
        ranked = list(listed or dict.fromkeys([*best, *named]))
        found = first_passages(ranked, passages.__getitem__, cost, max_tokens)
        if len(found) == len(ranked):
            found = with_replies(found, passages.reply, cost, max_tokens)
        else:
            weights = index.rarities(asked[-1].text)
            sought = sought_terms(best, named, weights, numbers(asked[-1].text))
            wanted = set(list(named)[:MAX_ALIKE]) | alike(best, passages.__getitem__, weights)
            excerpts = Excerpts(passages.__getitem__, sought.__getitem__, cost)
            found = excerpts.choose(ranked, listed or best, wanted & set(ranked), max_tokens)
        return with_context(list(found.values()))

    def _tokens_per_word(self, messages: Sequence[Message]) -> float:
        """Return the tokens of a word where some messages begin: it is the same as they go on."""
        sample = "\n".join(each["content"][:SAMPLE_LETTERS] for each in messages[:SAMPLE_MESSAGES])[:SAMPLE_LETTERS]
        return self._count(sample) / max(1, count_words(sample))

    def _cost(self, passage: Passage) -> int:
        """Return the tokens that a passage takes."""
        return self._count("\n".join(with_context([passage])) + "\n\n")


def apart(messages: list[Message], document_length: int) -> list[Message]:
    """Return the messages with the document as one of its own: it is indexed once, whatever is asked about it."""
    if not document_length or not messages:
        return messages
    first, *others = messages
    content = first["content"]
    parts = (content[:document_length], content[document_length:])
    return [*({**first, "content": part} for part in parts if part), *others]


def _squeezed(text: str) -> str:
    """Return a text without its spaces, which tokenizers do not always keep."""
    return "".join(text.split())


def as_block(passages: Sequence[str]) -> str:
    """Return passages as they stand before a question; "" for none."""
    return "\n\n".join([INTRODUCTION, *passages, ""]) if passages else ""
