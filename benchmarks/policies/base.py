"""What a policy of the field is here: a cache configuration, and a layer that gives slots other scores.

A `RankedLayer` says in `rank` what each slot is worth when the layer has to compress; everything else (static slots,
sinks, recent window, eviction) is the product's own `LayerCache`. So policies differ in their rule alone.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from zsmerge_llm.config import CacheConfig, apportion
from zsmerge_llm.engine.engine import Engine
from zsmerge_llm.kvcache import policy
from zsmerge_llm.kvcache.cache import Cache
from zsmerge_llm.kvcache.layer_cache import LayerCache, layer_configs
from zsmerge_llm.kvcache.view import AttentionInputs, KVView, LayerSpec

STAGE = 128
CHUNK = 512


@dataclass(frozen=True)
class Rope:
    """How this model rotates: angles [D / 2] per position, halves paired as in Llama and Qwen."""

    frequencies: Tensor

    def rotate(self, vectors: Tensor, by: Tensor) -> Tensor:
        """vectors [..., n, D] rotated on by `by` [n] or [..., n] positions, in float32."""
        angles = by[..., None].float() * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        first, second = vectors.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class PolicyLayer(LayerCache):
    """A layer that knows the model's rotation, and how many tokens of its probe are a generic one's."""

    rope: Rope | None = None
    generic = 0


class RankedLayer(PolicyLayer):
    """Slots are scored by `rank` each time the layer compresses."""

    def _observe(self, held: KVView, arrival: AttentionInputs) -> None:
        if self.config.slots is not None and any(self.fills_up(arrival)):
            held.score.copy_(self.rank(held, arrival))

    @abstractmethod
    def rank(self, held: KVView, arrival: AttentionInputs) -> Tensor:
        """What each slot is worth now: float32 [B, H, C]."""

    def paid_by(self, held: KVView, queries: Tensor, asking: Tensor, sinks: Tensor | None = None) -> Tensor:
        """float32 [B, H, G, m, C]: attention of queries [B, Hq, m, D] at positions [B, m] to each slot."""
        sees = held.position[:, :, None, :] <= asking[:, None, :, None]
        bias = policy.slot_bias(held.count, self.config.alpha)[:, :, None, :].masked_fill(~sees, policy.NEVER)
        return self._paid(queries.float(), held.keys.float(), bias[:, :, None], sinks)

    def asked_by_probe(self, held: KVView, arrival: AttentionInputs) -> Tensor:
        """`paid_by` the probe, or by the newest queries where there is none."""
        if arrival.probe is not None and arrival.probe_position is not None:
            return self.paid_by(held, arrival.probe, arrival.probe_position, arrival.sinks)
        return self.paid_by(held, arrival.queries[:, :, -32:], arrival.position[:, -32:], arrival.sinks)


@dataclass(frozen=True)
class Policy:
    """How a cache is filled.

    config: from the number of slots. layer: what ranks them. probe: whose attention decides, handed to the engine;
    "both" is a question behind a generic one.
    chunk: tokens a pass; None reads everything in one pass and compresses each layer then, as policies do that need
    the full cache first. budgets: slots of each full-attention layer, from the mean and the number of these;
    profiled: how far they follow from the model's profile (`zsmerge_llm.engine.layer_budgets`), 1 is wholly. newest_only: the text
    is cut to its end instead. retrieval_tokens: tokens of passages that are read again before a question (`zsmerge_llm.retrieval.passage_search`);
    glance: whether the cache is asked where words find nothing (`zsmerge_llm.retrieval.attention_search`).
    """

    name: str
    config: Callable[[int], CacheConfig]
    layer: type[PolicyLayer] = PolicyLayer
    probe: Literal["question", "generic", "both"] | None = None
    chunk: int | None = CHUNK
    budgets: Callable[[int, int], list[int]] | None = None
    profiled: float = 0.0
    newest_only: bool = False
    retrieval_tokens: int = 0
    glance: bool = False

    @property
    def whole(self) -> bool:
        """Whether the full cache exists before anything is dropped."""
        return self.chunk is None or self.config(1024).slots is None

    def new_cache(self, specs: Sequence[LayerSpec], slots: int, rope: Rope | None = None) -> Cache:
        """An empty cache of `slots` per layer on average, compressed by this policy."""
        config = self.config(slots)
        cache = Cache(config, specs)
        configs = layer_configs(config, specs)
        if self.budgets is not None:
            budgets = iter(self.budgets(slots, sum(spec.window is None for spec in specs)))
            configs = [
                _at(own, next(budgets)) if spec.window is None else own
                for own, spec in zip(configs, specs, strict=True)
            ]
        cache.layers = [self.layer(each, spec, 1) for each, spec in zip(configs, specs, strict=True)]
        for layer in cache.layers:
            assert isinstance(layer, PolicyLayer)
            layer.rope = rope
        return cache

    def nbytes(self, specs: Sequence[LayerSpec], slots: int) -> int:
        """Bytes this policy's cache of `slots` holds: keys, values, counts, scores, positions, queries."""
        nowhere = [replace(spec, device=torch.device("meta")) for spec in specs]
        return self.new_cache(nowhere, slots).nbytes

    def slots_for(self, specs: Sequence[LayerSpec], budget: int) -> int:
        """The most slots that fit into `budget` bytes."""
        low, high = 8, 1 << 20
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(specs, middle, budget) else (low, middle)
        return low

    def _fits(self, specs: Sequence[LayerSpec], slots: int, budget: int) -> bool:
        slot = sum(spec.kv_heads * (spec.key_dim + spec.value_dim) * spec.dtype.itemsize for spec in specs)
        return slots * slot <= budget and self.nbytes(specs, slots) <= budget


def _at(config: CacheConfig, slots: int) -> CacheConfig:
    """`config` for a layer of so many slots, of which at most half are recent ones."""
    return config.replace(slots=slots, recent=min(config.recent, max(1, slots // 2)))


def weighted(shares: Sequence[float]) -> Callable[[int, int], list[int]]:
    """`Policy.budgets` by weights with mean 1."""
    return lambda slots, layers: apportion(slots * layers, shares, 1)


def plain(slots: int) -> CacheConfig:
    """Sinks, 64 recent tokens, no residual, no buffer of queries: what a ranked policy starts from."""
    return CacheConfig(slots=slots, policy="cumulative_attention", stage=STAGE)


def probed(slots: int) -> CacheConfig:
    """`plain`, with the probe handed through."""
    return CacheConfig(
        slots=slots, policy="observation_window", observation_window=1, score_floor=None, passage_share=0.0, stage=STAGE
    )


def rope_of(engine: Engine) -> Rope | None:
    """The model's rotation, where it has one kind for all layers."""
    base = getattr(engine.model, "model", None)
    frequencies = getattr(getattr(base, "rotary_emb", None), "inv_freq", None)
    return None if frequencies is None else Rope(frequencies.float())
