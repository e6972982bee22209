"""How to end a constrained answer in few tokens: what lets an answer that runs out of tokens still be complete.

A plan is a list of tokens that completes the answer. It need not be the shortest: as long as one is known that fits in
what is left, the answer will be complete, and a token after which none fits is not taken.
"""

from __future__ import annotations

import heapq
import re
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray
    from torch import Tensor

LONGEST = 12
"""Longer pieces of filler look no better, and a tokenizer's longest ones are rules and blanks."""
BRANCHES = 8
STEPS = 5000
"""Steps of a search for a way that fits, in all. One takes about 0.1 ms."""
BURST, GROWTH = 64, 16
"""A plan is not looked at again as long as its growth by GROWTH tokens a step, and BURST at once, could not matter."""


class CompletionPlanner:
    """Plans for one tokenizer."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._size = tokenizer.vocab_size
        self._ends = frozenset(tokenizer.eos_tokens)
        texts = [_text(tokenizer, index) for index in range(self._size)]
        brackets = _sorted(texts, r"[\]}]+|\[\]|\{\}")
        quotes = _sorted(texts, r'"[\]}]*')
        breaks = _sorted(texts, r'[,:] ?"?')  # before digits: a number ends as soon as it may
        digits = [*_single(texts, "0"), *_single(texts, "123456789"), *_sorted(texts, r"[0-9]{2,}")]
        words = _sorted(texts, r"null|true|false") + _sorted(texts, r"[A-Za-z]+")
        single = _single(texts, "".join(map(chr, [*range(32, 127), *range(128, 256)])))  # bytes of UTF-8, the latter
        late = set(_single(texts, "-[{"))
        filler = [index for index in single if index not in late]
        self._structure = _array(
            [*brackets, *_sorted(texts, '""?'), *quotes, *breaks, *digits, *words, *filler, *sorted(late)]
        )
        self._inside = _array([*quotes, *words, *filler, *brackets])
        self._braces = _single(texts, "{}")
        self._choices = [*dict.fromkeys([*quotes[:4], *brackets[:4], *single])]

    def is_end(self, token: int) -> bool:
        """Whether it ends an answer."""
        return token in self._ends

    def without_ends(self, logits: Tensor) -> Tensor:
        """float32[vocab] with -inf for the tokens that end an answer."""
        import torch

        ends = torch.tensor(sorted(self._ends), device=logits.device)
        return logits.index_fill(0, ends, -torch.inf)

    @staticmethod
    def pause(slack: int) -> int:
        """How many tokens may come before a plan that leaves `slack` tokens free is looked at again."""
        return max(0, (slack - BURST) // GROWTH)

    def plan(
        self, state: LLMatcher, limit: int, known: list[int] | None = None, thorough: bool = False
    ) -> list[int] | None:
        """At most `limit` tokens that complete the answer; None if no such are found.

        Args:
            known: a plan for the state before; if it will still do, nothing is searched.
            thorough: try other ways when the obvious one is too long.
        """
        if limit < 0 or state.is_error():
            return None
        if state.is_accepting():
            return []
        if known and len(known) <= limit and self._completes(state, known):
            return known
        return self._search(state, limit, STEPS if thorough else 0)

    def _completes(self, state: LLMatcher, tokens: list[int]) -> bool:
        return state.validate_tokens([*tokens, next(iter(self._ends))]) > len(tokens)

    def _search(self, start: LLMatcher, limit: int, steps: int) -> list[int] | None:
        """The obvious way; then leave it at one point, at two, and so on: limited discrepancy search."""
        order = count()
        points: list[tuple[int, int, int, list[int], LLMatcher, int]] = []  # where to leave a way, and its next token
        ways, turns = [(list[int](), start)], 0
        while True:
            for before, state in ways:
                path, ended = self._obvious(state, 2 * limit - len(before))
                if ended and (plan := self._fitting(start, before + path, limit)) is not None:
                    return plan
                state, steps = state.deep_copy(), steps - len(path)
                for token in path[:limit] if steps > 0 else ():
                    heapq.heappush(points, (turns, len(before), next(order), before, state.deep_copy(), token))
                    state.consume_token(token)
                    before = [*before, token]
            if steps <= 0 or not points:
                return None
            turns, _, _, before, state, token = heapq.heappop(points)
            others, tried = self._others(state, token)
            ways, turns, steps = [([*before, other], child) for other, child in others], turns + 1, steps - tried

    def _obvious(self, start: LLMatcher, limit: int) -> tuple[list[int], bool]:
        """What closes most at each step, and whether that came to an end."""
        state, path = start.deep_copy(), list[int]()
        while not state.is_accepting():
            tokens = state.compute_ff_tokens() or [self._best(state)]
            if len(path) >= limit or not state.consume_tokens(tokens):
                return path, False
            path += tokens
        return path, True

    def _fitting(self, start: LLMatcher, path: list[int], limit: int) -> list[int] | None:
        """`path`, if it fits, or else the same text in the tokenizer's own pieces, which are fewer."""
        if len(path) > limit:
            path = self._tokenizer.tokenize_bytes(self._tokenizer.decode_bytes(path))
        return path if len(path) <= limit and self._completes(start, path) else None

    def _best(self, state: LLMatcher) -> int:
        allowed = self._allowed(state)
        ranked = self._inside if self._in_string(allowed) else self._structure
        at = allowed[ranked].argmax() if len(ranked) else 0
        return int(ranked[at]) if len(ranked) and allowed[ranked[at]] else int(allowed.argmax())

    def _others(self, state: LLMatcher, token: int) -> tuple[list[tuple[int, LLMatcher]], int]:
        """Other next tokens than `token`, one for each set of tokens that could follow, and how many were tried."""
        allowed = self._allowed(state)
        found: list[tuple[int, LLMatcher]] = []
        if allowed.sum() == 1 or self._in_string(allowed):  # its end is the obvious way, and no other is shorter
            return found, 1
        taken = state.deep_copy()
        taken.consume_token(token)
        seen, tried = {taken.compute_bitmask()}, 0
        for other in self._choices:
            if not allowed[other] or other == token or len(found) == BRANCHES:
                continue
            child, tried = state.deep_copy(), tried + 1
            if child.consume_token(other) and (follow := child.compute_bitmask()) not in seen:
                seen.add(follow)
                found.append((other, child))
        return found, tried

    def _in_string(self, allowed: NDArray[np.bool_]) -> bool:
        """Whether the next token is part of any text: nothing else takes both braces."""
        return len(self._braces) == 2 and bool(allowed[self._braces].all())

    def _allowed(self, state: LLMatcher) -> NDArray[np.bool_]:
        import numpy as np

        bits = np.frombuffer(state.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, count=self._size, bitorder="little").view(bool)


def _text(tokenizer: LLTokenizer, token: int) -> str:
    return "" if tokenizer.is_special_token(token) else tokenizer.decode_bytes([token]).decode("latin-1")


def _sorted(texts: list[str], pattern: str) -> list[int]:
    """Tokens that match, the longest first."""
    fits = re.compile(pattern).fullmatch
    found = [index for index, text in enumerate(texts) if text and len(text) <= LONGEST and fits(text)]
    return sorted(found, key=lambda index: -len(texts[index]))


def _single(texts: list[str], characters: str) -> list[int]:
    """The tokens of single characters, in their order."""
    where = {text: index for index, text in reversed(list(enumerate(texts))) if len(text) == 1}
    return [where[character] for character in characters if character in where]


def _array(tokens: list[int]) -> NDArray[np.int64]:
    import numpy as np

    return np.array(list(dict.fromkeys(tokens)), dtype=np.int64)
