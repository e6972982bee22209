"""Policies that rank tokens by the attention they get."""

from __future__ import annotations

from torch import Tensor

from benchmarks.policies.base import PolicyLayer, RankedLayer
from zsmerge_llm.kvcache import policy
from zsmerge_llm.kvcache.view import AttentionInputs, KVView


class SnapKV(RankedLayer):
    """arXiv 2404.14469: what the newest 32 queries of the chunk attend to, pooled over 7 neighbours."""

    def rank(self, held: KVView, arrival: AttentionInputs) -> Tensor:
        asking = arrival.position[:, -32:]
        paid = self.paid_by(held, arrival.queries[:, :, -32:], asking, arrival.sinks)
        return policy.pooled(policy.mean_paid(paid, asking >= 0), 7)


class TOVA(RankedLayer):
    """arXiv 2401.06104: what the newest query attends to, the mean over all heads of the layer."""

    def rank(self, held: KVView, arrival: AttentionInputs) -> Tensor:
        paid = self.paid_by(held, arrival.queries[:, :, -1:], arrival.position[:, -1:], arrival.sinks)
        return paid.mean(dim=(1, 2, 3))[:, None].expand_as(held.score)


class CaM(PolicyLayer):
    """As Cache Merging (ICML 2024): heavy hitters stay, and each evicted value is shared out over the next tokens
    kept behind it, in proportion to its score against theirs. The expectation instead of a Bernoulli draw."""

    NEXT = 8

    def _compress(
        self, held: KVView, full: list[bool], seen: Tensor, passages: Tensor | None = None, fresh: int = 0
    ) -> None:
        slots = self.config.slots
        assert slots is not None
        ranking = policy.priority(held.score, held.count, held.position, seen, self.config.sink, self.config.recent)
        kept = ranking >= ranking.topk(slots, dim=-1).values[..., -1:]
        share = self._shares(held, kept)
        held.values.add_((share.mT @ held.values.float()).to(held.values.dtype))
        super()._compress(held, full, seen, passages, fresh)

    def _shares(self, held: KVView, kept: Tensor) -> Tensor:
        """float32 [B, H, C, C]: what each slot gives to each other one."""
        rank = kept.cumsum(-1)  # kept slots up to here
        gap = rank[..., None, :] - rank[..., :, None]
        near = kept[..., None, :] & ~kept[..., :, None] & (gap > 0) & (gap <= self.NEXT)
        score = held.score.clamp(min=0)
        around = (near * score[..., None, :]).sum(-1) / near.sum(-1).clamp(min=1)
        probability = (score / around.clamp(min=1e-9)).clamp(max=1)
        return near * (probability / near.sum(-1).clamp(min=1))[..., None]


def pyramid(slots: int, layers: int) -> list[int]:
    """PyramidKV (arXiv 2406.02069): linear from nearly twice the mean at the first layer to a twentieth (at least 96)
    at the last, under the same total."""
    least = min(slots, max(96, slots // 20))
    step = 2 * (slots - least) / max(layers - 1, 1)
    budgets = [round(2 * slots - least - step * layer) for layer in range(layers)]
    budgets[0] += slots * layers - sum(budgets)
    return budgets
