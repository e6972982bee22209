"""An incremental index of a conversation: each turn adds the passages of its new messages and nothing else.

Passages are found by words (BM25). Where the model's token vectors are given, they are ranked by words and by meaning
(`similarity_index`) in equal parts. BM25's scores are those of the library bm25s (Lucene's variant, k1 = 1.5,
b = 0.75), bit for bit. It computes them for a whole text at once, so an index of its could not grow.

The index is small beside a cache: four bytes for a term of a passage and two for how often it is there, and four for a
token. A question has few terms, and for each all of these are looked through, which takes a tenth of a millisecond for
500,000 tokens; comparing tokens takes longer, some hundredths of a second for 100,000 (docs/research/retrieval). Terms
are told apart by a checksum of 32 bits. Passages are places in the messages, which a conversation holds anyway.
"""

from __future__ import annotations

import math
import re
import zlib
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from zsmerge_llm.language.messages import shared_prefix
from zsmerge_llm.retrieval.passages import (
    MIN_WORDS,
    PASSAGE_WORDS,
    Passage,
    opening_date,
    split_spans,
)
from zsmerge_llm.retrieval.personal_facts import asks_what_was_said
from zsmerge_llm.retrieval.questions import Query, asks_for_list, subject
from zsmerge_llm.retrieval.recency import asked_time, asks_for_state, in_time, without_time
from zsmerge_llm.retrieval.similarity_index import SimilarityIndex
from zsmerge_llm.retrieval.terms import count_words, identifiers, query_terms, terms
from zsmerge_llm.retrieval.token_vectors import TokenVectors
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
MAX_FREQUENCY = 0xFFFF
"""Largest count that two bytes hold: beyond it, BM25 hardly tells frequencies apart."""
NEAR_BY_WORDS, NEAR = 0.5, 0.65
"""Share of the best passage's score that others need, by words alone and by both. After a gap the search is sure."""
ALIKE_SHARE = 0.9
"""Share of what the best passages say of a question's terms, by weight, that others say which may be newer."""
FOR_LIST = 0.77
"""Factor of these where a list is asked for, which stands in many passages (docs/research/retrieval)."""
REPLY = re.compile(r"[^\S\n]*\n[^\S\n]*(\S[^\n]{0,39}:[^\S\n][^\n]+)")
"""What follows a passage of a dialogue: a line of the same paragraph that begins with who says it."""
MAX_REPLY_LETTERS = 400
"""Characters of a reply that is read with the passage before it."""
UNKNOWN_WEIGHT = 0.5
"""Weight of a term that no passage has, relative to the rarest: it may be just the way the question is put."""


@dataclass
class Passages:
    """The passages of some messages, as places in them.

    A passage is a part of a message's text, and the short answers in the messages behind it, up to its last message.
    """

    messages: Sequence[Message] = ()
    places: array[int] = field(default_factory=lambda: array("i"))  # of each: first message, start, end, last message
    contexts: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.contexts)

    def __iter__(self) -> Iterator[Passage]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Passage:
        message, start, end, last = self.places[4 * range(len(self))[number] :][:4]
        behind = (each["content"] for each in self.messages[message + 1 : last + 1] if each["role"] == "assistant")
        return Passage("\n\n".join([self.messages[message]["content"][start:end], *behind]), self.contexts[number])

    def reply(self, number: int) -> str:
        """Return the line of a dialogue that follows a passage; "" for none, or a long one."""
        message, _, end, last = self.places[4 * number :][:4]
        following = self.messages[message]["content"][end : end + MAX_REPLY_LETTERS + 1]
        found = REPLY.match(following) if last == message else None
        return found[1] if found and found.end() <= MAX_REPLY_LETTERS else ""

    def copy(self) -> Passages:
        """Return the same passages, which stay as they are when these change."""
        return Passages(self.messages, self.places[:], self.contexts[:])

    def add(self, message: int, start: int, end: int, context: str) -> None:
        """Add a part of a message's text. context: as for `Passage`."""
        if self.contexts and self.contexts[-1] == context:
            context = self.contexts[-1]  # the same object
        self.places.extend((message, start, end, message))
        self.contexts.append(context)

    def count_before(self, message: int) -> int:
        """Return how many passages begin in messages before one."""
        return bisect_left(self.places[::4], message)

    def end_at(self, message: int) -> None:
        """Make a message the last one of the last passage."""
        self.places[-1] = message

    def pop(self) -> None:
        """Remove the last passage."""
        del self.places[-4:], self.contexts[-1]


class IndexState(NamedTuple):
    """What an index has made of its messages.

    Attributes:
        added: of each message, whether it was joined to the last passage, how many it added, and the date line it
            stands under.
        lengths: words of each passage.
        starts: where the terms of each passage begin.
        terms, frequencies: checksums of the terms of each passage, and how often it has them.
        similar: the same passages by meaning, if they are searched so.
    """

    passages: Passages
    added: list[tuple[bool, int, str]]
    lengths: array[int]
    starts: array[int]
    terms: array[int]
    frequencies: array[int]
    similar: SimilarityIndex | None


