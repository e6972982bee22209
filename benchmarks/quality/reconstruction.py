"""A rival that needs the full cache first: keep what the model attends to when it repeats the whole text.

After KVzip (arXiv 2505.23416), with the same number of slots in every head: a token counts by the most attention that
it gets while the text is repeated, chunk by chunk, behind a request to do so.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.policies.base import Policy, ScoredWhenFull, plain
from benchmarks.quality.evaluator import Budget, Evaluator, prefill_bytes, row
from benchmarks.quality.tasks import Item
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.layer_cache import KVView, LayerCache
from zsmerge_llm.kvcache.slots import AttentionInputs
from zsmerge_llm.retrieval.query_probe import chat_probe

REQUEST = "Repeat the text above word for word."
CHUNK = 512


class GivenScores(ScoredWhenFull):
    """Rank the tokens of a text by scores that are known, float32 [H, T] of each layer, by their positions."""

    name = "given-scores"

    def __init__(self, given: list[Tensor]) -> None:
        self.given = given
        self.layers: list[LayerCache] = []

    def scores(self, view: KVView, inputs: AttentionInputs) -> Tensor:
        """Return the scores of the slots' tokens; those of a copy, which has read the text before, as they are."""
        known = [index for index, layer in enumerate(self.layers) if layer is view.layer]
        if not known:
            return view.score
        given = self.given[known[0]]
        return given[None].gather(2, view.position.long().clamp(0, given.shape[-1] - 1))


@dataclass
class Reconstruction:
    """Read the text into a full cache, repeat it, then keep the best slots of each head."""

    evaluator: Evaluator
    name: str = "reconstruction"

    def unknown(self, budget: Budget, item: Item) -> Iterator[dict[str, Any]]:
        """Read an item before its questions are known, then ask each of the same cache."""
        started, evaluator = time.perf_counter(), self.evaluator
        ids = [token for part, _ in item.parts for token in part]
        ranking = GivenScores(self.attention_while_repeating(ids))
        policy = Policy(self.name, plain, lambda _: ranking, chunk=None)
        cache = evaluator.new_cache(policy, budget, item.tokens)
        ranking.layers = cache.layers
        evaluator.read(cache, policy, ids, [])
        facts = {
            "slots": cache.slots,
            "cache_bytes": cache.nbytes,
            "reading_bytes": prefill_bytes(policy, cache, CHUNK),
            "seconds": round(time.perf_counter() - started, 2),
            "tokens_read": cache.lengths[0],
        }
        scores = evaluator.scores(policy, budget, item, cache, item.questions)
        for asked, score in zip(item.questions, scores, strict=True):
            yield row(asked, score, facts)

    def attention_while_repeating(self, ids: list[int]) -> list[Tensor]:
        """Return for each layer the most attention that each token gets, float32 [H, T]."""
        engine, template = self.evaluator.engine, self.evaluator.template
        cache: Cache = engine.new_cache(CacheConfig.full())
        engine.chunk = CHUNK
        engine.read(cache, ids)
        request = [*template.encode("\n\n"), *chat_probe(template, REQUEST)]
        found: list[Tensor] = []
        for start in range(0, len(ids), CHUNK):
            attention = engine.query_attention(cache, [*request, *ids[start : start + CHUNK]])
            attention = [each[:, : len(ids)] for each in attention]
            found = list(map(torch.maximum, found, attention)) if found else attention
        return found
