"""Statements of one kind that a conversation's user has made, and which of them a question needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from threading import Lock
from typing import TYPE_CHECKING

from zsmerge_llm.language.messages import shared_prefix
from zsmerge_llm.retrieval.terms import terms
from zsmerge_llm.types import Message

if TYPE_CHECKING:
    from zsmerge_llm.retrieval.token_vectors import TokenVectors


class UserStatements:
    """Statements of one kind that a conversation's user has made. Each turn adds those of its new messages.

    Safe to use from several threads.

    Args:
        find: a message → its statements.
    """

    def __init__(self, find: Callable[[str], list[str]]) -> None:
        self._find = find
        self._messages: list[Message] = []
        self._found: list[list[str]] = []  # by message
        self._lock = Lock()

    def select(
        self,
        messages: Sequence[Message],
        relevance: Callable[[Sequence[str]], Sequence[float]],
        fits: Callable[[str], bool],
        least: float = 0.0,
    ) -> list[str]:
        """Return the statements of the users' messages that are repeated, in their order.

        Args:
            relevance: of each statement: the highest is tried first, of equal ones the newest.
            fits: whether a statement is to be repeated, beside those before which it said so.
            least: relevance that a statement has to have, as a share of the highest.
        """
        with self._lock:
            statements = self._update(list(messages))
        relevant = relevance(statements)
        enough = least * max(relevant, default=0.0)
        numbers = [number for number in range(len(statements)) if relevant[number] >= enough]
        by_relevance = sorted(numbers, key=lambda number: (relevant[number], number), reverse=True)
        return [statements[number] for number in sorted(each for each in by_relevance if fits(statements[each]))]

    def _update(self, messages: list[Message]) -> list[str]:
        """Return all statements, the oldest first; of equal ones the newest."""
        known = shared_prefix(self._messages, messages)
        new = [self._find(each["content"]) if each["role"] == "user" else [] for each in messages[known:]]
        self._messages, self._found = messages, [*self._found[:known], *new]
        newest_first = dict.fromkeys(text for found in reversed(self._found) for text in reversed(found))
        return list(reversed(newest_first))


def relevance(
    statements: Sequence[str], asked: Collection[str], text: str, vectors: TokenVectors | None = None
) -> list[float]:
    """Return how relevant each statement is: its shares of the best one by words and by meaning.

    Args:
        asked: terms that are asked for. text: what statements are compared with by meaning.
        vectors: those of the model's tokens; None: words alone.
    """
    having = Counter(term for each in statements for term in set(terms(each)))
    by_words = _shares([sum(1 / having[term] for term in set(terms(each)).intersection(asked)) for each in statements])
    if vectors is None:
        return by_words
    from zsmerge_llm.retrieval.similarity_index import SimilarityIndex  # needs NumPy

    index = SimilarityIndex(vectors)
    for each in statements:
        index.append(each)
    by_meaning = _shares(index.scores(text).tolist())
    return [sum(both) for both in zip(by_words, by_meaning, strict=True)]


def _shares(scores: Sequence[float]) -> list[float]:
    """Return scores as shares of the highest one."""
    highest = max(scores, default=0.0) or 1.0
    return [score / highest for score in scores]
