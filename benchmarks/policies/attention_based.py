"""Policies that rank tokens by the attention they get."""

from __future__ import annotations

from torch import Tensor

from benchmarks.policies.base import ScoredWhenFull, attention_mass
from zsmerge_llm.kvcache.equations import max_pool, retention_rank
from zsmerge_llm.kvcache.layer_cache import KVView
from zsmerge_llm.kvcache.policies.cumulative_attention import CumulativeAttention
from zsmerge_llm.kvcache.slots import AttentionInputs


class SnapKV(ScoredWhenFull):
    """arXiv 2404.14469: rank by the attention of the chunk's newest 32 queries, pooled over 7 neighbours."""

    name = "snapkv"

    def scores(self, view: KVView, inputs: AttentionInputs) -> Tensor:
        mean, _ = attention_mass(view, inputs, inputs.queries[:, :, -32:], inputs.positions[:, -32:])
        return max_pool(mean, 7)


class TOVA(ScoredWhenFull):
    """arXiv 2401.06104: rank by the attention of the newest query, averaged over all heads of the layer."""

    name = "tova"

    def scores(self, view: KVView, inputs: AttentionInputs) -> Tensor:
        mean, _ = attention_mass(view, inputs, inputs.queries[:, :, -1:], inputs.positions[:, -1:])
        return mean.mean(1, keepdim=True).expand_as(view.score)


class CaM(CumulativeAttention):
    """As Cache Merging (ICML 2024): keep heavy hitters, and add each evicted value to the kept tokens behind it.

    A value is divided over the next 8 kept tokens, in proportion to its score against theirs: the expectation instead
    of a Bernoulli draw.
    """

    name = "cam"
    NEXT = 8

    def observe(self, view: KVView, inputs: AttentionInputs) -> None:
        """Add the attention to the scores; where a row is compressed next, merge the values that it will evict."""
        super().observe(view, inputs)
        if not any(view.layer.rows_due(inputs)):
            return
        config, score = view.config, view.score
        ranking = retention_rank(score, view.multiplicity, view.position, inputs.seen, config.sink, config.recent)
        kept = ranking >= ranking.topk(config.slots or 0, dim=-1).values[..., -1:]
        shares = self._shares(score, kept)
        view.values.add_((shares.mT @ view.values.float()).to(view.values.dtype))

    def _shares(self, score: Tensor, kept: Tensor) -> Tensor:
        """Return what part of each slot's value each other one gets: float32 [B, H, C, C]."""
        rank = kept.cumsum(-1)  # kept slots up to here
        gap = rank[..., None, :] - rank[..., :, None]
        near = kept[..., None, :] & ~kept[..., :, None] & (gap > 0) & (gap <= self.NEXT)
        score = score.clamp(min=0)
        around = (near * score[..., None, :]).sum(-1) / near.sum(-1).clamp(min=1)
        probability = (score / around.clamp(min=1e-9)).clamp(max=1)
        return near * (probability / near.sum(-1).clamp(min=1))[..., None]


def pyramid(slots: int, layers: int) -> list[int]:
    """Return PyramidKV's slots by layer (arXiv 2406.02069), under the total of `slots` each.

    Linear, from nearly twice the mean at the first layer to a twentieth (at least 96) at the last.
    """
    least = min(slots, max(96, slots // 20))
    step = 2 * (slots - least) / max(layers - 1, 1)
    budgets = [round(2 * slots - least - step * layer) for layer in range(layers)]
    budgets[0] += slots * layers - sum(budgets)
    return budgets
