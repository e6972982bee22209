"""Passage retrieval: what a compressed cache no longer holds is looked up in the text and read again.

Text is cheap to keep, keys and values are not: a token takes some 4 bytes as text and 10,000 and more in a cache. So a
turn whose cache loses tokens searches what was said before for passages that share the question's rarest words (BM25),
and reads a fixed number of their tokens again, as a part of the question's message. The question need not be known in
advance, and what is read for a turn does not grow with the conversation.

The search finds words, not meanings. Where no passage shares enough with the question it finds nothing: small models
answer from whatever stands before a question (docs/research/retrieval). About a document, the model's attention is
searched then (`attention_search`). The system message is held for ever, but models follow it less the further behind it
is, so it is repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.retrieval.passages import MIN_WORDS, PASSAGE_WORDS
from zsmerge_llm.retrieval.query_probe import MAX_QUESTION_TOKENS, find_question, question_start
from zsmerge_llm.types import Message

if TYPE_CHECKING:
    from zsmerge_llm.retrieval.passage_index import PassageIndex

Search = Callable[[str, int], list[str]]
"""A question, and how many tokens of passages at most → the passages."""
DEFAULT_TOKENS = 256
"""How many tokens are read again at most, unless a user sets another number (docs/research/retrieval)."""
TOKENS_PER_WORD = 4
"""Tokens of the budget for each word of a passage, where that makes passages shorter: one has to fit in whole."""
INTRODUCTION = "Remember this part of the text:"


def pinned_tail_tokens(retrieved: int) -> int:
    """Return how many tokens at a prompt's end hold its `retrieved` ones and the question behind them."""
    return retrieved + 2 * MAX_QUESTION_TOKENS if retrieved else 0


@dataclass
class PassageIndexes:
    """The indexes of one conversation, by the size of their passages. Turns differ in it where the system message is
    repeated."""

    by_size: dict[int, PassageIndex] = field(default_factory=dict)

    def of_size(self, size: int) -> PassageIndex:
        from zsmerge_llm.retrieval.passage_index import PassageIndex  # needs NumPy

        return self.by_size.setdefault(size, PassageIndex(size))


@dataclass(frozen=True)
class PassageSearch:
    """Adds passages of what was said before, and the system message, to the message that asks for them.

    max_tokens: how many of them at most. 0: none, ever.
    """

    template: ChatTemplate
    max_tokens: int

    def augment(
        self,
        messages: list[Message],
        budget: int,
        recent_ids: Sequence[int] = (),
        fallback: Search | None = None,
        indexes: PassageIndexes | None = None,
    ) -> list[Message]:
        """Return the messages, the last of them with the passages it asks for; unchanged where there are none.

        Only a user's message asks. In a message that is longer than the cache, the end asks for what stands before it.
        In any other, what is repeated comes first. It takes up half of the cache at most.

        The system message is repeated as a whole if that takes no more than half of this, whatever is asked: models do
        not follow it from far behind, even where the cache holds all of it. But not before a message longer than a
        question: it would not stand near what is asked, and what is repeated again and again is not followed either.

        Args:
            budget: slots of the cache.
            recent_ids: ids of the conversation; where the last `budget` of them hold the system message, it is not
                repeated.
            fallback: another search, for where words find nothing.
            indexes: those of the conversation, so that only new messages are split and indexed.
        """
        *before, last = messages
        if last["role"] != "user" or not self.max_tokens:
            return messages
        content, start = last["content"], question_start(last["content"])
        size = len(self.template.encode_text(content))
        if size <= budget:
            start = 0
        left = min(self.max_tokens, budget // 2)
        system = self._system_message(before, left // 2)
        question = content if size <= MAX_QUESTION_TOKENS else find_question(content)
        searched = before[bool(system) :] + ([{**last, "content": content[:start]}] if start else [])
        is_near = size <= MAX_QUESTION_TOKENS or start > 0
        repeated = f"{system}\n\n" if system and is_near and not self._contains(recent_ids[-budget:], system) else ""
        left -= len(self.template.encode_text(repeated))
        found = self.search(searched, question, left, indexes)
        repeated += as_block(found if found or fallback is None else fallback(question, left))
        if not repeated:
            return messages
        return [*before, {**last, "content": content[:start] + repeated + content[start:]}]

    def _system_message(self, messages: Sequence[Message], max_tokens: int) -> str:
        """Return the system message, if it has at most `max_tokens`; else ""."""
        text = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
        return text if len(self.template.encode_text(text)) <= max_tokens else ""

    def _contains(self, ids: Sequence[int], text: str) -> bool:
        """Return whether ids hold a text, but for spaces, which tokenizers do not always keep."""
        decoded = str(self.template.tokenizer.decode(list(ids)))
        return "".join(text.split()) in "".join(decoded.split())

    def search(
        self, messages: Sequence[Message], question: str, max_tokens: int, indexes: PassageIndexes | None = None
    ) -> list[str]:
        """Return the passages that fit best to a question, at most `max_tokens` together, in the text's order."""
        size = min(PASSAGE_WORDS, max(MIN_WORDS, max_tokens // TOKENS_PER_WORD))
        found: dict[int, str] = {}
        ranked, passages = (indexes or PassageIndexes()).of_size(size).find(messages, question)
        for number in ranked:
            cost = len(self.template.encode_text(passages[number] + "\n\n"))
            if cost <= max_tokens:
                found[number] = passages[number]
                max_tokens -= cost
            elif found:
                break
        return [found[number] for number in sorted(found)]


def as_block(passages: Sequence[str]) -> str:
    """Return passages as they stand before a question; "" for none."""
    return "\n\n".join([INTRODUCTION, *passages, ""]) if passages else ""
