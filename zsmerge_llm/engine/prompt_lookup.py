"""Prompt lookup decoding (arXiv 2304.04487): draft the next tokens from what followed the same n-gram before.

Answers about a document quote it. A draft is read in one pass with the token before it, and as much of it is kept as
the model samples itself, so that the answer is the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

NGRAM = 3
"""Equal tokens that make a draft: with 2, half of the drafts would be wrong (docs/research/kernels)."""
MAX_DRAFT_TOKENS = 4
SEARCHED_TOKENS = 16_384
"""Newest ids of a prompt that are searched: indexing takes 0.3 ms per 1,000, in every answer."""


class PromptLookup:
    """Finds drafts in the tokens of one conversation.

    They are indexed when a draft is wanted, so that a row that asks for none pays nothing and no first token waits.

    Args:
        ids: the conversation so far.
        stop_ids: ids that are never drafted.
    """

    def __init__(self, ids: Sequence[int], stop_ids: Collection[int]) -> None:
        self._ids = list(ids[-SEARCHED_TOKENS:])
        self._stop_ids = stop_ids
        self._num_indexed = 0
        self._end_of: dict[tuple[int, ...], int] = {}  # by n-gram: where its newest occurrence ends
        self._match: int | None = None  # where an earlier occurrence of the newest n-gram ends

    def push(self, token: int) -> None:
        """Append the next token of the conversation."""
        self._ids.append(token)

    def propose(self) -> list[int]:
        """Return at most MAX_DRAFT_TOKENS ids; none where the newest n-gram has not occurred before."""
        for end in range(self._num_indexed + 1, len(self._ids) + 1):
            ngram = tuple(self._ids[max(0, end - NGRAM) : end])
            self._match = self._end_of.get(ngram)
            self._end_of[ngram] = end
        self._num_indexed = len(self._ids)
        draft = self._ids[self._match : self._match + MAX_DRAFT_TOKENS] if self._match is not None else []
        end = next((at for at, token in enumerate(draft) if token in self._stop_ids), len(draft))
        return draft[:end]
