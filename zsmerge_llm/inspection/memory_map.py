"""What a cache still holds of what it has read, token by token: `memory_map`, as data. `memory_page` draws it.

Verbatim means a slot of its own (count 1). Of every other token, a head has a share in a residual slot (merged) or
nothing at all (dropped); which tokens went where is not recorded, only how many.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from zsmerge_llm.errors import InputError
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.layer_cache import LayerCache
from zsmerge_llm.sessions.session import Session


@dataclass(frozen=True)
class MergedSlot:
    """A residual slot that stands for several tokens. position: that of the first one it took. tokens: how many."""

    head: int
    position: int
    tokens: int


@dataclass(frozen=True, eq=False)
class LayerMap:
    """What one layer holds.

    index: from 0. heads: its KV heads. window: for a sliding-window layer, the tokens it looks back; it keeps exactly
    these. slots: the budget of a head, None without a limit. held: integer [T], how many heads hold each token
    verbatim. merged: the residual slots of all heads with more than one token. dropped: tokens that left without a
    trace, mean over heads.
    """

    index: int
    heads: int
    window: int | None
    slots: int | None
    held: Tensor
    merged: tuple[MergedSlot, ...]
    dropped: float

    @cached_property
    def verbatim(self) -> float:
        """Tokens held verbatim, mean over heads."""
        return self.held.sum().item() / self.heads

    @cached_property
    def merged_tokens(self) -> float:
        """Tokens that residual slots stand for, mean over heads."""
        return sum(slot.tokens for slot in self.merged) / self.heads


@dataclass(frozen=True, eq=False)
class MemoryMap:
    """What a cache holds of T tokens.

    tokens: the ids; those behind the first `seen` are not in the cache yet. layers: all of them. sink: the first
    tokens, which every head keeps. nbytes: of the cache. full_nbytes: what keys and values of an exact cache would
    take.
    """

    tokens: tuple[int, ...]
    seen: int
    layers: tuple[LayerMap, ...]
    sink: int
    nbytes: int
    full_nbytes: int

    @cached_property
    def judged(self) -> tuple[LayerMap, ...]:
        """The layers that the figures are about: those of full attention; all, where every layer slides."""
        return tuple(layer for layer in self.layers if layer.window is None) or self.layers

    @cached_property
    def pairs(self) -> int:
        """(layer, head) pairs among the judged layers."""
        return sum(layer.heads for layer in self.judged)

    @cached_property
    def held(self) -> Tensor:
        """int64 [T]: how many (layer, head) pairs of the judged layers hold each token verbatim."""
        return torch.stack([layer.held for layer in self.judged]).sum(0)

    @cached_property
    def share(self) -> Tensor:
        """float32 [T]: the same as a share of all pairs, 0 to 1."""
        return self.held / self.pairs

    @property
    def verbatim(self) -> float:
        """Tokens held verbatim, mean over the judged layers and their heads."""
        return self.held.sum().item() / self.pairs

    @property
    def merged(self) -> float:
        """Tokens that only residual slots stand for, mean over the judged layers and their heads."""
        return sum(layer.merged_tokens * layer.heads for layer in self.judged) / self.pairs

    @property
    def dropped(self) -> float:
        """Tokens that left without a trace, mean over the judged layers and their heads."""
        return sum(layer.dropped * layer.heads for layer in self.judged) / self.pairs

    @property
    def nowhere(self) -> int:
        """Tokens that no head of any judged layer holds verbatim."""
        return int((self.held == 0).sum())

    @property
    def whole(self) -> bool:
        """Whether every judged head still holds every token."""
        return self.newest == self.seen

    @property
    def newest(self) -> int:
        """How many of the newest tokens every judged head holds."""
        missing = (self.held < self.pairs).nonzero()
        return self.seen - int(missing[-1]) - 1 if len(missing) else self.seen


def memory_map(session: Session) -> MemoryMap:
    """What the newest point of a session holds. Changes nothing.

    Raises:
        InputError: a session that has read nothing.
    """
    return map_cache(session.cache, session.tokens)


def map_cache(cache: Cache, tokens: list[int]) -> MemoryMap:
    """What a one-row cache holds of `tokens`, which it has read, all or but for the last ones.

    Raises:
        InputError: a cache that has read nothing or holds several rows, or fewer ids than it has read.
    """
    if cache.rows != 1 or not cache.seen:
        raise InputError("There is no memory to show yet: read something first, into a cache of one row.")
    if len(tokens) < cache.seen:
        raise InputError(f"The cache has read {cache.seen:,} tokens and {len(tokens):,} ids were given: give all.")
    layers = tuple(_layer_map(index, layer, cache.seen) for index, layer in enumerate(cache.layers))
    limited = cache.slots is not None
    return MemoryMap(
        tokens=tuple(tokens),
        seen=cache.seen,
        layers=layers,
        sink=cache.config.sink if limited else 0,
        nbytes=cache.nbytes,
        full_nbytes=cache.full_nbytes(),
    )


def _layer_map(index: int, layer: LayerCache, seen: int) -> LayerMap:
    count, position = layer.multiplicity[0].cpu(), layer.position[0].cpu().long()  # [H, P]
    held = torch.zeros(seen, dtype=torch.long)
    held.index_put_((position[count == 1],), torch.tensor(1), accumulate=True)
    merged = tuple(
        MergedSlot(head, int(position[head, slot]), int(count[head, slot]))
        for head, slot in (count > 1).nonzero().tolist()
    )
    dropped = layer.dropped[0].mean().item()
    return LayerMap(index, count.shape[0], layer.spec.window, layer.config.slots, held, merged, dropped)
