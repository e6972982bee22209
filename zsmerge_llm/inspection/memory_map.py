"""Which tokens a KV cache still holds, as data: `memory_map`. `inspection.html` draws it.

A token is held verbatim by a head that has a slot of its own for it (multiplicity 1). A head has merged any other token
into a residual slot, or dropped it. The cache does not record which of the two, only how many.
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
    """A residual slot of one head that holds the mean of several tokens, the first of them at `position`."""

    head: int
    position: int
    tokens: int


@dataclass(frozen=True, eq=False)
class LayerMap:
    """What one layer holds.

    Attributes:
        index: number of the layer, from 0.
        num_heads: its KV heads.
        sliding_window: tokens that a sliding-window layer attends to; it holds exactly these. None: full attention.
        slots: budget of each head; None without a limit.
        verbatim_heads: int64 [T], how many heads hold each token verbatim.
        merged_slots: residual slots of all heads with more than one token.
        dropped_tokens: tokens in no slot, mean over heads.
    """

    index: int
    num_heads: int
    sliding_window: int | None
    slots: int | None
    verbatim_heads: Tensor
    merged_slots: tuple[MergedSlot, ...]
    dropped_tokens: float

    @cached_property
    def verbatim_tokens(self) -> float:
        """Tokens held verbatim, mean over heads."""
        return self.verbatim_heads.sum().item() / self.num_heads

    @cached_property
    def merged_tokens(self) -> float:
        """Tokens in residual slots, mean over heads."""
        return sum(slot.tokens for slot in self.merged_slots) / self.num_heads


@dataclass(frozen=True, eq=False)
class MemoryMap:
    """What a cache holds of T tokens.

    Attributes:
        tokens: token ids; those after the first `seen` are not in the cache yet.
        seen: tokens that the cache has read.
        layers: all layers.
        num_sinks: first tokens, which are never evicted.
        nbytes: size of the cache. full_nbytes: size of an exact cache of the same tokens.
    """

    tokens: tuple[int, ...]
    seen: int
    layers: tuple[LayerMap, ...]
    num_sinks: int
    nbytes: int
    full_nbytes: int

    @cached_property
    def measured_layers(self) -> tuple[LayerMap, ...]:
        """The full-attention layers, to which all figures refer; all layers in a model that has none."""
        return tuple(layer for layer in self.layers if layer.sliding_window is None) or self.layers

    @cached_property
    def num_heads(self) -> int:
        """KV heads of all measured layers together."""
        return sum(layer.num_heads for layer in self.measured_layers)

    @cached_property
    def verbatim_heads(self) -> Tensor:
        """int64 [T]: how many heads of the measured layers hold each token verbatim."""
        return torch.stack([layer.verbatim_heads for layer in self.measured_layers]).sum(0)

    @cached_property
    def verbatim_share(self) -> Tensor:
        """float32 [T]: the share of heads that hold each token verbatim, 0 to 1."""
        return self.verbatim_heads / self.num_heads

    @property
    def verbatim_tokens(self) -> float:
        """Tokens held verbatim, mean over the measured layers and their heads."""
        return self.verbatim_heads.sum().item() / self.num_heads

    @property
    def merged_tokens(self) -> float:
        """Tokens in residual slots, mean over the measured layers and their heads."""
        return sum(layer.merged_tokens * layer.num_heads for layer in self.measured_layers) / self.num_heads

    @property
    def dropped_tokens(self) -> float:
        """Tokens in no slot, mean over the measured layers and their heads."""
        return sum(layer.dropped_tokens * layer.num_heads for layer in self.measured_layers) / self.num_heads

    @property
    def num_unheld(self) -> int:
        """Tokens that no head of a measured layer holds verbatim."""
        return int((self.verbatim_heads == 0).sum())

    @property
    def is_complete(self) -> bool:
        """Whether every head of the measured layers holds every token verbatim."""
        return self.num_newest == self.seen

    @property
    def num_newest(self) -> int:
        """Number of newest tokens that every head of the measured layers holds verbatim."""
        missing = (self.verbatim_heads < self.num_heads).nonzero()
        return self.seen - int(missing[-1]) - 1 if len(missing) else self.seen


def memory_map(session: Session) -> MemoryMap:
    """Return what the newest snapshot of a session holds. The session is not changed.

    Raises:
        InputError: no session, or one that has read nothing.
    """
    if not isinstance(getattr(session, "cache", None), Cache):
        raise InputError(f"This must be a Session, not a {type(session).__name__}: LLM.session gives one.")
    return map_cache(session.cache, session.tokens)


def map_cache(cache: Cache, tokens: list[int]) -> MemoryMap:
    """Return what a cache of one row holds of `tokens`, of which it has read the first `cache.seen`.

    Raises:
        InputError: a cache that has read nothing or has several rows, or fewer ids than it has read.
    """
    if cache.rows != 1 or not cache.seen:
        raise InputError("The cache is empty or has several rows: read something first, into a cache of one row.")
    if len(tokens) < cache.seen:
        raise InputError(f"The cache has read {cache.seen:,} tokens and {len(tokens):,} ids were given: give all.")
    return MemoryMap(
        tokens=tuple(tokens),
        seen=cache.seen,
        layers=tuple(_layer_map(index, layer, cache.seen) for index, layer in enumerate(cache.layers)),
        num_sinks=0 if cache.slots is None else cache.config.sink,
        nbytes=cache.nbytes,
        full_nbytes=cache.full_nbytes(),
    )


def _layer_map(index: int, layer: LayerCache, seen: int) -> LayerMap:
    multiplicity, position = layer.multiplicity[0].cpu(), layer.position[0].cpu().long()  # [H, slots]
    verbatim_heads = torch.zeros(seen, dtype=torch.long)
    verbatim_heads.index_put_((position[multiplicity == 1],), torch.tensor(1), accumulate=True)
    merged_slots = tuple(
        MergedSlot(head, int(position[head, slot]), int(multiplicity[head, slot]))
        for head, slot in (multiplicity > 1).nonzero().tolist()
    )
    num_heads, dropped = multiplicity.shape[0], layer.dropped[0].mean().item()
    return LayerMap(index, num_heads, layer.spec.window, layer.config.slots, verbatim_heads, merged_slots, dropped)
