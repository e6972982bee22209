"""Merging by a fit: do slots that stand for evicted tokens as well as a least-squares fit can make them pay?"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.policies.ours import ValuedMean
from zsmerge_llm.kvcache import policy
from zsmerge_llm.kvcache.view import AttentionInputs, KVView


class Fitted(ValuedMean):
    """`ValuedMean`, where the `REFIT` lowest-ranking of the kept slots also stand for what is evicted, as attention
    matching does: their keys stay, their mass (count, with α = 1) takes on that of the evicted tokens by non-negative
    least squares, and their values change so that attention puts out what it did before (ridge regression).

    The fit is on the probe's queries and on `TYPICAL` of the chunk's, turned to its end.
    """

    REFIT = 64
    TYPICAL = 64
    ROUNDS = 60
    RIDGE = 0.01

    def _observe(self, held: KVView, arrival: AttentionInputs) -> None:
        super()._observe(held, arrival)
        if any(self.fills_up(arrival)):
            self.asking = self._typical(arrival)

    def _typical(self, arrival: AttentionInputs) -> Tensor:
        """[1, Hq, m, D]: queries that the fit is for."""
        assert self.rope is not None
        some = torch.linspace(0, arrival.queries.shape[2] - 1, self.TYPICAL).long()
        ahead = arrival.seen[:, None] - arrival.position[:, some]
        typical = self.rope.rotate(arrival.queries[:, :, some], ahead)
        return typical if arrival.probe is None else torch.cat([arrival.probe.float(), typical], dim=2)

    def _compress(
        self, held: KVView, full: list[bool], seen: Tensor, passages: Tensor | None = None, fresh: int = 0
    ) -> None:
        slots = self.config.slots
        assert slots is not None
        ranking = policy.priority(held.score, held.count, held.position, seen, self.config.sink, self.config.recent)
        order = ranking.sort(dim=-1, descending=True, stable=True).indices
        if held.count.shape[2] > slots:
            kept, evicted = order[..., :slots], order[..., slots:]
            added = self._refit(held, kept, evicted, min(self.REFIT, slots // 4))
            self.dropped -= added
            held.score.scatter_(2, evicted, policy.NEVER)
        super()._compress(held, full, seen, passages, fresh)

    def _refit(self, held: KVView, kept: Tensor, evicted: Tensor, size: int) -> Tensor:
        """Changes count, value and score of the last `size` of the kept slots: the count added, [B, H]."""
        mass = self._mass(held)  # [B, H, m, C], rows of sum 1
        chosen = kept[..., -size:]
        own, before = _columns(mass, chosen), policy.take(held.count, chosen)
        extra = _non_negative(own / before[:, :, None], _columns(mass, evicted).sum(-1), self.ROUNDS)
        extra = (extra * 1024).round() / 1024  # sums of counts stay exact
        values = held.values.float()
        wanted = mass @ values
        grown = own * (1 + extra / before)[:, :, None]
        others = _columns(mass, kept[..., :-size])
        total = grown.sum(-1, keepdim=True) + others.sum(-1, keepdim=True)
        old = policy.take(values, chosen)
        now = grown @ old + others @ policy.take(values, kept[..., :-size])
        new = old + self._ridge(grown / total, wanted - now / total)
        growth = new.norm(dim=-1) / old.norm(dim=-1).clamp(min=1e-6)
        index = chosen[..., None].expand_as(new)
        held.values.scatter_(2, index, new.to(held.values.dtype))
        held.score.scatter_(2, chosen, policy.take(held.score, chosen) * growth)  # the score holds the value's norm
        held.count.scatter_(2, chosen, before + extra)
        return extra.sum(-1)

    def _mass(self, held: KVView) -> Tensor:
        """float32 [B, H, m, C]: the attention that the queries pay each slot, heads of a group one after another."""
        bias = policy.slot_bias(held.count, self.config.alpha)[:, :, None, None, :]
        return self._paid(self.asking, held.keys.float(), bias, None).flatten(2, 3)

    def _ridge(self, paid: Tensor, missing: Tensor) -> Tensor:
        """[B, H, R, D]: what values paid [B, H, m, R] should add to make up for `missing` [B, H, m, D]."""
        square = paid.mT @ paid
        weight = self.RIDGE * square.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] + 1e-12
        return torch.linalg.solve(square + weight * torch.eye(square.shape[-1]), paid.mT @ missing)


def _columns(mass: Tensor, index: Tensor) -> Tensor:
    """mass [B, H, m, C] at index [B, H, K]: [B, H, m, K]."""
    return mass.gather(3, index[:, :, None].expand(-1, -1, mass.shape[2], -1))


def _non_negative(columns: Tensor, target: Tensor, rounds: int) -> Tensor:
    """x >= 0 [B, H, R] with columns [B, H, m, R] · x near target [B, H, m], by multiplicative updates from equal x."""
    square, wanted = columns.mT @ columns, (columns.mT @ target[..., None])[..., 0]
    x = wanted.sum(-1, keepdim=True) / square.sum((-2, -1))[..., None].clamp(min=1e-12) * torch.ones_like(wanted)
    for _ in range(rounds):
        x = x * wanted / (square @ x[..., None])[..., 0].clamp(min=1e-12)
    return x
