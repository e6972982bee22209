"""Merging by a fit: slots that also represent evicted tokens, as well as least squares allows."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.policies.base import ModelFacts
from benchmarks.policies.value_weighted import ValueWeightedMean
from zsmerge_llm.kvcache.equations import NEVER, gather_slots, grouped_weights, retention_rank, slot_bias
from zsmerge_llm.kvcache.layer_cache import KVView
from zsmerge_llm.kvcache.slots import AttentionInputs


class LeastSquaresMerging(ValueWeightedMean):
    """`ValueWeightedMean`, where the `REFIT` lowest-ranking kept slots also represent what is evicted.

    Their keys stay. Their mass (multiplicity, with α = 1) takes on that of the evicted tokens by non-negative least
    squares, and their values change by ridge regression so that attention returns what it returned before. The fit is
    on the probe's queries and on `TYPICAL` of the chunk's, rotated to its end.
    """

    name = "least-squares-merging"
    REFIT = 64
    TYPICAL = 64
    ROUNDS = 60
    RIDGE = 0.01

    def __init__(self, facts: ModelFacts) -> None:
        self.rotation = facts.rotation

    def observe(self, view: KVView, inputs: AttentionInputs) -> None:
        """Score the slots; where a row is compressed next, merge what it will evict into the lowest kept slots."""
        super().observe(view, inputs)
        slots, config = view.config.slots or 0, view.config
        if not any(view.layer.rows_due(inputs)) or view.end <= slots:
            return
        ranking = retention_rank(view.score, view.multiplicity, view.position, inputs.seen, config.sink, config.recent)
        order = ranking.sort(dim=-1, descending=True, stable=True).indices
        kept, evicted = order[..., :slots], order[..., slots:]
        queries = self.fitted_queries(inputs)
        view.layer.dropped -= self._refit(view, queries, kept, evicted, min(self.REFIT, slots // 4))
        view.score.scatter_(2, evicted, NEVER)

    def fitted_queries(self, inputs: AttentionInputs) -> Tensor:
        """Return the queries that the fit is for, float32 [1, Hq, m, D]."""
        assert self.rotation is not None
        some = torch.linspace(0, inputs.queries.shape[2] - 1, self.TYPICAL).long()
        ahead = inputs.seen[:, None] - inputs.positions[:, some]
        typical = self.rotation.rotate(inputs.queries[:, :, some].float(), ahead)
        return typical if inputs.probe_queries is None else torch.cat([inputs.probe_queries.float(), typical], dim=2)

    def _refit(self, view: KVView, queries: Tensor, kept: Tensor, evicted: Tensor, size: int) -> Tensor:
        """Change multiplicity, value and score of the last `size` kept slots; return the multiplicity added, [B, H]."""
        mass = attention_mass_by_query(view, queries)  # [B, H, m, C], rows of sum 1
        chosen = kept[..., -size:]
        own, before = _columns(mass, chosen), gather_slots(view.multiplicity, chosen)
        extra = _non_negative(own / before[:, :, None], _columns(mass, evicted).sum(-1), self.ROUNDS)
        extra = (extra * 1024).round() / 1024  # sums of multiplicities stay exact
        values = view.values.float()
        wanted = mass @ values
        grown = own * (1 + extra / before)[:, :, None]
        others = _columns(mass, kept[..., :-size])
        total = grown.sum(-1, keepdim=True) + others.sum(-1, keepdim=True)
        old = gather_slots(values, chosen)
        now = grown @ old + others @ gather_slots(values, kept[..., :-size])
        new = old + self._ridge(grown / total, wanted - now / total)
        growth = new.norm(dim=-1) / old.norm(dim=-1).clamp(min=1e-6)
        view.values.scatter_(2, chosen[..., None].expand_as(new), new.to(view.values.dtype))
        view.score.scatter_(2, chosen, gather_slots(view.score, chosen) * growth)  # the score holds the value's norm
        view.multiplicity.scatter_(2, chosen, before + extra)
        return extra.sum(-1)

    def _ridge(self, attention: Tensor, missing: Tensor) -> Tensor:
        """Return what values [B, H, R, D] of attention [B, H, m, R] should add to `missing` [B, H, m, D]."""
        square = attention.mT @ attention
        weight = self.RIDGE * square.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] + 1e-12
        return torch.linalg.solve(square + weight * torch.eye(square.shape[-1]), attention.mT @ missing)


def attention_mass_by_query(view: KVView, queries: Tensor) -> Tensor:
    """Return each query's attention to each slot, the heads of a group one after another: float32 [B, H, m, C]."""
    bias = slot_bias(view.multiplicity, view.config.alpha)[:, :, None, None, :]
    weights = grouped_weights(queries, view.keys.float(), bias, view.spec.scale, view.spec.softcap, None)
    return weights.flatten(2, 3)


def _columns(mass: Tensor, index: Tensor) -> Tensor:
    """Gather mass [B, H, m, C] at index [B, H, K]: [B, H, m, K]."""
    return mass.gather(3, index[:, :, None].expand(-1, -1, mass.shape[2], -1))


def _non_negative(columns: Tensor, target: Tensor, rounds: int) -> Tensor:
    """Solve columns [B, H, m, R] · x ≈ target [B, H, m] for x >= 0 by multiplicative updates from equal x."""
    square, wanted = columns.mT @ columns, (columns.mT @ target[..., None])[..., 0]
    x = wanted.sum(-1, keepdim=True) / square.sum((-2, -1))[..., None].clamp(min=1e-12) * torch.ones_like(wanted)
    for _ in range(rounds):
        x = x * wanted / (square @ x[..., None])[..., 0].clamp(min=1e-12)
    return x
