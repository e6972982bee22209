"""Slots of a layer shared out among its KV heads, as AdaKV (2407.11550) does it: what ranks highest in it stays.

A layer's tensors are rectangles, so a head can only have more slots where all have room for them. Here they have half
as much again, and the bytes that are counted are those that ragged tensors would take: the best that could be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.policies.base import PolicyLayer
from zsmerge_llm.config import CacheConfig
from zsmerge_llm.kvcache.layer_cache import LayerCache
from zsmerge_llm.kvcache.policy import NEVER
from zsmerge_llm.kvcache.view import LayerSpec


class ByHead(PolicyLayer):
    """Each head has between half and one and a half times its even share, by worth across heads."""

    SPREAD = 0.5

    def __init__(self, config: CacheConfig, spec: LayerSpec, rows: int) -> None:
        self.even = config
        room = config if config.slots is None else config.replace(slots=round((1 + self.SPREAD) * config.slots))
        super().__init__(room, spec, rows)

    @property
    def nbytes(self) -> int:
        return LayerCache(self.even, self.spec, len(self.fills)).nbytes

    def _ranking(self, slots: dict[str, Tensor], seen: Tensor, goes_on: Tensor, *rest: Any) -> Tensor:
        room, self.config = self.config, self.even
        ranking = super()._ranking(slots, seen, goes_on, *rest)
        self.config = room
        stays = self.shared_out(self.comparable(ranking))
        self.dropped += (slots["count"] * ~stays).sum(-1)  # one row: these never read batches
        slots["count"].masked_fill_(~stays, 0)
        return ranking.masked_fill(~stays, NEVER)

    def comparable(self, ranking: Tensor) -> Tensor:
        """What slots of different heads are compared by."""
        return ranking

    def shared_out(self, ranking: Tensor) -> Tensor:
        """Who stays, bool [B, H, C], of float32 [B, H, C]."""
        assert self.even.slots is not None
        heads, most = ranking.shape[1], self.config.slots or 0
        place = ranking.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        sure = (place < round((1 - self.SPREAD) * self.even.slots)) & (ranking > NEVER)
        between = ranking.masked_fill(sure, float("inf")).masked_fill(place >= most, NEVER)
        order = between.flatten(1).argsort(dim=-1, descending=True, stable=True)[:, : heads * self.even.slots]
        chosen = torch.zeros_like(between, dtype=torch.bool).flatten(1).scatter(1, order, True).view_as(between)
        return chosen & (between > NEVER)


class ByHeadShare(ByHead):
    """`ByHead` by each slot's part of its head's worth: heads with large values are not worth more for that."""

    def comparable(self, ranking: Tensor) -> Tensor:
        whole = ranking.masked_fill(ranking.isinf(), 0).sum(-1, keepdim=True).clamp(min=1e-30)
        return torch.where(ranking.isinf(), ranking, ranking / whole)
