"""An incremental BM25 index of a conversation: each turn adds the passages of its new messages and nothing else.

Scores are those of the library bm25s (Lucene's variant, k1 = 1.5, b = 0.75), bit for bit. It computes them for a whole
text at once, so an index of its could not grow.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Sequence
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from zsmerge_llm.language.messages import shared_prefix
from zsmerge_llm.retrieval.passages import (
    MIN_WORDS,
    PASSAGE_WORDS,
    Passage,
    count_words,
    opening_date,
    query_terms,
    split_with_context,
    terms,
)
from zsmerge_llm.types import Message

K1, B = 1.5, 0.75
MIN_SHARED = 0.35
"""Share of a question's terms, weighted by rarity, that one of the best passages has to contain; others half of it.
Where an answer is found without this, 1 to 3 % share less, and 77 % of what fits best to a question about another text
does (docs/research/retrieval)."""
MAX_TERMS = 6
"""Rarest terms of a question that count: no passage has most of the terms of a long one."""
TOP = 3
"""Number of best passages, one of which has to share so much."""
UNKNOWN_WEIGHT = 0.5
"""Weight of a term that no passage has, relative to the rarest: it may be just the way the question is put."""


class PassageIndex:
    """The passages of some messages, searched by their terms (BM25). Safe to use from several threads.

    Args:
        size: words of a passage, as for `split`.
    """

    def __init__(self, size: int = PASSAGE_WORDS) -> None:
        self.size = size
        self.passages: list[Passage] = []
        self._messages: list[Message] = []
        # By message: the passage that it was joined to, how many passages it added, and the date line it stands under.
        self._added: list[tuple[Passage | None, int, str]] = []
        self._lengths = array("i")  # terms of each passage
        self._total = 0
        self._postings: dict[str, tuple[array[int], array[int]]] = {}  # by term: numbers of passages, and frequencies
        self._lock = Lock()

    def find(
        self, messages: Sequence[Message], questions: Sequence[str]
    ) -> tuple[list[list[tuple[int, float]]], list[Passage]]:
        """Return `rank` of the passages of some messages for each question, and all passages.

        Only messages that were not there at the last call are split and indexed.
        """
        with self._lock:
            self._update(list(messages))
            return [self.rank(question) for question in questions], list(self.passages)

    def add(self, passage: Passage) -> None:
        """Add one passage. Its context is not searched."""
        number, found = len(self.passages), terms(passage.text)
        for term, frequency in Counter(found).items():
            numbers, frequencies = self._postings.setdefault(term, (array("i"), array("i")))
            numbers.append(number)
            frequencies.append(frequency)
        self.passages.append(passage)
        self._lengths.append(len(found))
        self._total += len(found)

    def _pop(self) -> Passage:
        """Remove the last passage."""
        passage = self.passages.pop()
        self._total -= self._lengths.pop()
        for term in set(terms(passage.text)):
            for part in self._postings[term]:
                part.pop()
            if not self._postings[term][0]:
                del self._postings[term]
        return passage

    def _update(self, messages: list[Message]) -> None:
        known = shared_prefix(self._messages, messages)
        while len(self._added) > known:
            joined, count, _ = self._added.pop()
            for _ in range(count):
                self._pop()
            if joined is not None:
                self.add(joined)
        for message in messages[known:]:
            content = message["content"]
            date = self._added[-1][2] if self._added else ""
            if message["role"] == "assistant" and self.passages and count_words(content) < MIN_WORDS:
                joined = self._pop()  # a short answer is found by its question
                self._added.append((joined, 1, date))
                self.add(Passage(f"{joined.text}\n\n{content}", joined.context))
            else:
                new = split_with_context(content, self.size, date)
                self._added.append((None, len(new), opening_date(content) or date))
                for passage in new:
                    self.add(passage)
        self._messages = messages

    def rank(self, question: str) -> list[tuple[int, float]]:
        """Return the numbers and scores of the passages that share enough with a question, the best first."""
        sought = sorted(set(query_terms(question)))
        if not sought or not self._total:
            return []
        shared, weights = np.zeros(len(self.passages)), list[float]()
        for term in sought:
            numbers = self._numbers(term)
            rarity = self._rarity(len(numbers))
            shared[numbers] += rarity
            weights.append(rarity if len(numbers) else UNKNOWN_WEIGHT * rarity)
        scores, least = self._scores(sought), MIN_SHARED * sum(sorted(weights)[-MAX_TERMS:])
        if max(shared[at] for at in _highest(scores, TOP)) < least:
            return []
        enough = np.flatnonzero(shared >= least / 2)
        ranked = enough[np.argsort(-scores[enough], kind="stable")]
        return list(zip(ranked.tolist(), scores[ranked].tolist(), strict=True))

    def _scores(self, sought: Sequence[str]) -> NDArray[np.float32]:
        """Return the BM25 score of each passage: float32 sums, term by term, as bm25s computes them."""
        scores = np.zeros(len(self.passages), dtype=np.float32)
        lengths, mean = np.frombuffer(self._lengths, dtype=np.int32), self._total / len(self.passages)
        for term in sought:
            numbers = self._numbers(term)
            if len(numbers):
                frequency = np.frombuffer(self._postings[term][1], dtype=np.int32).astype(np.float64)
                saturation = frequency / (K1 * ((1 - B) + B * lengths[numbers] / mean) + frequency)
                weight = np.float32(math.log(1 + (len(lengths) - len(numbers) + 0.5) / (len(numbers) + 0.5)))
                scores[numbers] += (np.float64(weight) * saturation).astype(np.float32)
        return scores

    def _numbers(self, term: str) -> NDArray[np.int32]:
        """Return the numbers of the passages with a term. A view, to be gone before the index changes."""
        posting = self._postings.get(term)
        return np.frombuffer(posting[0], dtype=np.int32) if posting else np.zeros(0, dtype=np.int32)

    def _rarity(self, having: int) -> float:
        """Return the weight of a term that `having` passages contain: the fewer, the more (BM25's idf)."""
        return math.log1p((len(self.passages) - having + 0.5) / (having + 0.5))


def _highest(scores: NDArray[np.float32], count: int) -> list[int]:
    """Return the numbers of the highest scores, of equal ones the first."""
    if len(scores) <= count:
        return list(range(len(scores)))
    least = np.partition(scores, -count)[-count]
    above, equal = np.flatnonzero(scores > least).tolist(), np.flatnonzero(scores == least).tolist()
    chosen: list[int] = above + equal[: count - len(above)]
    return chosen
