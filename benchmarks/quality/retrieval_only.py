"""Retrieval in place of a memory: for each question, BM25 passages of as many tokens as there are slots, read anew."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import bm25s

from benchmarks.quality.answers import answer
from benchmarks.quality.evaluator import Budget, Evaluator, row
from benchmarks.quality.tasks import Item, Question
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.retrieval.passages import split
from zsmerge_llm.retrieval.questions import find_question
from zsmerge_llm.sessions.documents import INSTRUCTION


@dataclass
class RetrievalOnly:
    """Plain BM25 (the library bm25s, its own tokens and stop words) and a fresh full cache for each question."""

    evaluator: Evaluator
    name: str = "bm25"

    def unknown(self, budget: Budget, item: Item) -> Iterator[dict[str, Any]]:
        """Index an item's passages once, then answer each question from those that fit best."""
        started, slots = time.perf_counter(), budget.slots(item.tokens)
        passages = [passage for message in item.messages for passage in split(message["content"])]
        index = bm25s.BM25()
        index.index(_terms(passages), show_progress=False)
        facts = {"slots": slots, "seconds": round(time.perf_counter() - started, 2), "tokens_read": item.tokens}
        for asked in item.questions:
            yield self._asked(index, passages, slots, asked, facts)

    turns = unknown
    """Earlier questions and answers are no part of a later prompt."""

    def _asked(
        self, index: bm25s.BM25, passages: list[str], slots: int, asked: Question, facts: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the line of one question."""
        started, engine, template = time.perf_counter(), self.evaluator.engine, self.evaluator.template
        found = self._best(index, passages, slots, asked.text)
        message = INSTRUCTION + "\n\n".join([*found, asked.message])
        ids = [*template.encode(template.render([{"role": "user", "content": message}])), *asked.opening]
        cache = engine.new_cache(CacheConfig.full())
        engine.read(cache, ids[:-1])
        size = cache.full_nbytes(len(ids))
        scored = answer(engine, template, cache, ids[-1:], asked)
        costs = {"retrieved_tokens": len(ids), "question_seconds": round(time.perf_counter() - started, 2)}
        return row(asked, scored, {**facts, "cache_bytes": size, "reading_bytes": size, **costs})

    def _best(self, index: bm25s.BM25, passages: list[str], tokens: int, question: str) -> list[str]:
        """Return the best passages for a question, at most `tokens` together, in the text's order."""
        terms = _terms([find_question(question)])[0]
        scores = index.get_scores(terms) if terms else [0.0] * len(passages)
        chosen: list[int] = []
        for number in sorted(range(len(passages)), key=lambda each: -scores[each]):
            cost = len(self.evaluator.template.encode_text(passages[number] + "\n\n"))
            if cost <= tokens:
                tokens -= cost
                chosen.append(number)
        return [passages[number] for number in sorted(chosen)]


def _terms(texts: list[str]) -> list[list[str]]:
    """Return texts as BM25's terms."""
    found: list[list[str]] = bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
    return found
