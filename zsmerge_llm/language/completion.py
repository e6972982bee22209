"""Short completions of a constrained answer, so that it is complete even when it runs out of tokens.

A plan is a list of tokens that completes the answer. It need not be the shortest: as long as one is known that fits
into the tokens left, the answer will be complete, and a token after which none fits is not accepted.
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

MAX_TOKEN_CHARACTERS = 12
"""Longer tokens are not used: the longest ones of a vocabulary are horizontal rules and runs of spaces."""
MAX_BRANCHES = 8
"""Alternatives that are tried at one point of a path."""
SEARCH_STEPS = 5000
"""Tokens that one search may try in all; 0.1 ms each."""
BURST, GROWTH = 64, 16
"""How fast a plan's slack is taken to fall: by BURST tokens once, where something large is opened, and by GROWTH with
each accepted token. A plan with more slack than that is not checked again (`CompletionPlanner.pause`)."""


class CompletionPlanner:
    """Find completions for answers of one tokenizer."""

    def __init__(self, tokenizer: LLTokenizer) -> None:
        self._tokenizer = tokenizer
        self._size = tokenizer.vocab_size
        self._stop_ids = frozenset(tokenizer.eos_tokens)
        texts = [_text(tokenizer, index) for index in range(self._size)]
        # Orders of preference: what closes most comes first, then what is short, then what opens something new.
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

    def is_stop_token(self, token: int) -> bool:
        """Return whether `token` ends an answer."""
        return token in self._stop_ids

    def mask_stop_tokens(self, logits: Tensor) -> Tensor:
        """Return logits float32 [vocab] with -inf for the tokens that end an answer."""
        import torch

        ends = torch.tensor(sorted(self._stop_ids), device=logits.device)
        return logits.index_fill(0, ends, -torch.inf)

    @staticmethod
    def pause(slack: int) -> int:
        """Return how many tokens may be accepted before a plan that leaves `slack` tokens free is checked again.

        By n tokens the slack falls by at most BURST + n * GROWTH, so some plan fits as long as that is <= slack.
        """
        return max(0, (slack - BURST) // GROWTH)

    def plan(
        self, state: LLMatcher, limit: int, known: list[int] | None = None, thorough: bool = False
    ) -> list[int] | None:
        """Return at most `limit` tokens that complete the answer; None if none are found.

        Args:
            known: a plan for the state before; if it still completes the answer, nothing is searched.
            thorough: search beyond the greedy path where that is too long.
        """
        if limit < 0 or state.is_error():
            return None
        if state.is_accepting():
            return []
        if known and len(known) <= limit and self._completes(state, known):
            return known
        return self._search(state, limit, SEARCH_STEPS if thorough else 0)

    def _completes(self, state: LLMatcher, tokens: list[int]) -> bool:
        return state.validate_tokens([*tokens, next(iter(self._stop_ids))]) > len(tokens)

    def _search(self, start: LLMatcher, limit: int, steps: int) -> list[int] | None:
        """Search for a plan in the order of limited discrepancy search (Harvey and Ginsberg, 1995).

        The greedy path, which closes most at each step, is tried first. Then paths that deviate from it at one point,
        at two points, and so on; among those with equally many deviations, the earliest in the text first. `steps`
        bounds the tokens tried: 0 tries the greedy path alone.

        A path may have twice `limit` tokens, as the tokenizer often needs fewer for the same text (`_shortened`).
        """
        order = count()
        # Points at which to deviate: (deviations so far, tokens before, tie-breaker, tokens, state, the greedy token)
        points: list[tuple[int, int, int, list[int], LLMatcher, int]] = []
        branches, deviations = [(list[int](), start)], 0
        while True:
            for before, state in branches:
                path, completed = self._greedy_path(state, 2 * limit - len(before))
                if completed and (plan := self._shortened(start, before + path, limit)) is not None:
                    return plan
                state, steps = state.deep_copy(), steps - len(path)
                for token in path[:limit] if steps > 0 else ():
                    heapq.heappush(points, (deviations, len(before), next(order), before, state.deep_copy(), token))
                    state.consume_token(token)
                    before = [*before, token]
            if steps <= 0 or not points:
                return None
            deviations, _, _, before, state, token = heapq.heappop(points)
            others, tried = self._alternatives(state, token)
            branches, steps = [([*before, other], child) for other, child in others], steps - tried
            deviations += 1

    def _greedy_path(self, start: LLMatcher, limit: int) -> tuple[list[int], bool]:
        """Return the path of the preferred tokens, and whether it completes the answer within `limit` tokens."""
        state, path = start.deep_copy(), list[int]()
        while not state.is_accepting():
            tokens = state.compute_ff_tokens() or [self._preferred(state)]
            if len(path) + len(tokens) > limit or not state.consume_tokens(tokens):
                return path, False
            path += tokens
        return path, True

    def _shortened(self, start: LLMatcher, path: list[int], limit: int) -> list[int] | None:
        """Return `path` or, where it is too long, its text as the tokenizer encodes it; None if that does not fit."""
        if len(path) > limit:
            path = self._tokenizer.tokenize_bytes(self._tokenizer.decode_bytes(path))
        return path if len(path) <= limit and self._completes(start, path) else None

    def _preferred(self, state: LLMatcher) -> int:
        """Return the allowed token that comes first in the order of preference."""
        allowed = self._allowed(state)
        ranked = self._inside if self._in_string(allowed) else self._structure
        at = allowed[ranked].argmax() if len(ranked) else 0  # argmax of bools: the first allowed one, if any
        return int(ranked[at]) if len(ranked) and allowed[ranked[at]] else int(allowed.argmax())

    def _alternatives(self, state: LLMatcher, token: int) -> tuple[list[tuple[int, LLMatcher]], int]:
        """Return next tokens other than `token` with the states after them, and how many were tried.

        Tokens after which the same tokens are allowed count as one.
        """
        allowed = self._allowed(state)
        found: list[tuple[int, LLMatcher]] = []
        if allowed.sum() == 1 or self._in_string(allowed):  # ending the string is the greedy path, and none is shorter
            return found, 1
        taken = state.deep_copy()
        taken.consume_token(token)
        seen, tried = {taken.compute_bitmask()}, 0
        for other in self._choices:
            if not allowed[other] or other == token or len(found) == MAX_BRANCHES:
                continue
            child, tried = state.deep_copy(), tried + 1
            if child.consume_token(other) and (follow := child.compute_bitmask()) not in seen:
                seen.add(follow)
                found.append((other, child))
        return found, tried

    def _in_string(self, allowed: NDArray[np.bool_]) -> bool:
        """Return whether the next token is part of a string: nothing else allows both braces."""
        return len(self._braces) == 2 and bool(allowed[self._braces].all())

    def _allowed(self, state: LLMatcher) -> NDArray[np.bool_]:
        import numpy as np

        bits = np.frombuffer(state.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, count=self._size, bitorder="little").view(bool)


def _text(tokenizer: LLTokenizer, token: int) -> str:
    return "" if tokenizer.is_special_token(token) else tokenizer.decode_bytes([token]).decode("latin-1")


def _sorted(texts: list[str], pattern: str) -> list[int]:
    """Return the tokens that match all of `pattern`, the longest first."""
    fits = re.compile(pattern).fullmatch
    found = [index for index, text in enumerate(texts) if text and len(text) <= MAX_TOKEN_CHARACTERS and fits(text)]
    return sorted(found, key=lambda index: -len(texts[index]))


def _single(texts: list[str], characters: str) -> list[int]:
    """Return the tokens of single characters, in the order of `characters`."""
    where = {text: index for index, text in reversed(list(enumerate(texts))) if len(text) == 1}
    return [where[character] for character in characters if character in where]


def _array(tokens: list[int]) -> NDArray[np.int64]:
    import numpy as np

    return np.array(list(dict.fromkeys(tokens)), dtype=np.int64)
