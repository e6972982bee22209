"""What a question's words do not find, the cache finds: a glance at where the question's attention goes.

Of a passage that was mostly dropped a few slots are left, and each of them knows what stood around it. A question in
other words than the text's still looks at these. So the cache is an index by meaning, of its own constant size: it says
where to read again, and the text says what stands there word for word.
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
from zsmerge_llm.retrieval.passage_search import END
from zsmerge_llm.retrieval.query_probe import GENERIC, chat_probe, message_probe

Looks = list[Tensor]
"""float32 [H, C] of each full-attention layer: what a question pays each slot (`Engine.look`)."""
WIDTH = 33
"""Tokens over which votes are averaged: what is looked at is a phrase, and slots are few."""
PLACE = 64
"""Tokens of a place that is read again, before it is made to begin and end with a sentence."""
OWN = 0.28
"""How much of what a question looks at has to be its own, and not what any question looks at. Questions have more; two
of three greetings, thanks and requests for a poem have less (benchmarks/LOG.md)."""


@dataclass(frozen=True)
class AttentionSearch:
    """Finds what a question asks for by what the model looks at. look: `Engine.look`."""

    look: Callable[[Cache, Sequence[int]], Looks]
    template: ChatTemplate

    def passages(self, cache: Cache, tokens: Sequence[int], asked: str, most: int) -> list[str]:
        """Places of a text that a question looks at, of `most` tokens together, in the text's order.

        Args:
            cache: of one row, that has read the text, `tokens`, and perhaps more behind it.
        """
        own = self.look(cache, message_probe(self.template, asked))
        any_question = self.look(cache, chat_probe(self.template, GENERIC))
        voted = votes(cache, own, any_question, len(tokens))
        found: dict[int, str] = {}
        for at in places(voted) if voted is not None else ():
            text = self._around(tokens, at)
            most -= len(self.template.encode(text + "\n\n"))
            if most < 0:
                break
            found[at] = text
        return [found[at] for at in sorted(found)]

    def _around(self, tokens: Sequence[int], at: int) -> str:
        """The text around a token, from the beginning of a sentence to the end of one where these are near."""
        reach = PLACE * 3 // 4
        before, behind = list(tokens[max(0, at - reach) : at]), list(tokens[at : at + reach])
        special = set(self.template.tokenizer.all_special_ids)
        before = before[max((n + 1 for n, token in enumerate(before) if token in special), default=0) :]
        behind = behind[: next((n for n, token in enumerate(behind) if token in special), len(behind))]
        first, second = (str(self.template.tokenizer.decode(part)) for part in (before, behind))
        starts = [each.end() for each in re.finditer(END, first) if each.end() <= len(first) // 2]
        ends = [each.end() for each in re.finditer(END, second) if each.end() >= len(second) // 2]
        return (first[starts[-1] if starts else 0 :] + second[: ends[0] if ends else None]).strip("\ufffd \n")


def votes(cache: Cache, own: Looks, any_question: Looks, length: int) -> Tensor | None:
    """float32 [length]: how much more each token is looked at than by any question; None where that is little of all.

    Layers count by the square of their slots, as where passages are voted for (`attention.VotingPass`).
    """
    total, raw = torch.zeros(length), 0.0
    full = [layer for layer in cache.layers if layer.spec.window is None]
    for layer, paid, anyway in zip(full, own, any_question, strict=True):
        position = layer.position[0, :, : paid.shape[1]]
        counts = (layer.multiplicity[0, :, : paid.shape[1]] > 0) & (position >= layer.config.sink) & (position < length)
        weight = counts * float(layer.config.slots or 1) ** 2
        more = (paid - anyway).clamp(min=0) * weight
        total.index_add_(0, position.clamp(0, length - 1).flatten().cpu(), more.flatten().cpu())
        raw += float((paid * weight).sum())
    if not raw or float(total.sum()) < OWN * raw:
        return None
    return equations.smooth_votes(total, WIDTH)


def places(voted: Tensor) -> Iterator[int]:
    """Tokens that got most votes, the highest first, each `PLACE` tokens from the others."""
    left = voted.clone()
    while float(left.max()) > 0:
        at = int(left.argmax())
        yield at
        left[max(0, at - PLACE) : at + PLACE] = 0
