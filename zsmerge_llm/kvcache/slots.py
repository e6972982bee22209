"""The nouns of the cache: what a layer needs, the tokens of a forward pass as it receives them, and slots.

Shapes: B rows, Hq query heads, H KV heads, n new tokens, m probe tokens, C slots, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from zsmerge_llm.kvcache.gate import Gate


@dataclass(frozen=True)
class LayerSpec:
    """What one attention layer needs of its cache, as seen in a one-token forward pass.

    window: the sliding window in tokens, None for full attention. scaling: factor of the logits, None for D^-0.5.
    softcap: logits become softcap · tanh(logits / softcap) (Gemma 2).
    gate: scores slots before a question is known; None where the model has none. It is not saved with a cache.
    """

    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None
    dtype: torch.dtype
    device: torch.device
    scaling: float | None = None
    softcap: float | None = None
    gate: Gate | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What is saved of it, by name."""
        return {name: getattr(self, name) for name in LAYER_FACTS}

    @property
    def scale(self) -> float:
        """The factor by which queries times keys are multiplied."""
        return self.key_dim**-0.5 if self.scaling is None else self.scaling


LAYER_FACTS = tuple(each.name for each in fields(LayerSpec) if each.name != "gate")
"""The fields of a `LayerSpec` that are saved with a cache."""


class ScoringOps(Protocol):
    """What scoring asks of a backend. `kvcache.scoring.TensorScoring` is the reference in PyTorch."""

    def attention_mass(
        self,
        queries: Tensor,
        query_positions: Tensor,
        keys: Tensor,
        bias: Tensor,
        positions: Tensor,
        spec: LayerSpec,
        sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the attention that each slot gets: mean over queries and group, and maximum; float32 [B, H, C].

        Args:
            queries: [B, Hq, m, D]. query_positions: int [B, m]; a query sees no later slot, and -1 sees none.
            keys: [B, H, C, D]. bias: float32 [B, H, C], added to the logits. positions: int [B, H, C], of the slots.
            sinks: [Hq], learned logits that take part in the softmax.
        """

    def push_queries(self, queries: Tensor, query_positions: Tensor, inputs: AttentionInputs) -> None:
        """Write a pass's queries into the ring of the newest ones [B, Hq, W, D], in place; see `equations.push_ring`.

        query_positions: int32 [B, W], of the ring's entries.
        """


@dataclass(slots=True)  # not frozen: that would take longer to make, in every layer of every step
class AttentionInputs:
    """The tokens of one forward pass as one layer receives them.

    queries [B, Hq, n, D], keys and values [B, H, n, D]: of the n tokens that enter the cache. positions int32 [B, n];
    valid bool [B, n], False for padding; query_positions int32 [B, n]: the position, or -1 for padding. counts int32
    [B]: how many of them are no padding; num_new_tokens: the same on the host. seen int [B]: tokens read by each row,
    these included.
    ops: computes attention masses and keeps the newest queries. probe_queries [B, Hq, m, D], probe_positions int [B,
    m]: queries that decide what is kept and do not enter the cache. sinks [Hq]: learned logits of attention sinks.
    pinned_recent: how many of the newest tokens belong to a turn that is still being read; they are not evicted.
    multi_turn: whether the conversation has been answered before (`CacheConfig.history_share`).
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    valid: Tensor
    query_positions: Tensor
    counts: Tensor
    num_new_tokens: list[int]
    seen: Tensor
    ops: ScoringOps
    probe_queries: Tensor | None = None
    probe_positions: Tensor | None = None
    sinks: Tensor | None = None
    pinned_recent: int = 0
    multi_turn: bool = False

    def without_queries(self) -> AttentionInputs:
        """Return the same tokens without queries and probe, once they have been scored."""
        return replace(self, queries=self.queries.new_empty(0), probe_queries=None, probe_positions=None)

    def first(self, counts: Tensor, num_new_tokens: list[int]) -> AttentionInputs:
        """Return the tokens with all but the first `counts` int [B] of each row as padding."""
        valid = torch.arange(self.valid.shape[1], device=counts.device) < counts[:, None]
        return replace(
            self,
            valid=valid,
            query_positions=self.positions.masked_fill(~valid, -1),
            counts=counts.to(self.counts.dtype),
            num_new_tokens=num_new_tokens,
            seen=self.seen - self.counts + counts,
        )


@dataclass(eq=False)
class Slots:
    """Tensors of slots: a layer's own, or copies. keys, values [B, H, C, D]; the others [B, H, C].

    multiplicity float32: tokens that a slot stands for; 0: empty, 1: one token verbatim, more: a residual slot.
    score float32: by the policy. cumulative_attention float32: what the chat's own queries attended to, summed up.
    position int32: of the slot's token; of a residual slot, that of the first token it took.
    """

    keys: Tensor
    values: Tensor
    multiplicity: Tensor
    score: Tensor
    cumulative_attention: Tensor
    position: Tensor


PER_SLOT = tuple(each.name for each in fields(Slots))
