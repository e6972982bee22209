"""An incremental index of passages by meaning: how much of a question each of them says, in whatever words.

Each token of a question is compared with the tokens of a passage, and counts by the most similar one: 1 if the passage
has it, less for one of like meaning (`token_vectors`). So a word that both have counts as in a search for words, and
"keeper" finds "guard" besides. Rare tokens count more.

The index is four bytes for each distinct token of a passage.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from zsmerge_llm.retrieval.token_vectors import TokenVectors


class SimilarityIndex:
    """The tokens of some passages, taken together when they are first needed. Not safe to use from several threads."""

    def __init__(self, vectors: TokenVectors, starts: Sequence[int] = (), tokens: Sequence[int] = ()) -> None:
        """Take the passages of `arrays`, if there are any."""
        self._vectors = vectors
        self._starts, self._tokens = array("i", starts), array("I", tokens)
        self._new: list[str] = []  # texts behind those

    def __len__(self) -> int:
        return len(self._starts) + len(self._new)

    def copy(self) -> SimilarityIndex:
        """Return an index of the same passages that goes on by itself."""
        other = SimilarityIndex(self._vectors, self._starts, self._tokens)
        other._new = self._new[:]
        return other

    def arrays(self) -> tuple[array[int], array[int]]:
        """Return where the tokens of each passage begin, and the tokens."""
        self._take(self._vectors.distinct_tokens(self._new))
        return self._starts, self._tokens

    def append(self, text: str) -> None:
        """Add a passage."""
        self._new.append(text)

    def pop(self) -> None:
        """Remove the last passage."""
        if self._new:
            self._new.pop()
        else:
            del self._tokens[self._starts.pop() :]

    def scores(self, question: str) -> NDArray[np.float32]:
        """Return what share of a question each passage says: float32 [passages], from 0 to 1."""
        asked, *new = self._vectors.distinct_tokens([question, *self._new])
        self._take(new)
        tokens = np.array(self._tokens, dtype=np.uint32)
        scores = np.zeros(len(self), dtype=np.float32)
        if not asked or not len(tokens):
            return scores
        starts = np.array(self._starts)
        filled = np.flatnonzero(np.diff(starts, append=len(tokens)))  # `reduceat` takes no part without an element
        kinds, places, having = np.unique(tokens, return_inverse=True, return_counts=True)
        known = dict(zip(kinds.tolist(), having.tolist(), strict=True))
        weights = [self._rarity(known.get(token, 0)) for token in asked]
        for weight, similarity in zip(weights, self._vectors.similarity(asked, kinds), strict=True):
            scores[filled] += np.float32(weight) * np.maximum.reduceat(similarity[places], starts[filled])
        return scores / np.float32(sum(weights) or 1)

    def _take(self, new: Sequence[Sequence[int]]) -> None:
        """Add the tokens of the new texts."""
        for ids in new:
            self._starts.append(len(self._tokens))
            self._tokens.extend(ids)
        self._new.clear()

    def _rarity(self, having: int) -> float:
        """Return the weight of a token that so many passages have: the fewer, the more; 0 if all have it."""
        return max(0.0, float(np.log((len(self) + 1) / (having + 0.5))))
