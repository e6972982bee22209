"""Attention search: where a question's words find nothing, its attention over the cache finds passages of a document.

Of a passage that was mostly evicted a few slots are left, and each of them carries what stood around it. A question in
other words than the text's still attends to them. So the cache is an index by meaning, of constant size: it says where
to read again, and the text says what stands there word for word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zsmerge_llm.kvcache import equations
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.language.chat_template import ChatTemplate
from zsmerge_llm.retrieval.passages import SENTENCE_END
from zsmerge_llm.retrieval.query_probe import GENERIC_QUESTION, chat_probe, message_probe

MaxAttention = list[Tensor]
"""float32 [H, C] of each full-attention layer: the most that a query pays each slot (`Engine.query_attention`)."""
SMOOTHING = 33
"""Tokens over which attention is averaged: a phrase is attended to, and few of its slots are left."""
EXCERPT_TOKENS = 64
"""Tokens of an excerpt, before it is extended or cut to whole sentences."""
MIN_SPECIFIC = 0.28
"""Least share of a question's attention that must be its own, and not what any question attends to. Questions have
more; two of three greetings, thanks and requests for a poem have less (docs/research/retrieval)."""


@dataclass(frozen=True)
class AttentionSearch:
    """Finds passages of a document by the model's attention.

    max_attention: `Engine.look`.
    """

    max_attention: Callable[[Cache, Sequence[int]], MaxAttention]
    template: ChatTemplate

    def search(self, cache: Cache, tokens: Sequence[int], question: str, max_tokens: int) -> list[str]:
        """Return excerpts of a text that a question attends to, at most `max_tokens` together, in the text's order.

        Args:
            cache: of one row, that has read the text, `tokens`, and perhaps more behind it.
        """
        specific = self.max_attention(cache, message_probe(self.template, question))
        generic = self.max_attention(cache, chat_probe(self.template, GENERIC_QUESTION))
        scores = score_tokens(cache, specific, generic, len(tokens))
        found: dict[int, str] = {}
        for center in peaks(scores) if scores is not None else ():
            text = self._excerpt(tokens, center)
            max_tokens -= len(self.template.encode_text(text + "\n\n"))
            if max_tokens < 0:
                break
            found[center] = text
        return [found[center] for center in sorted(found)]

    def _excerpt(self, tokens: Sequence[int], center: int) -> str:
        """Return the text around a token: whole sentences, where their ends are near."""
        reach = EXCERPT_TOKENS * 3 // 4
        before, behind = list(tokens[max(0, center - reach) : center]), list(tokens[center : center + reach])
        special = set(self.template.tokenizer.all_special_ids)
        before = before[max((n + 1 for n, token in enumerate(before) if token in special), default=0) :]
        behind = behind[: next((n for n, token in enumerate(behind) if token in special), len(behind))]
        first, second = (str(self.template.tokenizer.decode(part)) for part in (before, behind))
        starts = [each.end() for each in re.finditer(SENTENCE_END, first) if each.end() <= len(first) // 2]
        ends = [each.end() for each in re.finditer(SENTENCE_END, second) if each.end() >= len(second) // 2]
        return (first[starts[-1] if starts else 0 :] + second[: ends[0] if ends else None]).strip("\ufffd \n")


def score_tokens(cache: Cache, specific: MaxAttention, generic: MaxAttention, length: int) -> Tensor | None:
    """Return float32 [length]: how much more attention each token gets from a question than from any question.

    None where that is too little of the whole (`MIN_SPECIFIC`). Layers count by the square of their slots, as where
    passages are voted for (`attention.VotingPass`).
    """
    total, attention = torch.zeros(length), 0.0
    full = [layer for layer in cache.layers if layer.spec.window is None]
    for layer, own, common in zip(full, specific, generic, strict=True):
        position = layer.position[0, :, : own.shape[1]]
        filled = layer.multiplicity[0, :, : own.shape[1]] > 0
        weight = (filled & (position >= layer.config.sink) & (position < length)) * float(layer.config.slots or 1) ** 2
        more = (own - common).clamp(min=0) * weight
        total.index_add_(0, position.clamp(0, length - 1).flatten().cpu(), more.flatten().cpu())
        attention += float((own * weight).sum())
    if not attention or float(total.sum()) < MIN_SPECIFIC * attention:
        return None
    return equations.smooth_votes(total, SMOOTHING)


def peaks(scores: Tensor) -> Iterator[int]:
    """Yield the tokens of highest score, the highest first, each `EXCERPT_TOKENS` from the others."""
    left = scores.clone()
    while float(left.max()) > 0:
        highest = int(left.argmax())
        yield highest
        left[max(0, highest - EXCERPT_TOKENS) : highest + EXCERPT_TOKENS] = 0
