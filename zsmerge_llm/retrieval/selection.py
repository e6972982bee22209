"""Which passages are read again, and how many tokens of them: by how much is lost, and by how sure the search is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Literal

from zsmerge_llm.retrieval.passages import MIN_WORDS, PASSAGE_WORDS, Passage

RetrievalTokens = int | Literal["auto"]
"""How many tokens are read again at most; 0: none. "auto": `token_limit` says it for each turn."""
FIXED_TOKENS = 256
"""Tokens that are read again at most where a text is hardly longer than its cache."""
PINNED_SHARE = 0.75
"""Share of the slots that holds what a turn reads, and the question behind it (`CacheConfig.recent_share`)."""
QUESTION_TOKENS = 128
"""Tokens of that share for the question."""
FULL_OVERFLOW = 20.0
"""How many times its slots a text is long where nothing but passages and the newest tokens is worth a slot."""
TOKENS_PER_WORD, LEAST_TOKENS_PER_WORD = 4, 3
"""Tokens of the budget for each word of a passage; the second where its passages are shorter than `ENOUGH_WORDS`."""
ENOUGH_WORDS = 64
"""Words of a passage that most answers stand in, together with what is asked for."""
USUAL_TOKENS_PER_WORD = 2.5
"""Tokens of a word up to which the sizes above hold."""
SIZE_STEP = 16
"""Words by which sizes of passages differ."""
MAX_TOO_LONG = 4
"""Best passages that are looked at for one that has room: what a turn costs must not grow with the conversation."""


def token_limit(setting: RetrievalTokens, length: int, slots: int) -> int:
    """Return how many tokens are read again at most before a question about a text of `length` tokens.

    The share of the text that its cache holds is slots / length. So what a slot of older tokens is worth falls with the
    length, and what a passage found by search is worth does not.
    """
    if setting != "auto":
        return min(setting, slots // 2)
    least = min(FIXED_TOKENS, slots // 2)
    most = max(least, pinned_tokens(slots))
    lost = math.log(max(length, slots) / slots) / math.log(FULL_OVERFLOW)
    return round(least + (most - least) * min(1.0, lost))


def pinned_tokens(slots: int) -> int:
    """Return how many tokens of a turn stay whole while it is read, beside its question."""
    return max(0, round(PINNED_SHARE * slots) - QUESTION_TOKENS)


def passage_words(max_tokens: int, tokens_per_word: float = 1.0) -> int:
    """Return the words of a passage where so many tokens are read again: one has to fit in whole.

    Sizes are few, for each needs an index of its own.

    tokens_per_word: of the text: English has 1.3, and scripts that a tokenizer was hardly trained on 5 and more.
    """
    max_tokens = round(max_tokens / max(1.0, tokens_per_word / USUAL_TOKENS_PER_WORD))
    words = max(max_tokens // TOKENS_PER_WORD, min(ENOUGH_WORDS, max_tokens // LEAST_TOKENS_PER_WORD))
    words = min(PASSAGE_WORDS, words)
    return max(MIN_WORDS, words // SIZE_STEP * SIZE_STEP)


def merge(rankings: Sequence[Sequence[int]]) -> list[int]:
    """Return the numbers of the passages of several rankings by turns."""
    return list(dict.fromkeys(number for turn in zip_longest(*rankings) for number in turn if number is not None))


def choose(ranked: Iterable[int], cost: Callable[[int], int], max_tokens: int) -> list[int]:
    """Return the first of the passages that cost `max_tokens` together, in the text's order.

    There is none where the best `MAX_TOO_LONG` cost more each. cost: tokens of a passage.
    """
    chosen: list[int] = []
    for tried, number in enumerate(ranked, start=1):
        if (size := cost(number)) <= max_tokens:
            chosen.append(number)
            max_tokens -= size
        elif chosen or tried == MAX_TOO_LONG:
            break
    return sorted(chosen)


def with_replies(
    found: Mapping[int, Passage], reply: Callable[[int], str], cost: Callable[[Passage], int], max_tokens: int
) -> dict[int, Passage]:
    """Return passages with the line of a dialogue that follows each, as far as `max_tokens` has room: it may answer.

    reply: the line that follows a passage; "" for none.
    """
    longer, left = dict(found), max_tokens - sum(map(cost, found.values()))
    for number, passage in found.items():
        if number + 1 not in found and (line := reply(number)):
            whole = replace(passage, text=f"{passage.text}\n{line}")
            if (more := cost(whole) - cost(passage)) <= left:
                longer[number], left = whole, left - more
    return longer


def with_context(passages: Sequence[Passage]) -> list[str]:
    """Return the texts of passages in order, each below the headings that no passage before it has shown."""
    texts: list[str] = []
    before = Passage("")
    for passage in passages:
        shown = f"{before.context}\n{before.text}".split("\n")
        new = (line for line in passage.context.split("\n") if line and line not in shown)
        texts.append("\n".join([*new, passage.text]))
        before = passage
    return texts
