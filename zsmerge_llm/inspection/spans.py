"""The text of a session cut into what a page shows: turns, runs of equally well kept tokens, and passages.

All text comes from outside and may hold anything; here it is only cut, never interpreted.
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
"""Shades above 0: 0 is held by no head, `LEVELS` by every one."""
MARKER, PENDING = "m", "p"
"""Styles of runs that have no shade: control tokens and role names; tokens that are not in the cache yet."""
BLOCK = 300
"""Tokens after which a block ends at the next line break: a browser lays out what is in view, block by block."""
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "inst": "user", "end_inst": "assistant",
    "assistant": "assistant", "model": "assistant", "ai": "assistant", "tool": "tool", "ipython": "tool",
    "observation": "tool",
}  # fmt: skip
"""What templates call the speakers."""
LONGEST_ROLE = max(map(len, ROLES))
SENTENCE_END = re.compile(r"[.!?]+[\"')\]\u201d\u2019]*\s+|[\u3002\uff01\uff1f]+\s*|\n\s*")
SHORTEST, LONGEST = 6, 60
"""Tokens of a passage."""
UNSEEN = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD),
}
"""Characters a page cannot hold as they are, or that would turn the order of others: shown by a sign."""


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens in one style: "s0" to "s7", MARKER or PENDING."""

    style: str
    text: str


@dataclass
class Block:
    """A piece of the text. start: its first token. role: who speaks, where a turn begins here."""

    start: int
    role: str = ""
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True)
class Passage:
    """A sentence or so. start, end: its tokens. share: of (layer, head) pairs that hold them, mean, 0 to 1."""

    start: int
    end: int
    text: str
    share: float


@dataclass(frozen=True)
class Words:
    """The tokens' text, and which of them are control tokens or name a role. roles: where turns begin, and whose."""

    pieces: list[str]
    marker: list[bool]
    roles: dict[int, str]


def words(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> Words:
    """Every token's text. Of a character that takes several tokens, the last one has it and the others have none."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    stream = Detokenizer(tokenizer, skip_special_tokens=False)
    pieces = [stream.push(token).translate(UNSEEN) for token in tokens]
    pieces[-1] += stream.finish().translate(UNSEEN)
    marker = [token in special for token in tokens]
    roles: dict[int, str] = {}
    for at in [at for at, is_special in enumerate(marker) if is_special]:
        role, end = _role(pieces, marker, at)
        if role:
            roles[at] = role
            marker[at:end] = [True] * (end - at)
    return Words(pieces, marker, roles)


def levels(share: np.ndarray) -> np.ndarray:
    """float [T], 0 to 1 → int [T], 0 to LEVELS; 0 and LEVELS mean none and all, and nothing else."""
    between = 1 + np.floor(share * (LEVELS - 1)).clip(0, LEVELS - 2)
    return np.where(share <= 0, 0, np.where(share >= 1, LEVELS, between)).astype(int)


def styles(found: MemoryMap, text: Words) -> list[str]:
    """How each token looks."""
    shades = [f"s{level}" for level in levels(found.share.numpy())] + [PENDING] * (len(found.tokens) - found.seen)
    return [MARKER if marked else shade for marked, shade in zip(text.marker, shades, strict=True)]


def blocks(text: Words, looks: Sequence[str]) -> list[Block]:
    """The whole text in order. A new block begins with each turn, and at a line break once a block is long."""
    starts = [0]
    for at in range(1, len(looks)):
        ended = at - starts[-1] >= BLOCK and text.pieces[at - 1].endswith("\n")
        if at in text.roles or ended:
            starts.append(at)
    ends = [*starts[1:], len(looks)]
    return [
        Block(start, text.roles.get(start, ""), _runs(text.pieces[start:end], looks[start:end]))
        for start, end in zip(starts, ends, strict=True)
    ]


def passages(found: MemoryMap, text: Words) -> list[Passage]:
    """The text the cache has read, sentence by sentence; control tokens are left out."""
    share, result = found.share.numpy(), []
    for first, last in _sentences(text, found.seen):
        inked = [at for at in range(first, last) if text.pieces[at].strip()]
        said = " ".join("".join(text.pieces[first:last]).split())
        if re.search(r"\w", said):
            start, end = inked[0], inked[-1] + 1
            result.append(Passage(start, end, said, float(share[start:end].mean())))
    return result


def worst(every: Sequence[Passage], count: int) -> list[Passage]:
    """The passages least is left of; of equals the longest."""
    return sorted(every, key=lambda each: (round(each.share, 3), each.start - each.end))[:count]


def best(every: Sequence[Passage], count: int, found: MemoryMap) -> list[Passage]:
    """The passages most is left of, without the first and the newest tokens, as far as all of these are held."""
    end = found.seen - found.newest
    chosen = [each for each in every if each.start >= found.sink and each.end <= end]
    return sorted(chosen, key=lambda each: (-each.share, each.start - each.end))[:count]


def _runs(pieces: Sequence[str], looks: Sequence[str]) -> list[Run]:
    grouped = groupby(zip(looks, pieces, strict=True), key=lambda pair: pair[0])
    return [Run(look, "".join(piece for _, piece in group)) for look, group in grouped]


def _role(pieces: Sequence[str], marker: Sequence[bool], at: int) -> tuple[str, int]:
    """Whose turn a control token opens, and the first token behind role and token; ("", at) where it opens none."""
    name = pieces[at].strip().replace("[/", "end_").strip("<>|\uff5c[]").lower()
    if name in ROLES:
        return ROLES[name], at + 1
    said = ""
    for end in range(at + 1, len(pieces)):
        if marker[end] or "\n" in pieces[end] or len(said) > LONGEST_ROLE:
            role = ROLES.get(said.strip().lower(), "")
            return role, end if role else at
        said += pieces[end]
    return "", at


def _sentences(text: Words, seen: int) -> list[tuple[int, int]]:
    """Token spans of sentences; short ones join the next, long ones are cut."""
    spans: list[tuple[int, int]] = []
    for marked, group in groupby(range(seen), key=lambda at: text.marker[at]):
        if not marked:
            tokens = list(group)
            spans += _cut(text.pieces, tokens[0], tokens[-1] + 1)
    return spans


def _cut(pieces: Sequence[str], start: int, end: int) -> list[tuple[int, int]]:
    """Token spans of the sentences in a stretch without control tokens."""
    ends = np.cumsum([len(piece) for piece in pieces[start:end]])
    stops = [found.end() for found in SENTENCE_END.finditer("".join(pieces[start:end]))]
    spans, begin = [], start
    # A token goes with the sentence that its last character is in.
    for stop in sorted({start + int(np.searchsorted(ends, stop, side="right")) for stop in stops} | {end}):
        while stop - begin > LONGEST:
            spans.append((begin, begin + LONGEST))
            begin += LONGEST
        if stop - begin >= SHORTEST or (stop == end and stop > begin):
            spans.append((begin, stop))
            begin = stop
    return spans
