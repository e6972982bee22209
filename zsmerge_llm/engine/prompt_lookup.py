"""What an answer may say next, guessed from the prompt: what stood there behind the same few tokens.

Answers about a document quote it. A guess is read in one pass with the token before it, and as much of it stays as the
model says itself, so that the answer is the same (prompt lookup decoding; arXiv 2304.04487).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

GRAM = 3
"""Equal tokens that make a guess: with 2, half of the guesses would be wrong."""
AHEAD = 4
"""Tokens of a guess."""


class PromptLookup:
    """The tokens of one conversation, for looking up.

    They are indexed when a guess is wanted, so that a row that asks for none pays nothing and no first token waits.

    Args:
        ids: what was said so far.
        stops: ids that are never guessed.
    """

    def __init__(self, ids: Sequence[int], stops: Collection[int]) -> None:
        self._ids = list(ids)
        self._stops = stops
        self._indexed = 0
        self._behind: dict[tuple[int, ...], int] = {}
        self._found: int | None = None  # where the last GRAM of the indexed ids stood before: what is behind them

    def push(self, token: int) -> None:
        """Take the next token."""
        self._ids.append(token)

    def guess(self) -> list[int]:
        """At most AHEAD ids; none where the last GRAM ids are new."""
        for end in range(self._indexed + 1, len(self._ids) + 1):
            gram = tuple(self._ids[max(0, end - GRAM) : end])
            self._found = self._behind.get(gram)
            self._behind[gram] = end
        self._indexed = len(self._ids)
        found = self._ids[self._found : self._found + AHEAD] if self._found is not None else []
        end = next((at for at, token in enumerate(found) if token in self._stops), len(found))
        return found[:end]
