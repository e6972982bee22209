"""Splits the text of a session into what a page shows: turns, runs of equally shaded tokens, and passages.

The text comes from outside and may hold anything. It is only split here, never interpreted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from zsmerge_llm.engine.detokenizer import Detokenizer
from zsmerge_llm.inspection.memory_map import MemoryMap

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEVELS = 7
"""Highest shade, for tokens that every head holds. Shade 0: no head holds them."""
MARKER, PENDING = "m", "p"
"""Styles without a shade: control tokens and role names; tokens that are not in the cache yet."""
BLOCK_TOKENS = 300
"""Tokens after which a block ends at the next line break: a browser lays out visible blocks only."""
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "inst": "user", "end_inst": "assistant",
    "assistant": "assistant", "model": "assistant", "ai": "assistant", "tool": "tool", "ipython": "tool",
    "observation": "tool",
}  # fmt: skip
"""Role names of chat templates."""
MAX_ROLE_LENGTH = max(map(len, ROLES))
SENTENCE_END = re.compile(r"[.!?]+[\"')\]\u201d\u2019]*\s+|[\u3002\uff01\uff1f]+\s*|\n\s*")
MIN_PASSAGE, MAX_PASSAGE = 6, 60
"""Length of a passage in tokens."""
VISIBLE_SIGNS = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD),
}
"""Signs for control characters, which HTML cannot hold, and for characters that change the direction of text."""


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of one style: "s0" to "s7", MARKER or PENDING."""

    style: str
    text: str


@dataclass
class Block:
    """A part of the text. `start`: its first token. `role`: of the turn that begins here, or ""."""

    start: int
    role: str = ""
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True)
class Passage:
    """About a sentence: tokens `start` to `end`, its text, and the mean share of heads that hold its tokens, 0 to 1."""

    start: int
    end: int
    text: str
    share: float


@dataclass(frozen=True)
class TokenTexts:
    """The text of each token; whether it is a control token or names a role; the role of each turn by first token."""

    texts: list[str]
    is_marker: list[bool]
    roles: dict[int, str]


def decode_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> TokenTexts:
    """Decode each token. The last token of a character that takes several has its text, the others have none."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
    texts = [detokenizer.push(token).translate(VISIBLE_SIGNS) for token in tokens]
    texts[-1] += detokenizer.finish().translate(VISIBLE_SIGNS)
    is_marker = [token in special for token in tokens]
    roles: dict[int, str] = {}
    for index in [index for index, is_special in enumerate(is_marker) if is_special]:
        role, end = _opened_role(texts, is_marker, index)
        if role:
            roles[index] = role
            is_marker[index:end] = [True] * (end - index)
    return TokenTexts(texts, is_marker, roles)


def shade_levels(share: np.ndarray) -> np.ndarray:
    """Convert shares, float [T] from 0 to 1, to shades, int [T]. Only share 0 is shade 0, only share 1 is LEVELS."""
    between = 1 + np.floor(share * (LEVELS - 1)).clip(0, LEVELS - 2)
    return np.where(share <= 0, 0, np.where(share >= 1, LEVELS, between)).astype(int)


def token_styles(memory: MemoryMap, tokens: TokenTexts) -> list[str]:
    """Return the style of each token."""
    shades = [f"s{level}" for level in shade_levels(memory.verbatim_share.numpy())]
    shades += [PENDING] * (len(memory.tokens) - memory.seen)
    return [MARKER if is_marker else shade for is_marker, shade in zip(tokens.is_marker, shades, strict=True)]


def split_blocks(tokens: TokenTexts, styles: Sequence[str]) -> list[Block]:
    """Return the whole text in blocks. One begins with each turn, and at a line break once a block is long."""
    starts = [0]
    for index in range(1, len(styles)):
        is_full = index - starts[-1] >= BLOCK_TOKENS and tokens.texts[index - 1].endswith("\n")
        if index in tokens.roles or is_full:
            starts.append(index)
    ends = [*starts[1:], len(styles)]
    return [
        Block(start, tokens.roles.get(start, ""), _runs(tokens.texts[start:end], styles[start:end]))
        for start, end in zip(starts, ends, strict=True)
    ]


def split_passages(memory: MemoryMap, tokens: TokenTexts) -> list[Passage]:
    """Return the sentences that the cache has read, without control tokens."""
    share, passages = memory.verbatim_share.numpy(), []
    for first, last in _sentence_spans(tokens, memory.seen):
        printed = [index for index in range(first, last) if tokens.texts[index].strip()]
        text = " ".join("".join(tokens.texts[first:last]).split())
        if re.search(r"\w", text):
            start, end = printed[0], printed[-1] + 1
            passages.append(Passage(start, end, text, float(share[start:end].mean())))
    return passages


def least_held(passages: Sequence[Passage], count: int) -> list[Passage]:
    """Return the passages that the fewest heads hold; of equals the longest."""
    return sorted(passages, key=lambda each: (round(each.share, 3), each.start - each.end))[:count]


def most_held(passages: Sequence[Passage], count: int, memory: MemoryMap) -> list[Passage]:
    """Return the passages that the most heads hold, without the sinks and the newest tokens, which every head holds."""
    end = memory.seen - memory.num_newest
    between = [each for each in passages if each.start >= memory.num_sinks and each.end <= end]
    return sorted(between, key=lambda each: (-each.share, each.start - each.end))[:count]


def _runs(texts: Sequence[str], styles: Sequence[str]) -> list[Run]:
    grouped = groupby(zip(styles, texts, strict=True), key=lambda pair: pair[0])
    return [Run(style, "".join(text for _, text in group)) for style, group in grouped]


def _opened_role(texts: Sequence[str], is_marker: Sequence[bool], index: int) -> tuple[str, int]:
    """Return the role of the turn that a control token opens, and the first token after the role's name.

    ("", index) for a control token that opens no turn.
    """
    name = texts[index].strip().replace("[/", "end_").strip("<>|\uff5c[]").lower()
    if name in ROLES:
        return ROLES[name], index + 1
    after = ""
    for end in range(index + 1, len(texts)):
        if is_marker[end] or "\n" in texts[end] or len(after) > MAX_ROLE_LENGTH:
            role = ROLES.get(after.strip().lower(), "")
            return role, end if role else index
        after += texts[end]
    return "", index


def _sentence_spans(tokens: TokenTexts, seen: int) -> list[tuple[int, int]]:
    """Return token spans of sentences; a short one is joined to the next, a long one is cut."""
    spans: list[tuple[int, int]] = []
    for is_marker, group in groupby(range(seen), key=lambda index: tokens.is_marker[index]):
        if not is_marker:
            indices = list(group)
            spans += _split_sentences(tokens.texts, indices[0], indices[-1] + 1)
    return spans


def _split_sentences(texts: Sequence[str], start: int, end: int) -> list[tuple[int, int]]:
    """Return the sentence spans of tokens `start` to `end`, none of which is a control token."""
    ends = np.cumsum([len(text) for text in texts[start:end]])
    stops = [match.end() for match in SENTENCE_END.finditer("".join(texts[start:end]))]
    spans, begin = [], start
    # A token belongs to the sentence that its last character is in.
    for stop in sorted({start + int(np.searchsorted(ends, stop, side="right")) for stop in stops} | {end}):
        while stop - begin > MAX_PASSAGE:
            spans.append((begin, begin + MAX_PASSAGE))
            begin += MAX_PASSAGE
        if stop - begin >= MIN_PASSAGE or (stop == end and stop > begin):
            spans.append((begin, stop))
            begin = stop
    return spans