class PassageIndex:
    """The passages of some messages, searched by words and by meaning. Safe to use from several threads.

    Args:
        size: words of a passage, as for `split`.
        vectors: those of the model's tokens; None: words alone.
    """

    def __init__(self, size: int = PASSAGE_WORDS, vectors: TokenVectors | None = None) -> None:
        self.size = size
        self._similar = None if vectors is None else SimilarityIndex(vectors)
        self.passages = Passages()
        self._added: list[tuple[bool, int, str]] = []  # these and the next as in `IndexState`
        self._lengths, self._starts = array("i"), array("i")
        self._terms, self._frequencies = array("I"), array("H")
        self._total = 0  # of the lengths
        self._lock = Lock()

    @classmethod
    def of_state(cls, size: int, state: IndexState) -> PassageIndex:
        """Return an index that goes on from a state, which is its own from now on."""
        index = cls(size)
        index.passages, index._added, index._similar = state.passages, state.added, state.similar
        index._lengths, index._starts, index._total = state.lengths, state.starts, sum(state.lengths)
        index._terms, index._frequencies = state.terms, state.frequencies
        return index

    def find(self, messages: Sequence[Message], queries: Sequence[Query]) -> tuple[list[list[int]], Passages]:
        """Return `rank` of the passages of some messages for each query, and all passages.

        Only messages that were not there at the last call are split and indexed.
        """
        with self._lock:
            self._update(list(messages))
            counts = [self.passages.count_before(len(messages) - query.skipped) for query in queries]
            rankings = [self.rank(query.text, count) for query, count in zip(queries, counts, strict=True)]
            return rankings, self.passages.copy()

    def rarities(self, question: str) -> dict[str, float]:
        """Return the weight of each of a question's terms that a passage has: the fewer have it, the more."""
        with self._lock:
            having = {term: len(self._passages_with(term)[0]) for term in query_terms(subject(question))}
            return {term: self._rarity(count) for term, count in having.items() if count}

    def having(self, term: str, most: int) -> list[int]:
        """Return the numbers of the passages with a term; [] where more than `most` have it."""
        with self._lock:
            numbers = self._passages_with(term)[0].tolist()
        return numbers if len(numbers) <= most else []

    def copy(self) -> PassageIndex:
        """Return an index of the same messages that goes on by itself."""
        return PassageIndex.of_state(self.size, self.state())

    def state(self) -> IndexState:
        """Return a copy of what was made of the messages."""
        with self._lock:
            arrays = (self._lengths[:], self._starts[:], self._terms[:], self._frequencies[:])
            similar = None if self._similar is None else self._similar.copy()
            return IndexState(self.passages.copy(), self._added[:], *arrays, similar)

    def _append(self, passage: Passage) -> None:
        """Add the terms of a passage and of the headings it stands under: a date or a topic holds for all below it."""
        text = f"{passage.context}\n{passage.text}"
        found = terms(text)
        counted = Counter(found)
        self._starts.append(len(self._terms))
        self._terms.extend(map(_checksum, counted))
        self._frequencies.extend(min(each, MAX_FREQUENCY) for each in counted.values())
        self._lengths.append(len(found))
        self._total += len(found)
        if self._similar is not None:
            self._similar.append(text)

    def _drop(self) -> None:
        """Remove the terms of the last passage."""
        start = self._starts.pop()
        del self._terms[start:], self._frequencies[start:]
        self._total -= self._lengths.pop()
        if self._similar is not None:
            self._similar.pop()

    def _end_at(self, message: int) -> None:
        """Make a message the last one of the last passage."""
        self._drop()
        self.passages.end_at(message)
        self._append(self.passages[-1])

    def _update(self, messages: list[Message]) -> None:
        known = shared_prefix(self.passages.messages, messages)
        while len(self._added) > known:
            joined, count, _ = self._added.pop()
            for _ in range(count):
                self._drop()
                self.passages.pop()
            if joined:  # the passage ends with the message before that has a part in it
                parts = reversed(range(len(self._added)))
                self._end_at(next(at for at in parts if self._added[at][0] or self._added[at][1]))
        self.passages.messages = messages
        for number in range(known, len(messages)):
            content, date = messages[number]["content"], self._added[-1][2] if self._added else ""
            if messages[number]["role"] == "assistant" and self.passages and count_words(content) < MIN_WORDS:
                self._end_at(number)  # a short answer is found by its question
                self._added.append((True, 0, date))
                continue
            spans = split_spans(content, self.size, date)
            for span in spans:
                self.passages.add(number, *span)
                self._append(self.passages[-1])
            self._added.append((False, len(spans), opening_date(content) or date))

    def rank(self, question: str, count: int | None = None) -> list[int]:
        """Return which of the first `count` passages (None: of all) say most of what a question asks for, best first.

        Where words find nothing, there is none: meaning does not tell a question about another text. But one for what
        was said in the conversation is about this one, however few words it shares. A passage's score is the sum of its
        shares of the best one by words and of the best one by meaning.
        """
        min_shared = 0.0 if asks_what_was_said(question) else MIN_SHARED
        factor, question = FOR_LIST if asks_for_list(question) else 1.0, subject(question)
        by_words = self.rank_by_words(question, count, min_shared)
        if self._similar is None or not by_words:
            near = [number for number, score in by_words if score >= factor * NEAR_BY_WORDS * by_words[0][1]]
            return self._in_time(near, question)
        similar = self._similar.scores(question)
        scores = similar[:count] / (similar[:count].max() or 1)
        for number, score in by_words:
            scores[number] += score / by_words[0][1]
        order = np.argsort(-scores, kind="stable")
        near = [int(number) for number in order if scores[number] >= factor * NEAR * scores[order[0]]]
        return self._in_time(near, question)

    def _in_time(self, ranked: list[int], question: str) -> list[int]:
        """Return ranked passages with the newest or oldest first of those that say as much of a question as the best.

        Where it asks for what is so, the newest of them comes behind the best one.
        """
        time = asked_time(question)
        if len(ranked) < 2 or not (time or asks_for_state(question)):
            return ranked
        said = np.zeros(len(self.passages))
        for term in set(query_terms(without_time(question))):
            numbers, _ = self._passages_with(term)
            said[numbers] += self._rarity(len(numbers))
        least = ALIKE_SHARE * max(said[number] for number in ranked[:TOP])
        alike = {number for number in ranked if said[number] >= least}
        if time:
            return in_time(ranked, alike, time)
        return list(dict.fromkeys([ranked[0], max([ranked[0], *alike]), *ranked]))

    def rank_by_words(
        self, question: str, count: int | None = None, min_shared: float = MIN_SHARED
    ) -> list[tuple[int, float]]:
        """Return those of the first `count` passages that share enough with a question, the best first.

        Each with its BM25 score. min_shared: as `MIN_SHARED`.
        """
        sought = sorted(set(query_terms(question)))
        if not sought or count == 0 or not self._total:
            return []
        needed = set(query_terms(without_time(question))) or sought  # a text need not have "last" and "now"
        found = [self._passages_with(term) for term in sought]
        shared, weights = np.zeros(len(self.passages)), list[float]()
        for term, (numbers, _) in zip(sought, found, strict=True):
            rarity = self._rarity(len(numbers))
            shared[numbers] += rarity
            if len(numbers) or term in needed:
                weights.append(rarity if len(numbers) else UNKNOWN_WEIGHT * rarity)
        least = min_shared * sum(sorted(weights)[-MAX_TERMS:])
        for term in identifiers(question):  # one that all passages have weighs nothing, and yet they are about it
            named, _ = self._passages_with(term)
            shared[named] = np.maximum(shared[named], least)
        scores, shared = self._scores(found)[:count], shared[:count]
        if max(shared[at] for at in _highest(scores, TOP)) < least:
            return []
        enough = np.flatnonzero((shared >= least / 2) & (shared > 0))
        ranked = enough[np.argsort(-scores[enough], kind="stable")]
        return list(zip(ranked.tolist(), scores[ranked].tolist(), strict=True))

    def _scores(self, found: Sequence[tuple[NDArray[np.intp], NDArray[np.float64]]]) -> NDArray[np.float32]:
        """Return the BM25 score of each passage: float32 sums, term by term, as bm25s computes them.

        found: `_passages_with` of each term.
        """
        scores = np.zeros(len(self.passages), dtype=np.float32)
        lengths, mean = np.frombuffer(self._lengths, dtype=np.int32), self._total / len(self.passages)
        for numbers, frequency in found:
            if len(numbers):
                saturation = frequency / (K1 * ((1 - B) + B * lengths[numbers] / mean) + frequency)
                weight = np.float32(math.log(1 + (len(lengths) - len(numbers) + 0.5) / (len(numbers) + 0.5)))
                scores[numbers] += (np.float64(weight) * saturation).astype(np.float32)
        return scores

    def _passages_with(self, term: str) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        """Return the numbers of the passages with a term, and how often each has it."""
        places = np.flatnonzero(np.frombuffer(self._terms, dtype=np.uint32) == _checksum(term))
        numbers = np.searchsorted(np.frombuffer(self._starts, dtype=np.int32), places, side="right") - 1
        return numbers, np.frombuffer(self._frequencies, dtype=np.uint16)[places].astype(np.float64)

    def _rarity(self, having: int) -> float:
        """Return the weight of a term that `having` passages contain: the fewer, the more (BM25's idf)."""
        return math.log1p((len(self.passages) - having + 0.5) / (having + 0.5))


def _checksum(term: str) -> int:
    return zlib.crc32(term.encode("utf-8", "surrogatepass"))


def _highest(scores: NDArray[np.float32], count: int) -> list[int]:
    """Return the numbers of the highest scores, of equal ones the first."""
    if len(scores) <= count:
        return list(range(len(scores)))
    least = np.partition(scores, -count)[-count]
    above, equal = np.flatnonzero(scores > least).tolist(), np.flatnonzero(scores == least).tolist()
    chosen: list[int] = above + equal[: count - len(above)]
    return chosen
