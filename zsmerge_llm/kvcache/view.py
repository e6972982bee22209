"""What a layer of the cache is told, what arrives in it, and what it then holds: the nouns of `layer`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerSpec:
    """What one attention layer needs of its cache, as seen in a one-token forward pass."""

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    dtype: torch.dtype
    device: torch.device
    scaling: float | None = None
    softcap: float | None = None


@dataclass(slots=True)  # not frozen: that would take longer to make, in every layer of every step
class AttentionInputs:
    """The tokens of one forward pass as a layer receives them.

    queries [B, Hq, n, D], keys and values [B, H, n, D]: the tokens to keep. position int32 [B, n]; valid bool [B, n],
    and the same as present float32 [B, n]; asking int32 [B, n]: the position, or -1 for padding. counts: how many of
    them are no padding, for each row; seen: [B], tokens read by each row, these included. probe [B, Hq, m, D],
    probe_position [B, m]: queries that only look, if any. few, many: whether the kernels for a few tokens, or for many,
    serve (`kernels`). pinned_recent: how many of the newest tokens belong to a turn that is still being read: they stay.
    reserving: whether they are read in a conversation that goes on (`CacheConfig.reserve`).
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    position: Tensor
    valid: Tensor
    present: Tensor
    asking: Tensor
    seen: Tensor
    probe: Tensor | None
    probe_position: Tensor | None
    counts: list[int]
    sinks: Tensor | None = None
    few: bool = False
    many: bool = False
    pinned_recent: int = 0
    multi_turn: bool = False

    @property
    def padded(self) -> bool:
        return min(self.counts) < self.keys.shape[2]

    @property
    def unasked(self) -> AttentionInputs:
        """The same tokens when nobody looks any more: without queries."""
        return replace(self, queries=self.queries.new_empty(0), probe=None, probe_position=None)

    def first(self, count: int) -> AttentionInputs:
        """The first `count` tokens, of one row without padding or probe."""
        tokens = {name: getattr(self, name)[:, :, :count] for name in ("queries", "keys", "values")}
        marks = {name: getattr(self, name)[:, :count] for name in ("position", "valid", "present", "asking")}
        return replace(self, **tokens, **marks, seen=self.seen - (self.keys.shape[2] - count), counts=[count])


@dataclass(eq=False)
class Slots:
    """Tensors of slots: a layer's own, or copies. keys, values [B, H, C, D]; the others [B, H, C]."""

    keys: Tensor
    values: Tensor
    count: Tensor
    score: Tensor
    accumulated: Tensor
    position: Tensor


PER_SLOT = tuple(each.name for each in fields(Slots))


@dataclass(frozen=True)
class KVView:
    """What a layer attends to in one pass: the first `end` of its slots, or of copies with the arriving tokens behind.

    Every tensor is [B, H, end, ...]; the arriving tokens of row b stand from slot `base[b]` on.
    """

    slots: Slots
    end: int
    base: list[int]
    in_place: bool

    @property
    def keys(self) -> Tensor:
        return self.slots.keys[:, :, : self.end]

    @property
    def values(self) -> Tensor:
        return self.slots.values[:, :, : self.end]

    @property
    def count(self) -> Tensor:
        return self.slots.count[:, :, : self.end]

    @property
    def score(self) -> Tensor:
        return self.slots.score[:, :, : self.end]

    @property
    def accumulated(self) -> Tensor:
        return self.slots.accumulated[:, :, : self.end]

    @property
    def position(self) -> Tensor:
        return self.slots.position[:, :, : self.end]
